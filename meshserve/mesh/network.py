"""Other hosts, as a peer reaches them: their names and addresses, and what their ports answer."""

import asyncio
import errno
import socket
import time
from dataclasses import dataclass
from enum import StrEnum

from meshserve.errors import UsageError


def parse_host_port(text: str, default_port: int) -> tuple[str, int]:
    """HOST, HOST:PORT, [IPV6] or [IPV6]:PORT, as the ready line prints it too, with `tcp://`; a bare IPv6 address is a host.

    Raises UsageError.
    """
    text = text.removeprefix("tcp://")
    host, port = text, ""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not host or (port and not (port.isdigit() and 0 < int(port) < 65_536)):
        raise UsageError(f"{text!r} is not HOST or HOST:PORT")
    return host, int(port) if port else default_port


def resolve(host: str) -> list[str]:
    """Addresses of a `--peer` by name, through the host's own resolver; an address is its own. Blocks: call it in a thread."""
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)))
    except OSError:
        return []


# --- knocking on ports: what a connection attempt says, for people who look for a fault


class Outcome(StrEnum):
    """Of one attempt to connect."""

    OPEN = "open"
    REFUSED = "refused"
    """The host answers that nothing listens there."""
    TIMEOUT = "timeout"
    """No answer at all: something drops the packets, or no host has this address."""
    UNREACHABLE = "unreachable"
    """A host on the way, or this one, says that there is no way; or a firewall does."""
    RESET = "reset"
    """It was accepted, then cut."""
    FORBIDDEN = "forbidden"
    """This host's own firewall does not let it out."""


_BY_ERRNO = {
    errno.ECONNREFUSED: Outcome.REFUSED,
    errno.ETIMEDOUT: Outcome.TIMEOUT,
    errno.ECONNRESET: Outcome.RESET,
    errno.EPERM: Outcome.FORBIDDEN,
    errno.EACCES: Outcome.FORBIDDEN,
}

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f\x03"
"""ZMTP 3's first eleven bytes (RFC 23): enough for the other side to send its whole greeting, and no handshake yet."""
_GREETING_BYTES = 64


@dataclass(frozen=True, slots=True)
class Knock:
    """What one attempt met."""

    outcome: Outcome
    took_ms: float
    reason: str = ""
    """Why it did not open, for people, to follow the address."""


async def knock(host: str, port: int, timeout_s: float) -> Knock:
    """Connect and hang up."""
    began_s, outcome, reason = time.monotonic(), Outcome.OPEN, ""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
        writer.transport.abort()
    except TimeoutError:
        outcome, reason = Outcome.TIMEOUT, " does not answer"
    except OSError as error:
        outcome = _BY_ERRNO.get(error.errno or 0, Outcome.UNREACHABLE)
        reason = f": {error.strerror or errno.errorcode.get(error.errno or 0, 'cannot connect')}"
    except ValueError:  # hearsay that is no address: a label of a name is too long, say
        outcome, reason = Outcome.UNREACHABLE, ": no address"
    return Knock(outcome, (time.monotonic() - began_s) * 1000, reason)


async def security_of(host: str, port: int, timeout_s: float) -> str | None:
    """`CURVE` if a ZeroMQ socket with keys listens there, `NULL` if one without; None if it is no ZeroMQ socket, or does not answer."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(_SIGNATURE)
                greeting = await reader.readexactly(_GREETING_BYTES)
            finally:
                writer.transport.abort()
    except (OSError, asyncio.IncompleteReadError):
        return None
    if greeting[0] != 0xFF or greeting[9] != 0x7F:
        return None
    return greeting[12:32].rstrip(b"\0").decode("ascii", errors="replace")
