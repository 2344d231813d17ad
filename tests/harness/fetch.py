"""HTTP from inside a network namespace: plain requests, streamed lines, and an asynchronous client for many at once."""

import asyncio
import contextlib
import http.client
import json
import select
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpcore
import httpx

from tests.harness.namespaces import inside


class Response(NamedTuple):
    """An HTTP response, read to its end. Header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)


def connect(netns: str, host: str, port: int, timeout_s: float = 60.0) -> socket.socket:
    """Open a TCP connection from inside the namespace `netns`.

    Raises:
        OSError: nobody answered, or refused.
    """
    return inside(netns, lambda: socket.create_connection((host, port), timeout_s))


@contextlib.contextmanager
def open_response(
    netns: str, method: str, url: str, body: Any, headers: Mapping[str, str] | None, timeout_s: float
) -> Iterator[http.client.HTTPResponse]:
    """Send one request from inside `netns` (a `body` other than bytes goes as JSON) and yield its response, still unread.

    Raises:
        OSError: no connection, or silence for `timeout_s` seconds.
    """
    parts = urlsplit(url)
    assert parts.scheme == "http" and parts.hostname, f"not an http:// address: {url}"
    port = parts.port or 80
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    payload = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"content-type": "application/json"} if payload is not None else {}
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=timeout_s)
    with contextlib.closing(connection):
        connection.sock = connect(netns, parts.hostname, port, timeout_s)
        connection.request(method, target, payload, {**kind, **(headers or {})})
        with connection.getresponse() as response:
            yield response


def request(netns: str, method: str, url: str, body: Any, headers: Mapping[str, str] | None, timeout_s: float) -> Response:
    """Send one request from inside `netns` and return the whole response, whatever its status.

    Raises:
        OSError: no connection, or silence for `timeout_s` seconds.
    """
    with open_response(netns, method, url, body, headers, timeout_s) as response:
        named = {name.lower(): value for name, value in response.getheaders()}
        return Response(response.status, named, response.read())


@contextlib.contextmanager
def stream(netns: str, method: str, url: str, body: Any, headers: Mapping[str, str] | None, timeout_s: float) -> Iterator[Iterator[str]]:
    """Send one request from inside `netns` and yield the lines of its response as they arrive; leaving it hangs up.

    Raises:
        OSError: no connection, or silence for `timeout_s` seconds.
    """
    with open_response(netns, method, url, body, headers, timeout_s) as response:
        yield (line.decode().rstrip("\r\n") for line in response)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - the base class's signature
        with httpcore_errors(httpcore.ReadTimeout, httpcore.ReadError):
            async with asyncio.timeout(timeout):
                return await self._reader.read(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - the base class's signature
        with httpcore_errors(httpcore.WriteTimeout, httpcore.WriteError):
            async with asyncio.timeout(timeout):
                self._writer.write(buffer)
                await self._writer.drain()

    async def aclose(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def get_extra_info(self, info: str) -> Any:
        # a pooled connection that has become readable is one that the server has closed, whether or not the loop has seen it yet
        return self._reader.at_eof() or self._can_read_nowait() if info == "is_readable" else None

    def _can_read_nowait(self) -> bool:
        poller = select.poll()
        poller.register(self._writer.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poller.poll(0))


class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self, netns: str) -> None:
        self._netns = netns

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the base class's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        with httpcore_errors(httpcore.ConnectTimeout, httpcore.ConnectError):
            async with asyncio.timeout(timeout):
                connection = await self._connect(host, port)
                return _Stream(*await asyncio.open_connection(sock=connection))

    async def _connect(self, host: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = inside(self._netns, lambda: socket.socket(family))
        made.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(made, (host, port))
        except BaseException:
            made.close()
            raise
        return made


@contextlib.contextmanager
def httpcore_errors(on_timeout: type[Exception], on_failure: type[Exception]) -> Iterator[None]:
    """Translate the event loop's errors to those that httpcore promises its callers."""
    try:
        yield
    except TimeoutError as error:
        raise on_timeout(str(error)) from error
    except OSError as error:
        raise on_failure(str(error)) from error


class NamespaceTransport(httpx.AsyncHTTPTransport):
    """A transport for `httpx.AsyncClient` whose connections are made inside a namespace."""

    def __init__(self, netns: str) -> None:
        """Connect from inside `netns`, with no bound on the number of connections."""
        super().__init__()
        # httpx offers no argument for it, and its own pool has opened nothing yet
        self._pool = httpcore.AsyncConnectionPool(
            max_connections=None, max_keepalive_connections=100, keepalive_expiry=5.0, network_backend=_Backend(netns)
        )


def async_client(netns: str, timeout_s: float) -> httpx.AsyncClient:
    """Return a client whose connections are made inside `netns`; `timeout_s` bounds each silence. Use it with `async with`."""
    return httpx.AsyncClient(transport=NamespaceTransport(netns), timeout=timeout_s, trust_env=False)


Lines = AbstractContextManager[Iterator[str]]
