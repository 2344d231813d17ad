"""HTTP/1.1 client for load: httptools' parser, one protocol object a connection, no tasks.

Measured before writing it (one-token answers from a server that does nothing else, p50 with one
client): wrk 17 us, this 16 us, aiohttp 3.14 66 us; with 32 clients 42,000 requests a second,
aiohttp 9,100. The client's own time counts as the server's latency, so aiohttp misses the 5 % in
which a benchmark must agree with wrk.
"""

import asyncio
import contextlib
import errno
import resource
import ssl
import time
from collections import deque
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from meshserve.cli.bench.requests import PATHS
from meshserve.errors import UsageError

CONNECT_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 2.0
_MAX_FILES = 1 << 20


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections go."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None


def parse_url(url: str, is_checking_certificates: bool = True) -> tuple[Origin, str, str]:
    """The origin, the `host` header, and the path before `/v1/...`. Raises UsageError."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    is_http = parts.scheme in ("http", "https")
    if not is_http or not parts.hostname or port == -1 or parts.query:
        raise UsageError(f"{url!r} is no URL of a server: http://HOST:PORT")
    if "@" in parts.netloc:
        raise UsageError("no name or password in a URL, as it is shown with the figures: --api-key")
    tls = None
    if parts.scheme == "https":
        tls = ssl.create_default_context()
        if not is_checking_certificates:
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    base = parts.path.rstrip("/")
    for ending in (*PATHS.values(), "/v1"):
        base = base.removesuffix(ending)
    return Origin(parts.hostname, port or (443 if tls else 80), tls), parts.netloc, base


def request_head(method: str, host: str, path: str, api_key: str | None = None) -> bytes:
    """The head of a request up to the value of `content-length`, which is the last header."""
    lines = [
        f"{method} {path} HTTP/1.1",
        f"host: {host}",
        "user-agent: meshserve",
        "content-type: application/json",
    ]
    if api_key:
        lines.append(f"authorization: Bearer {api_key}")
    return "\r\n".join([*lines, "content-length: "]).encode()


def with_body(head: bytes, body: bytes) -> bytes:
    """A whole request, of a head of :func:`request_head`."""
    return b"%b%d\r\n\r\n%b" % (head, len(body), body)


class Reply:
    """A response as it comes; subclasses say what follows. `complete` or `failed` comes last."""

    __slots__ = ("connection", "is_cancelled", "parts", "status")

    def __init__(self) -> None:
        self.status = 0
        self.parts: list[bytes] = []
        """Of the body."""
        self.connection: Connection | None = None
        """The connection that is busy with this reply."""
        self.is_cancelled = False

    def sent(self, now_s: float) -> None:
        """The request was given to the connection's socket."""

    def body(self, now_s: float, data: bytes) -> None:
        """A piece of the body came."""
        self.parts.append(data)

    def complete(self, now_s: float) -> None:
        """The response ended as it should."""

    def failed(self, now_s: float, kind: str) -> None:
        """There will be no whole response."""

    def cancel(self) -> None:
        """Close the connection and call nothing more; if there is none yet, once there is."""
        self.is_cancelled = True
        if self.connection is not None:
            self.connection.discard()


class WaitedReply(Reply):
    """A reply for one who waits."""

    __slots__ = ("ended",)

    def __init__(self) -> None:
        super().__init__()
        self.ended: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        """When the response was complete, by time.monotonic; ConnectionError if it failed."""

    def complete(self, now_s: float) -> None:
        if not self.ended.done():
            self.ended.set_result(now_s)

    def failed(self, now_s: float, kind: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(kind))


