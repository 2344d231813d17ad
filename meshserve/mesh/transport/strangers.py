"""Who fails the handshake of the calls port: strangers that no frame is ever taken from."""

import contextlib
import socket
import struct
from collections.abc import Callable

import zmq

from meshserve.mesh.transport.reading import SocketReader
from meshserve.telemetry import Counters

OnStranger = Callable[[str, str], None]
"""Called with an address, empty if it is not known any more, and the reason."""

_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)
_FAILED = (int(zmq.EVENT_HANDSHAKE_FAILED_AUTH), int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL))
_MECHANISM_MISMATCH = 0x11000002
_MAX_OPEN = 4096
_READS_PER_TURN = 50


class StrangerMonitor:
    """Watches one bound socket. A context has one I/O thread, so a failure is followed by the end of that very connection."""

    def __init__(self, socket: "zmq.Socket[bytes]", has_key: bool, counters: Counters, on_stranger: OnStranger) -> None:
        self._socket, self._counters, self._on_stranger = socket, counters, on_stranger
        self._mismatch = "it has no key, and this mesh has one" if has_key else "it has a key, and this mesh has none"
        self._addresses: dict[int, str] = {}
        self._reason: str | None = None
        self._reader = SocketReader(socket.get_monitor_socket(_EVENTS), self._on_event, lambda: None, _READS_PER_TURN)

    def _on_event(self, frames: list[bytes]) -> None:
        event, value = struct.unpack("=HI", frames[0])
        if event == zmq.EVENT_ACCEPTED:
            if len(self._addresses) < _MAX_OPEN:
                self._addresses[value] = _address_of(value)
        elif event in _FAILED:
            if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:  # those of ZAP count themselves
                self._counters.add("strangers_refused")
            self._reason = self._mismatch if value == _MECHANISM_MISMATCH else "its key is not this mesh's"
        elif event == zmq.EVENT_DISCONNECTED:
            address, reason, self._reason = self._addresses.pop(value, ""), self._reason, None
            if reason is not None:
                self._on_stranger(address, reason)
        else:
            self._reason = None

    def close(self) -> None:
        """Stop watching; to be called before the socket is closed."""
        self._reader.close()
        self._socket.disable_monitor()


def _address_of(descriptor: int) -> str:
    """Of the other end. The connection may be gone by now, and its number another's: it is only for people."""
    with contextlib.suppress(OSError), socket.fromfd(descriptor, socket.AF_INET6, socket.SOCK_STREAM) as connection:
        return str(connection.getpeername()[0]).removeprefix("::ffff:")
    return ""
