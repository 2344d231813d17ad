"""Knocking on ports: what a connection attempt says, for people who look for a fault."""

import asyncio
import errno
import time
from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """Of one attempt to connect."""

    OPEN = "open"
    REFUSED = "refused"
    """The host answers that nobody listens there."""
    TIMEOUT = "timeout"
    """No answer at all: something swallows the packets, or nobody has this address."""
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


async def knock(host: str, port: int, timeout_s: float) -> Knock:
    """Connect and hang up."""
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
        writer.transport.abort()
        outcome = Outcome.OPEN
    except TimeoutError:
        outcome = Outcome.TIMEOUT
    except OSError as error:
        outcome = _BY_ERRNO.get(error.errno or 0, Outcome.UNREACHABLE)
    except ValueError:  # hearsay that is no address: a label of a name is too long, say
        outcome = Outcome.UNREACHABLE
    return Knock(outcome, (time.monotonic() - began_s) * 1000)


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
