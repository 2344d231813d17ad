"""Asks one question by multicast on every interface, and notes who is heard: what the network lets through, mesh or not."""

import asyncio
import contextlib
import ipaddress
import secrets
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from meshserve.mesh.interfaces import InterfaceKind, LocalAddress
from meshserve.observe.diagnosis.facts import Multicast, is_within

_GROUPS, _PORT = {4: "224.0.0.251", 6: "ff02::fb"}, 5353
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_NAMES = ("_meshserve._tcp.local", "_services._dns-sd._udp.local")
"""The second is answered by nearly everything that speaks mDNS (RFC 6763, section 9): printers, phones, televisions."""
_PTR, _IN = 12, 1
_ASK_AGAIN_S = 0.5


def question() -> bytes:
    """An mDNS question (RFC 6762) with an id of our own, by which we know it again."""
    names = [b"".join(bytes((len(label),)) + label.encode() for label in name.split(".")) + b"\0" for name in _NAMES]
    header = struct.pack("!HHHHHH", secrets.randbits(16), 0, len(names), 0, 0, 0)
    return header + b"".join(name + struct.pack("!HH", _PTR, _IN) for name in names)


class _Ear(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.heard: list[tuple[bytes, str, int]] = []
        """Payload, sender, and the number of the interface; 0 where the system does not tell it."""

    def datagram_received(self, data: bytes, address: tuple[Any, ...]) -> None:
        if len(self.heard) < 10_000:
            self.heard.append((data, address[0].partition("%")[0], address[3] if len(address) > 3 else 0))

    def error_received(self, error: Exception) -> None:
        """The sending socket reports the error."""


_INNER = (InterfaceKind.VIRTUAL, InterfaceKind.TUNNEL)


async def ask_by_multicast(interfaces: Iterable[LocalAddress], own: frozenset[str], listen_s: float) -> list[Multicast]:
    """Ask on each of these IPv4 addresses, and by IPv6 on interfaces that have none but are no tunnels; listen for so long."""
    found = list(interfaces)
    by_4 = [local for local in found if _version(local) == 4]
    done = {local.interface for local in by_4}
    by_6 = {local.interface: local for local in reversed(found) if local.interface not in done and local.kind not in _INNER}
    answers = await asyncio.gather(_ask(4, by_4, own, listen_s), _ask(6, list(by_6.values()), own, listen_s))
    return [*answers[0], *answers[1]]


def _version(local: LocalAddress) -> int:
    return ipaddress.ip_address(local.address).version


async def _ask(version: int, asked: list[LocalAddress], own: frozenset[str], listen_s: float) -> list[Multicast]:
    if not asked:
        return []
    try:
        listening = _bind(version)
    except OSError as error:
        words = f"cannot listen at {_PORT}/udp: {error.strerror}"
        return [Multicast(local.interface, local.address, words) for local in asked]
    transport, ear = await asyncio.get_running_loop().create_datagram_endpoint(_Ear, sock=listening)
    try:
        errors = {local.address: _join(listening, local) for local in asked}
        data = question()
        for pause_s in (min(_ASK_AGAIN_S, listen_s), max(0.0, listen_s - _ASK_AGAIN_S)):
            for local in asked:
                errors[local.address] = errors[local.address] or _send(local, data)
            await asyncio.sleep(pause_s)
    finally:
        transport.close()
    own |= {address for local in asked for address in _link_local(local)}
    return [_outcome(local, asked, errors[local.address], data, ear.heard, own) for local in asked]


def _shared(version: int) -> socket.socket:
    """Other processes listen at the port too: peers, and often a daemon."""
    made = socket.socket(_FAMILIES[version], socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with contextlib.suppress(AttributeError, OSError):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return made


def _bind(version: int) -> socket.socket:
    bound = _shared(version)
    try:
        if version == 6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.setblocking(False)
        bound.bind(("", _PORT))
    except BaseException:
        bound.close()
        raise
    return bound


def _join(listening: socket.socket, local: LocalAddress) -> str | None:
    try:
        if _version(local) == 4:
            request = socket.inet_aton(_GROUPS[4]) + socket.inet_aton(local.address)
            listening.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        else:
            request = socket.inet_pton(socket.AF_INET6, _GROUPS[6]) + struct.pack("@I", socket.if_nametoindex(local.interface))
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
    except OSError as error:
        return f"cannot listen to multicast there: {error.strerror}"
    return None


def _send(local: LocalAddress, data: bytes) -> str | None:
    """From a socket of its own: uvloop owns the one that listens."""
    version = _version(local)
    with _shared(version) as sending:
        try:
            sending.bind((local.address, _PORT))  # an answer to any other port would come by unicast (RFC 6762, section 6.7)
            if version == 4:
                sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(local.address))
                sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
            else:
                sending.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex(local.interface))
                sending.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
            sending.sendto(data, (_GROUPS[version], _PORT))
        except OSError as error:
            return f"cannot send multicast there: {error.strerror}"
    return None


def _link_local(local: LocalAddress) -> Iterator[str]:
    """Our link-local address on this interface, from which other processes of this machine may send."""
    if _version(local) == 6:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as tried:
            tried.connect((_GROUPS[6], _PORT, 0, socket.if_nametoindex(local.interface)))
            yield str(tried.getsockname()[0]).partition("%")[0]


def _outcome(
    local: LocalAddress, asked: list[LocalAddress], error: str | None, data: bytes, heard: list[tuple[bytes, str, int]], own: frozenset[str]
) -> Multicast:
    number = 0
    with contextlib.suppress(OSError):
        number = socket.if_nametoindex(local.interface)
    others = {address for _, address, arrived in heard if address not in own and arrived in (0, number)}
    elsewhere = tuple(other.network for other in asked if other is not local and other.network)
    mine = frozenset(address for address in others if not is_within(address, elsewhere) or is_within(address, (local.network,)))
    is_heard_back = any(payload == data and address == local.address for payload, address, _ in heard)
    return Multicast(local.interface, local.address, error, is_heard_back, mine)
