"""The header `traceparent` (W3C Trace Context, level 1, section 3.2): which trace a request belongs to. Pure."""

import re
from typing import NamedTuple

_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceContext(NamedTuple):
    """A trace, and the span of it that caused this one. Ids are lower-case hexadecimal."""

    trace_id: str
    span_id: str
    is_sampled: bool = True
    """Whether whoever began the trace wants it recorded."""

    def __str__(self) -> str:
        """As the header has it."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"


def read_traceparent(text: str) -> TraceContext | None:
    """None for what is malformed, or names nothing: such a header is ignored (section 3.2.2). Later versions may append to theirs."""
    found = _FORM.fullmatch(text)
    if found is None or (found[4] and text.startswith("00")) or not int(found[1], 16) or not int(found[2], 16):
        return None
    return TraceContext(found[1], found[2], bool(int(found[3], 16) & 1))
