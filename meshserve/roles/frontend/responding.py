"""The answers of the routes that every token passes, written with as little ado as HTTP needs.

uvicorn's own `send` looks at each header with two patterns and writes the head apart from the body. Here the head leaves with what follows
it, in one write. Flow control, keep-alive and pipelining are uvicorn's: its cycle is told all that it needs to know.
"""

import re
from collections.abc import MutableMapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from meshserve.roles.frontend.asgi import Scope, Send
from meshserve.roles.frontend.connections import CYCLE

_FORBIDDEN = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
"""In the values of headers: a client's own id comes back in one."""


def responder(scope: Scope, send: Send) -> Send:
    """For a request by POST: `send` itself if somebody stands before it who changes what is sent."""
    cycle: RequestResponseCycle = scope[CYCLE]
    return Responder(cycle) if send == cycle.send else send


class Responder:
    """ASGI's `send` for one request. What comes after a disconnect is dropped."""

    __slots__ = ("_cycle", "_head")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._head = b""

    async def __call__(self, event: MutableMapping[str, Any]) -> None:
        """Raises RuntimeError for what ASGI does not allow."""
        cycle = self._cycle
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if cycle.disconnected:
            return
        is_start = event["type"] == "http.response.start"
        if is_start is cycle.response_started or cycle.response_complete:
            raise RuntimeError(f"{event['type']} came out of turn")
        if is_start:
            self._begin(event)
        else:
            self._write(event.get("body", b""), is_last=not event.get("more_body", False))

    def _begin(self, event: MutableMapping[str, Any]) -> None:
        cycle, headers = self._cycle, [*self._cycle.default_headers, *event["headers"]]
        if _FORBIDDEN.search(b"".join([value for _, value in headers])):
            raise RuntimeError("a header with a control character")
        lines = [b"%b: %b\r\n" % header for header in headers]
        cycle.response_started, cycle.waiting_for_100_continue = True, False
        cycle.chunked_encoding = not any(name == b"content-length" for name, _ in headers)
        if cycle.chunked_encoding:
            lines.append(b"transfer-encoding: chunked\r\n")
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        self._head = b"".join([STATUS_LINE[event["status"]], *lines, b"\r\n"])

    def _write(self, body: bytes, is_last: bool) -> None:
        cycle, (head, self._head) = self._cycle, (self._head, b"")
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
