"""The longest packet that reaches another machine: UDP that must not be fragmented, to a port at which nothing listens.

The other machine answers that the port is unreachable (ICMP, RFC 792), which proves that the packet arrived. That needs no rights, and
no helper there. If a firewall drops UDP there is no answer, and nothing is concluded. Linux only.
"""

import contextlib
import errno
import fcntl
import select
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshserve.observe.diagnosis.facts import PathMtu

_SIZES = (9000, 8000, 4000, 2000, 1500, 1492, 1480, 1460, 1440, 1420, 1400, 1380, 1350, 1320, 1300, 1280, 1200, 1000, 576)
"""Those of Ethernet, PPPoE, tunnels and VPNs, and steps between; the last one gets through everywhere (RFC 791)."""
_MAX_HOSTS = 16
_ANSWER_S = 0.3
_AGAIN_S = 1.1
"""A packet may be lost by chance. Linux sends a host at most six such answers at once, and then one a second (icmp(7))."""
_HEADER_BYTES = {socket.AF_INET: 28, socket.AF_INET6: 48}
_SIOCGIFMTU = 0x8921
"""linux/sockios.h"""
_NEVER_CUT = {
    socket.AF_INET: ((socket.IPPROTO_IP, 10, 3),),
    socket.AF_INET6: ((socket.IPPROTO_IPV6, 23, 3), (socket.IPPROTO_IPV6, 62, 1)),
}
"""IP_MTU_DISCOVER: IP_PMTUDISC_PROBE, which also ignores the MTU that the kernel has learnt; IPV6_DONTFRAG (linux/in.h, in6.h)."""


@dataclass(slots=True)
class _Path:
    address: str
    interface: str
    mtu: int
    largest: int = 0


def probe_paths(places: Iterable[tuple[str, int]], interfaces: Mapping[str, str]) -> dict[str, PathMtu]:
    """What is known by address, of these (address, port); `interfaces` are this machine's, by address. Blocks for up to 1.7 s."""
    ports = dict(list(dict(places).items())[:_MAX_HOSTS])
    paths = [path for address in ports if (path := _path(address, ports[address], interfaces)) is not None]
    _probe(paths, ports)
    doubtful = [path for path in paths if 0 < path.largest < path.mtu]
    if doubtful:
        time.sleep(_AGAIN_S)
        _probe(doubtful, ports)
    return {path.address: PathMtu(path.interface, path.mtu, path.largest) for path in paths if path.largest}


def _path(address: str, port: int, interfaces: Mapping[str, str]) -> _Path | None:
    with contextlib.suppress(OSError), _connected(address, port) as tried:
        interface = interfaces.get(tried.getsockname()[0], "")
        if interface:
            asked = struct.pack("16s16x", interface.encode()[:15])
            mtu: int = struct.unpack("16xi12x", fcntl.ioctl(tried, _SIOCGIFMTU, asked))[0]
            return _Path(address, interface, mtu)
    return None


def _connected(address: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        for level, name, value in _NEVER_CUT[made.family]:
            made.setsockopt(level, name, value)
        made.setblocking(False)
        made.connect((address, port))
    except BaseException:
        made.close()
        raise
    return made


def _probe(paths: list[_Path], ports: Mapping[str, int]) -> None:
    """One packet of each size that is longer than the longest so far, longest first: a host that limits its answers omits short ones."""
    with contextlib.ExitStack() as stack:
        poll, sent = select.poll(), {}
        for path in paths:
            for size in (path.mtu, *(size for size in _SIZES if size < path.mtu)):
                if size <= path.largest:
                    break
                with contextlib.suppress(OSError):
                    made = stack.enter_context(_connected(path.address, ports[path.address]))
                    made.send(bytes(size - _HEADER_BYTES[made.family]))
                    sent[made.fileno()] = made, path, size
                    poll.register(made, select.POLLIN)
        until_s = time.monotonic() + _ANSWER_S
        while sent and (left_s := until_s - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left_s * 1000):
                poll.unregister(descriptor)
                made, path, size = sent.pop(descriptor)
                if made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED:
                    path.largest = max(path.largest, size)
