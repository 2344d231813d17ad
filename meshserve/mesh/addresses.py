"""Which addresses of this host a peer binds and advertises."""

import ipaddress
import socket
from dataclasses import dataclass

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
        """Such as `192.168.1.0/24`: who is in it needs no router in between. Empty if it is not known."""
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
    host, _, port = (text[1:].partition("]")[0], "", text.rpartition("]:")[2]) if text.startswith("[") else text.rpartition(":")
    if text.startswith("["):
        port = port if "]:" in text else ""
    elif text.count(":") != 1:
        host, port = text, ""
    if not host or (port and not (port.isdigit() and 0 < int(port) < 65_536)):
        raise UsageError(f"{text!r} is not HOST or HOST:PORT")
    return host, int(port) if port else default_port


def resolve(host: str) -> list[str]:
    """Addresses of a `--peer` by name, through the host's own resolver; an address is its own. Blocks: call it in a thread."""
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)))
    except OSError:
        return []
