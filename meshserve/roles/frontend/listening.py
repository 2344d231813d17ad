"""The socket of a frontend, its certificate, and uvicorn's server without what a peer does for itself."""

import asyncio
import contextlib
import errno
import resource
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn

from meshserve.config import FrontConfig
from meshserve.errors import StartupFailed, UsageError
from meshserve.roles.frontend.connections import Connections, FrontProtocol

_BACKLOG = 2048
_SEND_BUFFER_BYTES = 256 * 1024
"""Of the kernel, per connection: left to itself it takes 4 MiB from us for a client that reads nothing."""
_FILES_IN_RESERVE = 256
"""For the mesh's own sockets, and files."""


def bind(host: str, port: int, limits: FrontConfig) -> socket.socket:
    """A listening socket; what is set on it holds for every connection. Raises StartupFailed that says what is wrong."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        what, reason = ("port", "is taken") if error.errno == errno.EADDRINUSE else ("address", "is not this host's")
        if error.errno == errno.EACCES:
            what, reason = "port", "needs rights that this user has not"
        raise StartupFailed(f"cannot listen for HTTP on {host}:{port}: the {what} {reason}; choose another with --http") from error
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: the kernel itself ends what takes nothing in, though its buffer is not full
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.write_timeout_s * 1000))
    return listening


def url_of(listening: socket.socket, is_tls: bool) -> str:
    """What clients call it."""
    host, port = listening.getsockname()[:2]
    return f"{'https' if is_tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def tls_context(limits: FrontConfig) -> ssl.SSLContext | None:
    """None without a certificate. Raises UsageError if only half of it is named, StartupFailed if it cannot be used."""
    if limits.tls_cert is None and limits.tls_key is None:
        return None
    if limits.tls_cert is None or limits.tls_key is None:
        raise UsageError("--tls-cert and --tls-key go together")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for option, path in (("--tls-cert", limits.tls_cert), ("--tls-key", limits.tls_key)):
        try:
            with open(path, "rb"):  # noqa: PTH123 - only to word what is wrong: OpenSSL does not say which file it is
                pass
        except OSError as error:
            raise StartupFailed(f"{option} {path}: {error.strerror}") from error
    try:
        context.load_cert_chain(limits.tls_cert, limits.tls_key, password="")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "not PEM, or encrypted"
        raise StartupFailed(f"--tls-cert {limits.tls_cert}, --tls-key {limits.tls_key}: cannot be used together: {reason}") from error
    return context


def possible_connections(wanted: int) -> int:
    """How many this process may have open: it asks for as many files as that takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _FILES_IN_RESERVE
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _FILES_IN_RESERVE))


class Server(uvicorn.Server):
    """uvicorn with connections of our own, and without its signal handlers: signals are the peer's business."""

    def __init__(self, application: Any, connections: Connections, context: ssl.SSLContext | None) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                http=FrontProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )
        self._connections, self._context = connections, context

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on the one socket there is. uvicorn's own gives a client that says nothing a minute to agree on TLS."""
        assert sockets is not None

        def connect() -> asyncio.Protocol:
            return FrontProtocol(self._connections, config=self.config, server_state=self.server_state, app_state={})

        limits = self._connections.limits
        tls: dict[str, Any] = {"ssl": self._context}
        if self._context is not None:
            tls |= {"ssl_handshake_timeout": limits.header_timeout_s, "ssl_shutdown_timeout": limits.linger_s}
        self.servers = [
            await asyncio.get_running_loop().create_server(connect, sock=listening, backlog=_BACKLOG, **tls) for listening in sockets
        ]
        self.started = True
