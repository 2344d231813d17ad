"""A VPN between two hosts of a `Lan`: an interface of kind `tun` on each, and a thread that carries packets between them."""

import fcntl
import os
import select
import struct
import threading
from types import TracebackType
from typing import Self

from tests.harness.lan import Host

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MAX_PACKET_BYTES = 65_536


class Tunnel:
    """Use it as a context manager. The addresses have their prefix, as in 10.99.0.1/24; `name` is the interface's on both hosts."""

    def __init__(self, ends: dict[Host, str], name: str) -> None:
        self.num_bytes = 0
        """Carried so far, both ways."""
        self._descriptors = []
        for host, address in ends.items():
            self._descriptors.append(host.inside(lambda: _open(name)))
            host.command("ip", "address", "add", address, "dev", name)
            host.command("ip", "link", "set", name, "up", "multicast", "on")
        self._stop_reading, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()

    def _carry(self) -> None:
        one, other = self._descriptors
        while True:
            ready, _, _ = select.select([one, other, self._stop_reading], [], [])
            if self._stop_reading in ready:
                return
            for descriptor in ready:
                packet = os.read(descriptor, _MAX_PACKET_BYTES)
                self.num_bytes += len(packet)
                os.write(other if descriptor == one else one, packet)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.write(self._stop, b"x")
        self._thread.join()
        for descriptor in (*self._descriptors, self._stop, self._stop_reading):
            os.close(descriptor)


def _open(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor
