"""The answers of the routes that every token passes, written with as little ado as HTTP needs.

uvicorn's own `send` looks at each header with two patterns and writes the head apart from the body. Here the head leaves with what follows
it, in one write, and what all heads have in common is encoded once a second, when the date changes. Flow control, keep-alive and
pipelining are uvicorn's: its cycle is told all that it needs to know.
"""

import re
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Protocol

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from meshserve.roles.frontend.asgi import Header, Scope, Send
from meshserve.roles.frontend.connections import CYCLE

_FORBIDDEN = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
"""In the values of headers: a client's own id comes back in one."""


class Cycle(Protocol):
    """One request's answer as a connection sees it: uvicorn's `RequestResponseCycle`, or what stands for it."""

    flow: FlowControl
    transport: Any
    message_event: Any
    default_headers: Any
    on_response: Callable[[], None]
    disconnected: bool
    keep_alive: bool
    waiting_for_100_continue: bool
    response_started: bool
    response_complete: bool
    chunked_encoding: bool | None


class _DefaultHead:
    """The headers of every response, as bytes."""

    def __init__(self) -> None:
        self._headers: Sequence[Header] | None = None
        self._encoded = b""

    def of(self, headers: Sequence[Header]) -> bytes:
        """uvicorn makes a new list when the date changes."""
        if headers is not self._headers:
            self._headers, self._encoded = headers, encode_headers(headers)
        return self._encoded


_default_head = _DefaultHead()


def encode_headers(headers: Sequence[Header]) -> bytes:
    """As they stand in a response's head. Raises RuntimeError for a value with a control character."""
    if _FORBIDDEN.search(b"".join([value for _, value in headers])):
        raise RuntimeError("a header with a control character")
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def responder(scope: Scope, send: Send) -> Send:
    """For a request by POST: `send` itself if somebody stands before it who changes what is sent."""
    cycle: Cycle = scope[CYCLE]()
    return Responder(cycle).send if send == cycle.send else send  # type: ignore[attr-defined]  # uvicorn's has one


class Responder:
    """One response. What comes after a disconnect is dropped."""

    __slots__ = ("_cycle", "_extra", "_head")

    def __init__(self, cycle: Cycle, extra: Sequence[Header] = ()) -> None:
        """`extra` headers are those of every response to whoever asks here."""
        self._cycle, self._extra = cycle, extra
        self._head = b""

    @property
    def is_started(self) -> bool:
        """The status is said, and can be changed no more."""
        return self._cycle.response_started

    @property
    def is_stuck(self) -> bool:
        """The client has not taken in what was sent: more must wait."""
        return self._cycle.flow.write_paused and not self._cycle.disconnected

    def start(self, status: int, headers: bytes, size_bytes: int | None = None) -> None:
        """The head, which leaves with what is written next. Without a size, the body comes in chunks.

        `headers` are as :func:`encode_headers` gives them.
        """
        cycle = self._cycle
        cycle.response_started, cycle.waiting_for_100_continue = True, False
        cycle.chunked_encoding = size_bytes is None
        length = b"transfer-encoding: chunked\r\n" if size_bytes is None else b"content-length: %d\r\n" % size_bytes
        close = b"" if cycle.keep_alive else b"connection: close\r\n"
        extra = encode_headers(self._extra) if self._extra else b""
        self._head = b"".join((STATUS_LINE[status], _default_head.of(cycle.default_headers), headers, extra, length, close, b"\r\n"))

    def write(self, body: bytes, is_last: bool) -> None:
        """The next piece of the body."""
        cycle, (head, self._head) = self._cycle, (self._head, b"")
        if cycle.disconnected or cycle.transport.is_closing():
            return
        if cycle.chunked_encoding:
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            body = chunk + b"0\r\n\r\n" if is_last else chunk
        if head or body:
            cycle.transport.write(head + body)
        if is_last:
            cycle.response_complete = True
            cycle.message_event.set()
            if not cycle.keep_alive:
                cycle.transport.close()
            cycle.on_response()

    def whole(self, status: int, body: bytes, headers: bytes) -> None:
        """A response in one piece."""
        self.start(status, headers, len(body))
        self.write(body, is_last=True)

    def break_off(self) -> None:
        """A response that cannot be completed ends with its connection, so that nobody takes it for whole."""
        self._cycle.transport.close()

    async def send(self, event: MutableMapping[str, Any]) -> None:
        """ASGI's. Raises RuntimeError for what ASGI does not allow."""
        cycle = self._cycle
        if self.is_stuck:
            await cycle.flow.drain()
        if cycle.disconnected:
            return
        is_start = event["type"] == "http.response.start"
        if is_start is cycle.response_started or cycle.response_complete:
            raise RuntimeError(f"{event['type']} came out of turn")
        if is_start:
            sizes = [int(value) for name, value in event["headers"] if name == b"content-length"]
            others = [header for header in event["headers"] if header[0] != b"content-length"]
            self.start(event["status"], encode_headers(others), sizes[0] if sizes else None)
        else:
            self.write(event.get("body", b""), is_last=not event.get("more_body", False))
