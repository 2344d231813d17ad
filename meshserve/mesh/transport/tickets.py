"""PUSH and PULL: small notes to one peer or to several, which may be lost.

PUSH hands out eagerly and nothing is acknowledged (with two workers and one `kill -9`, 30 of 100 tasks were lost at default
settings), so what goes through here are tickets and never the work itself.
"""

import time

import zmq

from meshserve.mesh.transport.reading import OnFrames, SocketReader
from meshserve.mesh.transport.sockets import SocketFactory, endpoint

_MAX_READS_PER_TURN = 200
MAX_TICKETS = 32
"""In one message, a frame each."""


class TicketOutlet:
    """A PUSH socket to one peer's tickets port."""

    def __init__(self, factory: SocketFactory, host: str, port: int) -> None:
        self.made_s = time.monotonic()
        self._socket = factory.client_socket(zmq.PUSH)
        self._socket.connect(endpoint(host, port))

    def push_nowait(self, tickets: list[bytes]) -> bool:
        """One message. False if the connection is not up or the peer takes no more: then nothing was sent."""
        try:
            self._socket.send_multipart(tickets, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def close(self) -> None:
        """Tickets that wait in the socket are lost."""
        self._socket.close()


class TicketInlet:
    """Reads this peer's PULL socket."""

    def __init__(self, socket: "zmq.Socket[bytes]", on_frames: OnFrames) -> None:
        self._reader = SocketReader(socket, on_frames, lambda: None, _MAX_READS_PER_TURN, MAX_TICKETS)

    def close(self) -> None:
        """Stop reading; the socket belongs to the peer's port block."""
        self._reader.close()
