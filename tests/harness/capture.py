"""What crossed a wire, from a capture by `tcpdump`: the bytes of TCP streams, each counted once however often it was sent."""

import re
import shutil
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.harness.lan import INTERFACE, Host
from tests.harness.waiting import wait_until

_DEADLINE_S = 10.0
_END_PORT = 9
"""UDP's `discard`: a datagram to it marks the end, as tcpdump forgets what it has not read yet when it is told to end."""
_HEADERS_BYTES = 128
"""Kept of each packet: Ethernet's 14, IPv6's 40, TCP's 60 at most."""
_BUFFER_KIB = 16 * 1024
_FILE_HEADER, _PACKET_HEADER = struct.Struct("<IHHiIII"), struct.Struct("<IIII")
_MAGIC = 0xA1B2C3D4
_IPV4, _IPV6 = 0x0800, 0x86DD
_SYN = 0x02


def missing_tool() -> str | None:
    """What keeps this machine from capturing, in words for people, or None."""
    return None if shutil.which("tcpdump") else "there is no `tcpdump` (Debian: tcpdump)"


class Segment(NamedTuple):
    """A piece of one direction of a TCP connection. `first` is its first byte's sequence number."""

    stream: tuple[bytes, bytes, int, int]
    """Addresses and ports, the sender's before the receiver's."""
    first: int
    num_bytes: int

    @property
    def to_port(self) -> int:
        """The receiver's."""
        return self.stream[3]


class Capture:
    """Captures one TCP port's packets on a host's interface, until it is left; `bytes_to` may be asked then."""

    def __init__(self, host: Host, port: int, path: Path) -> None:
        """Start `tcpdump`, which writes to `path`, and wait until it listens."""
        self._host, self._port, self._path = host, port, path
        options = ("-i", INTERFACE, "-w", str(path), "-U", "-s", str(_HEADERS_BYTES), "-B", str(_BUFFER_KIB), "-Z", "root")
        self._process = host.start("tcpdump", "--immediate-mode", *options, f"tcp port {port} or udp port {_END_PORT}")
        self._process.wait_for_line(r"listening on", _DEADLINE_S)

    def num_bytes_in(self) -> int:
        """Payload that came for the port, in all connections, retransmissions left out. Fails if the kernel could not keep up."""
        self._host.inside(_send_end)
        wait_until(lambda: _has_end(self._path.read_bytes()), _DEADLINE_S, "tcpdump wrote all that came")
        self._process.interrupt()
        self._process.wait(_DEADLINE_S)
        dropped = re.search(r"(\d+) packets? dropped by kernel", self._process.stderr_text)
        assert dropped is not None and int(dropped[1]) == 0, self._process.stderr_text
        return num_stream_bytes(segment for segment in read_segments(self._path.read_bytes()) if segment.to_port == self._port)

    def __enter__(self) -> Self:
        """Return the capture itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End it."""
        self._process.close()


def num_stream_bytes(segments: Iterator[Segment]) -> int:
    """Bytes of all streams; what was sent again counts once. A stream is less than 2 GiB, as sequence numbers wrap at 4."""
    spans: defaultdict[tuple[bytes, bytes, int, int], list[tuple[int, int]]] = defaultdict(list)
    base: dict[tuple[bytes, bytes, int, int], int] = {}
    for stream, first, num_bytes in segments:
        # relative to the first one seen, from which others differ by less than half of the circle, to either side
        ahead = (first - base.setdefault(stream, first) + (1 << 31)) % (1 << 32) - (1 << 31)
        spans[stream].append((ahead, ahead + num_bytes))
    return sum(_length_of_union(found) for found in spans.values())


def _length_of_union(spans: list[tuple[int, int]]) -> int:
    total, end = 0, min(first for first, _ in spans)
    for first, after in sorted(spans):
        total += max(0, after - max(first, end))
        end = max(end, after)
    return total


def _send_end() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sender.sendto(b"end", ("10.77.255.255", _END_PORT))


def _has_end(data: bytes) -> bool:
    return any(frame[23] == socket.IPPROTO_UDP for frame, _ in _read_frames(data) if frame[12:14] == b"\x08\x00")


def read_segments(data: bytes) -> Iterator[Segment]:
    """TCP segments with payload of a file that `tcpdump` wrote on this machine, on Ethernet."""
    return filter(None, (_segment(frame, num_bytes) for frame, num_bytes in _read_frames(data)))


def _read_frames(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The beginnings of all frames, and how long the frames were; a last one that is not wholly written is left out."""
    if len(data) < _FILE_HEADER.size:
        return
    magic, *_, link_type = _FILE_HEADER.unpack_from(data)
    assert magic == _MAGIC and link_type == 1, "a capture of Ethernet, written by a machine of the same byte order"
    offset = _FILE_HEADER.size
    while offset + _PACKET_HEADER.size <= len(data):
        _, _, kept, num_bytes = _PACKET_HEADER.unpack_from(data, offset)
        offset += _PACKET_HEADER.size
        if offset + kept <= len(data):
            yield data[offset : offset + kept], num_bytes
        offset += kept


def _segment(frame: bytes, num_bytes: int) -> Segment | None:
    """`num_bytes` is the length of the whole frame: IP's own length field is 0 where the kernel hands over more than 64 kB in one piece."""
    (kind,) = struct.unpack_from(">H", frame, 12)
    if kind == _IPV4 and frame[23] == socket.IPPROTO_TCP:
        tcp, addresses = 14 + (frame[14] & 0x0F) * 4, (frame[26:30], frame[30:34])
        (length,) = struct.unpack_from(">H", frame, 16)
        end = 14 + length if length else num_bytes  # a short frame is padded
    elif kind == _IPV6 and frame[20] == socket.IPPROTO_TCP:
        tcp, addresses, end = 54, (frame[22:38], frame[38:54]), num_bytes
    else:
        return None
    sender_port, receiver_port, first = struct.unpack_from(">HHI", frame, tcp)
    payload = tcp + (frame[tcp + 12] >> 4) * 4
    if payload >= end or frame[tcp + 13] & _SYN:
        return None
    return Segment((*addresses, sender_port, receiver_port), first, end - payload)
