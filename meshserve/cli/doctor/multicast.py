"""One question by multicast on every interface, and who is heard: what the network itself lets through, whatever the mesh says."""

import asyncio
import contextlib
import ipaddress
import secrets
import socket
import struct
from collections.abc import Iterable

from meshserve.mesh.addresses import LocalAddress
from meshserve.observe.diagnosis.facts import Multicast, is_within

_GROUP, _PORT = "224.0.0.251", 5353
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
        self.heard: list[tuple[bytes, str]] = []

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        if len(self.heard) < 10_000:
            self.heard.append((data, address[0]))

    def error_received(self, error: Exception) -> None:
        """Asking says it too."""


async def ask_by_multicast(interfaces: Iterable[LocalAddress], own: frozenset[str], listen_s: float) -> list[Multicast]:
    """Ask on each of these IPv4 addresses and listen for so long; IPv6 ones are passed over, as hosts of a LAN have both or IPv4."""
    asked = [local for local in interfaces if ipaddress.ip_address(local.address).version == 4]
    try:
        listening = _bind()
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
    return [_outcome(local, asked, errors[local.address], data, ear.heard, own) for local in asked]


def _bind() -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(AttributeError, OSError):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.setblocking(False)
        bound.bind(("", _PORT))
    except BaseException:
        bound.close()
        raise
    return bound


def _join(listening: socket.socket, local: LocalAddress) -> str | None:
    try:
        request = socket.inet_aton(_GROUP) + socket.inet_aton(local.address)
        listening.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    except OSError as error:
        return f"cannot listen to multicast there: {error.strerror}"
    return None


def _send(local: LocalAddress, data: bytes) -> str | None:
    """From a socket of the moment: uvloop owns the one that listens."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
        try:
            sending.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(AttributeError, OSError):
                sending.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sending.bind((local.address, _PORT))  # an answer to any other port would come by unicast (RFC 6762, section 6.7)
            sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(local.address))
            sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
            sending.sendto(data, (_GROUP, _PORT))
        except OSError as error:
            return f"cannot send multicast there: {error.strerror}"
    return None


def _outcome(
    local: LocalAddress, asked: list[LocalAddress], error: str | None, data: bytes, heard: list[tuple[bytes, str]], own: frozenset[str]
) -> Multicast:
    others = {address for _, address in heard if address not in own}
    elsewhere = tuple(other.network for other in asked if other is not local and other.network)
    mine = frozenset(address for address in others if not is_within(address, elsewhere) or is_within(address, (local.network,)))
    is_heard_back = any(payload == data and address == local.address for payload, address in heard)
    return Multicast(local.interface, local.address, error, is_heard_back, mine)
