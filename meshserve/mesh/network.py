"""The network around a peer: which of this host's addresses to bind and advertise, and what other hosts' ports answer."""

import asyncio
import errno
import ipaddress
import socket
import time
from dataclasses import dataclass
from enum import StrEnum

import ifaddr

from meshserve.errors import UsageError
from meshserve.wire.hello import MAX_ADDRESSES

_VIRTUAL = ("docker", "br-", "veth", "virbr", "vmnet", "vboxnet", "tun", "tap", "wg", "utun", "tailscale", "zt", "lxc", "cni", "flannel")
"""Interfaces whose addresses others often cannot reach, or that many hosts share: advertised last."""


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """One address of one interface."""

    interface: str
    address: str
    prefix: int = 0
    """Bits of its network; 0 if that is not known."""

    @property
    def network(self) -> str:
        """Such as `192.168.1.0/24`: hosts in it need no router in between. Empty if unknown."""
        return str(ipaddress.ip_network(f"{self.address}/{self.prefix}", strict=False)) if self.prefix else ""


@dataclass(frozen=True, slots=True)
class Addresses:
    """What a peer does with this host's interfaces."""

    bind_hosts: tuple[str, ...]
    """`*` is every interface, IPv4 and IPv6."""
    advertised: tuple[str, ...]
    """Best first."""
    mdns_interfaces: tuple[str, ...]
    """Where mDNS is spoken: loopback only if there is nothing else."""


def local_addresses() -> list[LocalAddress]:
    """All usable addresses: no link-local IPv6 ones, which mean nothing without the other host's scope."""
    found = []
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            parsed = ipaddress.ip_address(text.split("%")[0])
            if not (parsed.is_link_local and parsed.version == 6) and not parsed.is_multicast:
                found.append(LocalAddress(adapter.nice_name, str(parsed), ip.network_prefix))
    return found


def is_virtual(interface: str) -> bool:
    """Of a VPN, a container bridge or the like."""
    return interface.startswith(_VIRTUAL)


def _rank(local: LocalAddress) -> tuple[bool, bool, bool]:
    parsed = ipaddress.ip_address(local.address)
    return is_virtual(local.interface), parsed.is_link_local, parsed.version == 6


def choose_addresses(interface: str | None, found: list[LocalAddress]) -> Addresses:
    """What to bind and advertise. Raises UsageError for an interface that this host does not have."""
    if interface is None:
        outside = [local for local in found if not ipaddress.ip_address(local.address).is_loopback]
        chosen = sorted(outside or found, key=_rank)
        return Addresses(("*",), _texts(chosen), _texts(chosen))
    pinned = [local for local in found if interface in (local.interface, local.address)]
    if not pinned and _is_loopback(interface):
        pinned = [LocalAddress("lo", interface)]  # 127.0.0.0/8 is all there, though only one of it is listed
    if not pinned:
        names = ", ".join(sorted({local.interface for local in found})) or "none"
        raise UsageError(f"this host has no interface or address {interface!r}; its interfaces are: {names}")
    texts = _texts(sorted(pinned, key=_rank))
    return Addresses(texts, texts, texts)


def _is_loopback(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


def _texts(chosen: list[LocalAddress]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(local.address for local in chosen))[:MAX_ADDRESSES]


def parse_host_port(text: str, default_port: int) -> tuple[str, int]:
    """HOST, HOST:PORT, [IPV6] or [IPV6]:PORT; a bare IPv6 address is a host. Raises UsageError."""
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