class Connection(asyncio.Protocol):
    """One response at a time.

    The parser's callbacks only note what came; what follows from it is done after each read.
    """

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._reply: Reply | None = None
        self._request = b""
        self._now_s = 0.0
        self._num_served = 0
        self._is_answered = self._is_complete = self._has_length = False
        self._is_reusable = False

    def send(self, request: bytes, reply: Reply) -> None:
        """Ask, if no other reply is under way."""
        assert self._transport is not None and self._reply is None
        self._reply, self._request = reply, request
        self._is_answered = self._is_complete = self._has_length = False
        reply.connection = self
        if reply.is_cancelled:
            self.discard()
            return
        self._transport.write(request)
        reply.sent(time.monotonic())

    def discard(self) -> None:
        """Close, and call nothing of the reply any more."""
        self._take_reply()
        if self._transport is not None:
            self._transport.abort()

    def _take_reply(self) -> Reply | None:
        reply, self._reply = self._reply, None
        if reply is not None:
            reply.connection = None
        return reply

    @property
    def is_usable(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    # --- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transport is one by what it does, not by its class
        self._transport = cast(asyncio.Transport, transport)
        self._pool.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._now_s = time.monotonic()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            reply = self._take_reply()
            self.discard()
            if reply is not None:
                reply.failed(self._now_s, "malformed response")
            return
        if self._is_complete:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.connections.discard(self)
        reply = self._take_reply()
        if reply is None:
            return
        now_s = time.monotonic()
        if self._is_answered and not self._has_length and exc is None:
            # RFC 9112, section 6.3: without a length, the body ends with the connection
            reply.complete(now_s)
        elif not self._is_answered and self._num_served:
            # RFC 9112, section 9.3.1: the server closed an idle connection while the request was
            # on its way to it
            self._pool.num_repeated += 1
            self._pool.start(self._request, reply)
        else:
            reply.failed(now_s, "connection closed")

    # --- httptools

    def on_message_begin(self) -> None:
        self._is_complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and self._reply is not None:
            self._is_answered = True
            self._reply.status = status

    def on_body(self, body: bytes) -> None:
        if self._reply is not None:
            self._reply.body(self._now_s, body)

    def on_message_complete(self) -> None:
        self._is_complete = self._is_answered
        # the parser no longer knows once it is done
        self._is_reusable = self._parser.should_keep_alive()

    def _finish(self) -> None:
        reply = self._take_reply()
        self._num_served += 1
        if self._is_reusable and self.is_usable:
            self._pool.idle.append(self)
        elif self._transport is not None:
            self._transport.close()
        if reply is not None:
            reply.complete(self._now_s)


class Pool:
    """Connections to one origin, the last used first: as many as there are requests under way."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._loop = asyncio.get_running_loop()
        self.idle: deque[Connection] = deque()
        self.connections: set[Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self.num_repeated = 0
        """Requests sent again because their connection had been closed while it was idle."""

    def start(self, request: bytes, reply: Reply) -> None:
        """Send on an idle connection, or on a new one."""
        while self.idle:
            connection = self.idle.pop()
            if connection.is_usable:
                connection.send(request, reply)
                return
        task = self._loop.create_task(self._connect(request, reply))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def ask(self, request: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Status and body. Raises TimeoutError, or ConnectionError that says what failed."""
        reply = WaitedReply()
        self.start(request, reply)
        async with asyncio.timeout(timeout_s):
            await reply.ended
        return reply.status, b"".join(reply.parts)

    async def _connect(self, request: bytes, reply: Reply) -> None:
        origin = self._origin
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await self._loop.create_connection(
                    lambda: Connection(self), origin.host, origin.port, ssl=origin.tls
                )
        except TimeoutError:
            reply.failed(time.monotonic(), "connect: timeout")
        except ssl.SSLError as error:
            reply.failed(time.monotonic(), f"connect: TLS: {error.reason or error}")
        except OSError as error:
            reply.failed(time.monotonic(), f"connect: {_reason(error)}")
        else:
            if connection.is_usable:
                connection.send(request, reply)
            else:
                reply.failed(time.monotonic(), "connection closed")

    async def close(self) -> None:
        """Close all connections; nothing of a reply under way is called any more."""
        for task in list(self._connecting):
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        for connection in list(self.connections):
            connection.discard()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                while self.connections:
                    await asyncio.sleep(0)


def raise_file_limit() -> None:
    """Allow as many connections as the system does: by default it is often a thousand."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_FILES if hard == resource.RLIM_INFINITY else hard
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _reason(error: OSError) -> str:
    if error.errno == errno.EMFILE:
        return "too many open files here, see ulimit -n"
    return (error.strerror or str(error) or type(error).__name__).lower().split(" ('")[0]
