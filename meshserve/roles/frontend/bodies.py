"""JSON bodies that cannot hold up the event loop: what would take long to parse is refused before it is parsed.

The C parser holds the interpreter for as long as it runs, in whatever thread. It reads text at 1 GB/s, but values at 50 to 400 ns each:
4 MiB of `[],[],` take 180 ms, of text 2 to 7 ms. So the values of a long body are counted first, outside of its strings. A faster parser
would move the bound, and not remove it (orjson and msgspec: 30 to 360 ms for 8 MiB of values).
"""

import asyncio
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

from meshserve.errors import InvalidRequest

T = TypeVar("T")

MAX_DEPTH = 64
"""Objects and lists within each other: schemas and messages have a dozen."""
SHORT_BODY_BYTES = 64 * 1024
"""Whatever is in a body of this size, it is parsed in 3 ms: longer ones are scanned and parsed in a thread, beside the event loop."""
_MAX_COST_NS = 7_000_000
_COMMA_NS, _OPENING_NS, _COLON_NS = 50, 200, 300
"""What a value costs, and what a list or an object and a member's name cost more (measured with json.loads, Python 3.11), a check of its
depth included."""
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class JsonScanner:
    """Adds up what a JSON text costs, piece by piece; the text need not be JSON. About 1 ns a byte."""

    def __init__(self) -> None:
        self._cost_ns = 0
        self._is_in_string = False
        self._is_after_backslash = False
        self._num_opened = 0
        self._depth = 0

    def feed(self, piece: bytes) -> None:
        """The next piece. Raises InvalidRequest once it is too much."""
        outside = self._outside_strings(piece)
        num_opening = outside.count(b"[") + outside.count(b"{")
        depth_before = self._depth
        self._depth += num_opening - outside.count(b"]") - outside.count(b"}")
        self._num_opened += num_opening
        self._cost_ns += _COMMA_NS * outside.count(b",") + _OPENING_NS * num_opening + _COLON_NS * outside.count(b":")
        if self._depth <= MAX_DEPTH and self._cost_ns > _MAX_COST_NS:
            raise InvalidRequest("the body holds too many values; long prompts are shorter as text")
        if self._depth > MAX_DEPTH or (self._num_opened > MAX_DEPTH and _deepest(outside, depth_before) > MAX_DEPTH):
            raise InvalidRequest(f"the body is nested too deeply: at most {MAX_DEPTH} levels")

    def _outside_strings(self, piece: bytes) -> bytes:
        if self._is_after_backslash:
            piece = b"\\" + piece
        tail = len(piece) - len(piece.rstrip(b"\\"))
        self._is_after_backslash = tail % 2 == 1  # it belongs to what comes next
        if self._is_after_backslash:
            piece = piece[:-1]
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[1::2] if self._is_in_string else parts[::2])
        if len(parts) % 2 == 0:
            self._is_in_string = not self._is_in_string
        return outside


def _deepest(outside: bytes, depth: int) -> int:
    return max(accumulate(map(_STEPS.__getitem__, outside.translate(None, _NOT_BRACKETS)), initial=depth))


def check_json(body: bytes) -> None:
    """Raises InvalidRequest for what would take long to parse, or is nested too deeply. A short, flat body costs two counts."""
    if len(body) > SHORT_BODY_BYTES or body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        JsonScanner().feed(body)


async def read_json(body: bytes, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of a body that can be parsed; a long one in a thread. Raises InvalidRequest."""

    def read() -> T:
        check_json(body)
        return parse(body)

    return read() if len(body) <= SHORT_BODY_BYTES else await asyncio.to_thread(read)
