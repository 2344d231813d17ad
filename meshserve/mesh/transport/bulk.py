"""The bulk sockets: KV blocks on a connection of their own, so that tokens never wait behind them.

A message is a header and payload frames, from a DEALER to the receiving peer's ROUTER; short answers come back. Payloads are
handed to ZeroMQ without a copy; the receiver copies once, from ZeroMQ's memory into its pool.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

import zmq

from meshserve.mesh.transport.reading import BufferReader, ConnectionMonitor, SocketReader
from meshserve.mesh.transport.sockets import SocketFactory, endpoint

MAX_PAYLOADS = 64
"""Payload frames in one message."""

_MAX_READS_PER_TURN = 16
_MAX_BULK_READS_PER_TURN = 1
"""Bulk messages are big: between two of them the loop looks after the tokens."""
_RETRY_S = 0.002


class BulkInlet:
    """Reads this peer's bulk ROUTER."""

    def __init__(self, socket: "zmq.Socket[bytes]", on_bulk: Callable[[bytes, bytes, list[memoryview]], None]) -> None:
        self._socket, self._on_bulk = socket, on_bulk
        self._reader = BufferReader(socket, self._on_frames, lambda: None, _MAX_BULK_READS_PER_TURN, MAX_PAYLOADS + 2)

    def _on_frames(self, frames: list[memoryview]) -> None:
        if len(frames) >= 2:
            self._on_bulk(bytes(frames[0]), bytes(frames[1]), frames[2:])

    def answer(self, sender: bytes, data: bytes) -> None:
        """Back to the connection that a message came on. Lost if that is gone: then there is nobody who waits for it."""
        if self._socket.closed:
            return
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart((sender, data), zmq.NOBLOCK)
        self._reader.drain_soon()

    def close(self) -> None:
        """Stop reading; the socket belongs to the peer's port block."""
        self._reader.close()


class BulkOutlet:
    """A DEALER to one peer's bulk port, with what waits for its socket. Whoever sends bounds that by a window of its own."""

    def __init__(
        self, factory: SocketFactory, host: str, port: int, on_answer: Callable[[bytes], None], on_lost: Callable[[str], None]
    ) -> None:
        self._socket = factory.client_socket(zmq.DEALER)
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[list[bytes]] = deque()
        self._on_answer, self._on_lost = on_answer, on_lost
        self._is_up = self._is_closed = False
        self._retry: asyncio.TimerHandle | None = None
        self._reader = SocketReader(self._socket, self._on_frames, lambda: None, _MAX_READS_PER_TURN)
        self._monitor = ConnectionMonitor(self._socket, self._on_up, self._on_down)
        self._socket.connect(endpoint(host, port))

    def send(self, header: bytes, payloads: list[bytes]) -> None:
        """One message, in order after those before it."""
        self._waiting.append([header, *payloads])
        self._pump()

    def _pump(self) -> None:
        while self._waiting and self._is_up and not self._is_closed:
            try:
                self._socket.send_multipart(self._waiting[0], zmq.NOBLOCK, copy=False)
            except zmq.Again:
                if self._retry is None:
                    self._retry = self._loop.call_later(_RETRY_S, self._try_again)
                self._reader.drain_soon()
                return
            self._waiting.popleft()
            self._reader.drain_soon()

    def _try_again(self) -> None:
        self._retry = None
        self._pump()

    def _on_up(self) -> None:
        self._is_up = True
        self._pump()

    def _on_down(self, reason: str) -> None:
        if not self._is_closed:
            self.close()
            self._on_lost(reason)

    def _on_frames(self, frames: list[bytes]) -> None:
        self._on_answer(frames[-1])

    def close(self) -> None:
        """Drop what waits and disconnect. Safe to call twice."""
        if not self._is_closed:
            self._is_closed = True
            self._waiting.clear()
            if self._retry is not None:
                self._retry.cancel()
            self._monitor.close()
            self._reader.close()
            self._socket.close()
