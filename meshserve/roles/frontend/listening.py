"""The listening socket of a frontend, its certificate, and how many connections its process may have."""

import contextlib
import errno
import resource
import socket
import ssl

from meshserve.config import FrontendConfig
from meshserve.errors import StartupFailed, UsageError

BACKLOG = 2048
_SEND_BUFFER_BYTES = 256 * 1024
"""Of the kernel, per connection: left to itself it takes 4 MiB from us for a client that reads nothing."""
_FILES_IN_RESERVE = 256
"""For the mesh's own sockets, and files."""


def bind(host: str, port: int, limits: FrontendConfig) -> socket.socket:
    """A listening socket; what is set on it holds for every connection. Raises StartupFailed that says what is wrong.

    An empty host is all addresses, and `::` too, of both families.
    """
    try:
        listening = _listening(host, port)
    except OSError as error:
        what, reason = ("port", "is taken") if error.errno == errno.EADDRINUSE else ("address", "is not this host's")
        if error.errno == errno.EACCES:
            what, reason = "port", "needs rights that this user has not"
        raise StartupFailed(f"cannot listen for HTTP on {host}:{port}: the {what} {reason}; choose another with --http") from error
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: the kernel itself ends what takes nothing in, though its buffer is not full
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.write_timeout_s * 1000))
    return listening


def _listening(host: str, port: int) -> socket.socket:
    """Where this machine has no IPv6, an empty host is all addresses of IPv4."""
    if host in ("", "::") and socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def url_of(listening: socket.socket, is_tls: bool) -> str:
    """What clients call it."""
    host, port = listening.getsockname()[:2]
    return f"{'https' if is_tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def tls_context(limits: FrontendConfig) -> ssl.SSLContext | None:
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
