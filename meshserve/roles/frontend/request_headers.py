"""Headers of a completion request: deadline, session and trace."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from meshserve.errors import InvalidRequest
from meshserve.observe.receipts import FrontendReceipt
from meshserve.roles.frontend.http.messages import Request
from meshserve.roles.frontend.http.span_attributes import span_attributes
from meshserve.roles.frontend.models.common import MAX_SESSION_CHARACTERS
from meshserve.wire.completion import CompletionRequest, read_traceparent
from meshserve.wire.structs import replace

if TYPE_CHECKING:
    from meshserve.observe.otlp import Exporter

_TIMEOUT_HEADER = "x-request-timeout"
HEEDED = frozenset((b"x-request-timeout", b"x-session-id", b"traceparent"))
"""Names of the headers that ask for anything."""
MIN_TIMEOUT_S = 0.001


def timeout_s(headers: Mapping[bytes, bytes], most_s: float) -> float:
    """How long the request may take: what a header asks for, but at most `most_s`. Raises
    InvalidRequest that names the header."""
    given = headers.get(b"x-request-timeout")
    if given is None:
        return most_s
    try:
        asked_s = (
            float(given) if b"_" not in given else math.nan
        )  # Python's own way to write numbers
    except ValueError:
        asked_s = math.nan
    if not MIN_TIMEOUT_S <= asked_s < math.inf:
        raise InvalidRequest(
            f"{_TIMEOUT_HEADER} must be a number of seconds, {MIN_TIMEOUT_S} at least",
            param=_TIMEOUT_HEADER,
        )
    return min(asked_s, most_s)


def applied(
    request: CompletionRequest,
    headers: Mapping[bytes, bytes],
    receipt: FrontendReceipt,
    exporter: "Exporter | None",
) -> CompletionRequest:
    """The request, with the session and the trace that headers name; the receipt gets the trace."""
    if session := headers.get(b"x-session-id"):
        request = replace(request, session=session.decode("latin-1")[:MAX_SESSION_CHARACTERS])
    _note_trace(headers, receipt)
    traceparent = receipt.traceparent if exporter is None else exporter.trace(receipt)
    return replace(request, traceparent=traceparent) if traceparent else request


def export(receipt: FrontendReceipt, request: Request, exporter: "Exporter") -> None:
    """The request is over: its span goes out, also if it was refused before its headers were read."""
    _note_trace(request.headers, receipt)
    exporter.frontend_ended(receipt, span_attributes(request))


def _note_trace(headers: Mapping[bytes, bytes], receipt: FrontendReceipt) -> None:
    """The receipt gets the client's trace, if a header names one."""
    if trace := headers.get(b"traceparent", b"").decode("latin-1"):
        receipt.traceparent = trace if read_traceparent(trace) is not None else ""
