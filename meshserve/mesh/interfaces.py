"""This host's interfaces and addresses: what a peer binds and advertises, in which order it dials others, and word of changes.

On Linux the kernel is asked over netlink (rtnetlink(7)), which alone tells an interface's kind and whether an IPv6
address is still being tested for duplicates. pyroute2 would do the same; it was tried and left out: its asynchronous
side cannot run on uvloop, its other side cannot run within an event loop, and it costs each peer 13 MB and a
quarter of a second. Elsewhere ifaddr is asked once a second.
"""

import asyncio
import contextlib
import ipaddress
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import ifaddr

from meshserve.errors import UsageError
from meshserve.wire.hello import MAX_ADDRESSES

POLL_S = 1.0
"""Between two looks at the addresses where the kernel does not tell of changes."""
_SETTLE_S = 0.05
"""From the first word of a change to the look: one change of a network is many messages."""
_MAX_MDNS_INTERFACES = 64


class InterfaceKind(IntEnum):
    """What an interface leads to, best first."""

    LAN = 0
    """Ethernet, Wi-Fi, or what stands for them in a container or a virtual machine."""
    VIRTUAL = 1
    """A network of containers or virtual machines within this host: many hosts have the same addresses there."""
    TUNNEL = 2
    """A VPN: slower than the LAN that it runs over."""
    LOOPBACK = 3


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """One address of one interface."""

    interface: str
    address: str
    prefix: int = 0
    """Bits of its network; 0 if that is not known."""
    kind: InterfaceKind = InterfaceKind.LAN
    has_carrier: bool = True
    """Whether the cable is in, or the Wi-Fi is joined."""

    @property
    def network(self) -> str:
        """Such as `192.168.1.0/24`: hosts in it need no router in between. Empty if unknown."""
        return str(ipaddress.ip_network(f"{self.address}/{self.prefix}", strict=False)) if self.prefix else ""

    @property
    def is_link_local6(self) -> bool:
        """An fe80 address: it leads to a host only with the name of the interface behind which that host is."""
        return self.address.startswith("fe80:")


# --- what there is


def local_addresses() -> list[LocalAddress]:
    """All usable addresses of this host. Those that are still tested for duplicates are not usable yet."""
    return list(_from_kernel()) if sys.platform == "linux" else list(_from_ifaddr())


def without_spare(found: Iterable[LocalAddress]) -> list[LocalAddress]:
    """Without the fe80 addresses of interfaces that have others, which lead to the same hosts with less trouble."""
    all_found = list(found)
    others = {local.interface for local in all_found if not local.is_link_local6}
    return [local for local in all_found if not (local.is_link_local6 and local.interface in others)]


def interface_names() -> list[str]:
    """All interfaces, also those that have no address."""
    return [name for _, name in socket.if_nameindex()]


_GET_LINK, _NEW_LINK, _GET_ADDRESS, _NEW_ADDRESS = 18, 16, 22, 20
_DONE, _ERROR = 3, 2
_DUMP_REQUEST = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_HEADER, _LINK, _ADDRESS, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BxHiII"), struct.Struct("=BBBBI"), struct.Struct("=HH")
_IS_UP, _IS_LOOPBACK, _IS_POINT_TO_POINT, _HAS_CARRIER = 0x1, 0x8, 0x10, 0x10000
_IS_TENTATIVE_OR_DUPLICATE = 0x40 | 0x08
_ETHERNET_TYPES = (1, 772)
_TUNNEL_KINDS = ("tun", "wireguard", "ppp", "ipip", "gre", "gretap", "sit", "vti", "xfrm", "ip6tnl")
_VIRTUAL_KINDS = ("dummy", "vxlan", "geneve", "ifb", "nlmon")
_NOTICES = 0x1 | 0x10 | 0x100  # RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR


@dataclass(slots=True)
class _Link:
    name: str
    kind: str
    flags: int
    hardware_type: int
    bridge: int


def _from_kernel() -> Iterator[LocalAddress]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(2.0)
        links = dict(map(_parse_link, _dump(kernel, _GET_LINK, _NEW_LINK)))
        for body in _dump(kernel, _GET_ADDRESS, _NEW_ADDRESS):
            _, prefix, flags, _, index = _ADDRESS.unpack_from(body)
            found = dict(_attributes(body[_ADDRESS.size :]))
            packed = found.get(2) or found.get(1)  # IFA_LOCAL; IFA_ADDRESS, which is the other end's on a point-to-point link
            flags = int.from_bytes(found[8], sys.byteorder) if 8 in found else flags
            link = links.get(index)
            if packed is None or link is None or flags & _IS_TENTATIVE_OR_DUPLICATE or not link.flags & _IS_UP:
                continue
            yield LocalAddress(link.name, str(ipaddress.ip_address(packed)), prefix, _kind(index, links), bool(link.flags & _HAS_CARRIER))


