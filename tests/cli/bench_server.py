"""A scripted HTTP server for tests of the load generator: it answers each request with bytes at times that the test chooses."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

Part = tuple[float, bytes]
"""Seconds after the request, and what is written then; b"" closes the connection."""

MODELS = b'{"object": "list", "data": [{"id": "scripted", "object": "model"}]}'


@dataclass
class Asked:
    """One request that came."""

    method: str
    path: str
    body: dict[str, Any]
    connection: int


Script = Callable[[Asked], Sequence[Part]]


def whole(status: int, body: bytes, *headers: str) -> bytes:
    """A response with its length."""
    head = "\r\n".join([f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers])
    return head.encode() + b"\r\n\r\n" + body


def chunked(data: bytes) -> bytes:
    """A chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def event(**fields: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(word: str) -> bytes:
    """An event with content."""
    return event(choices=[{"index": 0, "text": word, "finish_reason": None}])


FINISH = event(choices=[{"index": 0, "text": "", "finish_reason": "length"}])


def tokens(count: int, gap_s: float = 0.0, first_s: float = 0.0) -> list[Part]:
    """A proper stream of so many tokens."""
    usage = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": count})
    parts = [(first_s, STREAM_HEAD + chunked(text(" t0")))]
    parts += [(first_s + gap_s * number, chunked(text(f" t{number}"))) for number in range(1, count)]
    return [*parts, (parts[-1][0], chunked(FINISH) + chunked(usage) + STREAM_END)]


@dataclass
class Server:
    """Listening; `asked` has what came, models and token counts aside."""

    port: int
    models: bytes = MODELS
    asked: list[Asked] = field(default_factory=list)
    num_connections: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Served(asyncio.Protocol):
    def __init__(self, server: Server, script: Script, live: set["_Served"]) -> None:
        self._server, self._script, self._live = server, script, live
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self.transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._server.num_connections += 1
        self._number = self._server.num_connections
        self._live.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._live.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.decode().split("\r\n")
        length = next((int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length")), 0)
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        method, path, _ = lines[0].split(" ")
        self._answer(Asked(method, path, json.loads(rest[:length]) if length else {}, self._number))

    def _answer(self, asked: Asked) -> None:
        if asked.path.endswith("/models"):
            self._write(whole(200, self._server.models))
            return
        self._server.asked.append(asked)
        self._play(iter(self._script(asked)), self._loop.time())

    def _play(self, parts: Iterator[Part], began: float) -> None:
        """One after the other: timers of the same millisecond come in any order."""
        for delay_s, data in parts:
            if began + delay_s > self._loop.time():
                self._timer = self._loop.call_at(began + delay_s, self._go_on, data, parts, began)
                return
            self._write(data)

    def _go_on(self, data: bytes, parts: Iterator[Part], began: float) -> None:
        self._write(data)
        self._play(parts, began)

    def _write(self, data: bytes) -> None:
        assert self.transport is not None
        if not data:
            self.transport.close()
        else:
            self.transport.write(data)


@asynccontextmanager
async def serving(script: Script, tls: ssl.SSLContext | None = None, models: bytes = MODELS) -> AsyncIterator[Server]:
    """A server on a free port of this loop."""
    loop = asyncio.get_running_loop()
    made, live = Server(0, models), set[_Served]()
    listening = await loop.create_server(lambda: _Served(made, script, live), "127.0.0.1", 0, ssl=tls)
    made.port = listening.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        listening.close()
        for one in list(live):
            assert one.transport is not None
            one.transport.abort()
        await listening.wait_closed()