def _dump(kernel: socket.socket, request: int, answer: int) -> Iterator[bytes]:
    """The bodies of the kernel's answers to a request for all links, or all addresses. Raises OSError."""
    kernel.send(_HEADER.pack(_HEADER.size + _LINK.size, request, _DUMP_REQUEST, request, 0) + bytes(_LINK.size))
    while True:
        data = kernel.recv(1 << 18)
        while len(data) >= _HEADER.size:
            length, kind, *_ = _HEADER.unpack_from(data)
            if kind == _DONE:
                return
            if kind == _ERROR:
                raise OSError("the kernel does not list this host's interfaces")
            if kind == answer:
                yield data[_HEADER.size : length]
            data = data[-(-length // 4) * 4 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & 0x3FFF, data[_ATTRIBUTE.size : length]
        data = data[max(4, -(-length // 4) * 4) :]


def _parse_link(body: bytes) -> tuple[int, _Link]:
    _, hardware_type, index, flags, _ = _LINK.unpack_from(body)
    found = dict(_attributes(body[_LINK.size :]))
    kind = dict(_attributes(found.get(18, b""))).get(1, b"")  # IFLA_LINKINFO, IFLA_INFO_KIND: empty for hardware
    name, bridge = found.get(3, b"?"), int.from_bytes(found.get(10, b""), sys.byteorder)  # IFLA_IFNAME, IFLA_MASTER
    return index, _Link(_text(name), _text(kind), flags, hardware_type, bridge)


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _kind(index: int, links: dict[int, _Link]) -> InterfaceKind:
    """By what the interface is, never by its name, which anybody chooses."""
    link = links[index]
    if link.flags & _IS_LOOPBACK:
        return InterfaceKind.LOOPBACK
    if link.kind in _TUNNEL_KINDS or link.flags & _IS_POINT_TO_POINT or link.hardware_type not in _ETHERNET_TYPES:
        return InterfaceKind.TUNNEL
    # a bridge stands for the LAN if hardware is plugged into it, and for containers or virtual machines otherwise
    is_inner_bridge = link.kind == "bridge" and all(port.kind for port in links.values() if port.bridge == index)
    return InterfaceKind.VIRTUAL if is_inner_bridge or link.kind in _VIRTUAL_KINDS else InterfaceKind.LAN


_TUNNEL_NAMES, _VIRTUAL_NAMES = ("utun", "tun", "tap", "ppp", "ipsec", "wg", "zt"), ("bridge", "vmnet", "vboxnet", "vmenet")


def _from_ifaddr() -> Iterator[LocalAddress]:
    """Where there is no netlink. Names are the systems' own there, so that they tell the kind."""
    for adapter in ifaddr.get_adapters():
        addresses = [ipaddress.ip_address((ip.ip if isinstance(ip.ip, str) else ip.ip[0]).split("%")[0]) for ip in adapter.ips]
        is_loopback = any(address.is_loopback for address in addresses)  # which may have an fe80 address besides
        for ip, parsed in zip(adapter.ips, addresses, strict=True):
            kind = InterfaceKind.LOOPBACK if is_loopback else InterfaceKind.LAN
            kind = InterfaceKind.TUNNEL if adapter.nice_name.startswith(_TUNNEL_NAMES) else kind
            kind = InterfaceKind.VIRTUAL if adapter.nice_name.startswith(_VIRTUAL_NAMES) else kind
            yield LocalAddress(adapter.nice_name, str(parsed), ip.network_prefix, kind)


# --- what to do with them

_LOOPBACK = LocalAddress("lo", "127.0.0.1", 8, InterfaceKind.LOOPBACK)


@dataclass(frozen=True, slots=True)
class Addresses:
    """What a peer does with this host's interfaces."""

    bind_hosts: tuple[str, ...]
    """`*` is every interface, IPv4 and IPv6."""
    advertised: tuple[str, ...]
    """Best first; those of the loopback while this host is in no network."""
    mdns_interfaces: tuple[str, ...]
    """Where mDNS is spoken."""
    local: tuple[LocalAddress, ...]
    """All that was found, whatever was chosen."""


def choose_addresses(interface: str | None, found: Iterable[LocalAddress], names: Iterable[str] = ()) -> Addresses:
    """What to bind and advertise. `names` are interfaces that may get their addresses later.

    Raises UsageError for an interface that this host does not have.
    """
    local = tuple(found)
    if interface is None:
        chosen = [one for one in local if one.kind is not InterfaceKind.LOOPBACK] or list(local) or [_LOOPBACK]
        return Addresses(("*",), _advertised(chosen), _speaking(chosen), local)
    pinned = [one for one in local if interface in (one.interface, one.address)]
    if not pinned and _is_loopback(interface):
        pinned = [LocalAddress("lo", interface, kind=InterfaceKind.LOOPBACK)]  # 127.0.0.0/8 is all there, though only one of it is listed
    if not pinned and interface not in names:
        known = ", ".join(sorted({one.interface for one in local} | set(names))) or "none"
        raise UsageError(f"this host has no interface or address {interface!r}; its interfaces are: {known}")
    pinned = pinned or [_LOOPBACK]  # until its address comes
    bound = tuple(f"{one.address}%{one.interface}" if one.is_link_local6 else one.address for one in sorted(pinned, key=_rank))
    return Addresses(bound, _advertised(pinned), _speaking(pinned), local)


def _rank(local: LocalAddress) -> tuple[bool, InterfaceKind, bool, bool, bool]:
    parsed = ipaddress.ip_address(local.address)
    return local.is_link_local6, local.kind, not local.has_carrier, parsed.is_link_local or not parsed.is_private, parsed.version == 6


def _advertised(chosen: list[LocalAddress]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(local.address for local in sorted(without_spare(chosen), key=_rank)))[:MAX_ADDRESSES]


def _speaking(chosen: list[LocalAddress]) -> tuple[str, ...]:
    """Every IPv4 address, and one IPv6 address of each interface: the link-local one, which is there whatever the others become."""
    ordered = sorted(chosen, key=_rank)
    by_interface6 = {local.interface: local.address for local in ordered if ":" in local.address}
    addresses4 = [local.address for local in ordered if ":" not in local.address]
    return tuple(dict.fromkeys((*addresses4, *by_interface6.values())))[:_MAX_MDNS_INTERFACES]


def _is_loopback(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(text).is_loopback
    return False


def dialling_order(addresses: Iterable[str], local: Iterable[LocalAddress]) -> tuple[str, ...]:
    """A peer's addresses, those first that this host most likely reaches, and by the shortest way.

    A peer of this very host is dialled over the loopback, which stays when addresses change. Of another host, first those
    in a LAN that this host is in too, then private ones, then the rest; last those in a VPN or in a network of containers
    here, where the same address may be this very host's. Otherwise the peer's own order stays. An fe80 address is tried
    behind each interface that has one.
    """
    told, found = list(addresses), list(local)
    networks = [(ipaddress.ip_network(one.network), one.kind) for one in found if one.network]
    if not {one.address for one in found if one.kind is InterfaceKind.LAN}.isdisjoint(told):
        told.insert(0, "127.0.0.1")
    scopes = [one.interface for one in found if one.is_link_local6 and one.kind in (InterfaceKind.LAN, InterfaceKind.VIRTUAL)]
    ranked: list[tuple[int, str]] = []
    for text in told:
        address = _parsed(text)
        if address is None:
            ranked.append((2, text))  # a name
        elif address.version == 6 and address.is_link_local and "%" not in text:
            ranked += [(3, f"{text}%{scope}") for scope in dict.fromkeys(scopes)]
        else:
            kinds = [kind for network, kind in networks if address in network]
            unshared = 1 if address.is_private and not address.is_link_local else 2
            ranked.append((unshared if not kinds else 0 if InterfaceKind.LAN in kinds or InterfaceKind.LOOPBACK in kinds else 4, text))
    return tuple(dict.fromkeys(text for _, text in sorted(ranked, key=lambda item: item[0])))


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


# --- word of changes


class AddressWatch:
    """Calls `on_change` after this host's interfaces or addresses changed, until `close`; again a second later where it
    raises OSError, as without descriptors. Calls it soon after the start as well: the addresses that the caller read before
    may have changed before the watch began."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._kernel: socket.socket | None = None
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                self._kernel = self._listen()
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(_SETTLE_S, self._look if self._kernel is not None else self._poll)

    def _listen(self) -> socket.socket:
        kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        kernel.bind((0, _NOTICES))
        self._loop.add_reader(kernel, self._on_notice)
        return kernel

    def _on_notice(self) -> None:
        """Something changed; what it is the next look tells, so that a notice that was lost costs nothing."""
        assert self._kernel is not None
        with contextlib.suppress(OSError):  # nothing more to read; or notices were lost, which is a change as well
            while self._kernel.recv(1 << 16):
                pass
        if self._timer is None:
            self._timer = self._loop.call_later(_SETTLE_S, self._look)

    def _look(self) -> None:
        self._timer = None
        try:
            self._on_change()
        except OSError:
            self._timer = self._loop.call_later(POLL_S, self._look)

    def _poll(self) -> None:
        self._timer = self._loop.call_later(POLL_S, self._poll)
        with contextlib.suppress(OSError):
            self._on_change()

    def close(self) -> None:
        """Stop watching."""
        if self._timer is not None:
            self._timer.cancel()
        if self._kernel is not None:
            self._loop.remove_reader(self._kernel)
            self._kernel.close()
            self._kernel = None  # a mesh may be closed twice
