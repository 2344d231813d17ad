"""Bulk messages: KV blocks on a connection of their own, so that tokens never wait behind them.

A message is a header and payload frames, from a DEALER to the receiving peer's ROUTER; short
answers come back. Frames are short, as ZeroMQ's heartbeat counts whole ones only: a long frame on a
slow link would end its connection while bytes flow. Payloads are handed to ZeroMQ without a copy; the receiver copies once, from
ZeroMQ's memory into its pool.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import zmq

from meshserve.errors import PeerLost, ProtocolError
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.transport.reading import BufferReader, ConnectionMonitor, SocketReader
from meshserve.mesh.transport.sockets import BULK_FRAME_BYTES, BULK_OFFSET, SocketFactory, endpoint
from meshserve.wire.frames import pack_body, unpack_body
from meshserve.wire.structs import plain

MAX_PAYLOADS = 64
"""Payload frames in one message."""
MAX_PAYLOAD_BYTES = BULK_FRAME_BYTES
"""Of one frame."""

_MAX_READS_PER_TURN = 16
_MAX_BULK_READS_PER_TURN = 1
"""Bulk messages are big: between two of them the loop looks after the tokens."""
_RETRY_S = 0.002
_NOBLOCK, _NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)

Frame = bytes | memoryview
OnBulk = Callable[[Any, list[memoryview], Callable[[Any], None]], None]
"""Called with a header (plain data), payloads, and a function that sends an answer back to where
they came from. It may raise ProtocolError."""


class BulkReceiver:
    """Reads this peer's bulk port until it is closed."""

    def __init__(self, mesh: Mesh, on_bulk: OnBulk) -> None:
        assert mesh.ports is not None
        self._socket, self._counters, self._on_bulk = mesh.ports.bulk, mesh.counters, on_bulk
        max_reads, max_frames = _MAX_BULK_READS_PER_TURN, MAX_PAYLOADS + 2
        self._reader = BufferReader(self._socket, self._on_frames, None, max_reads, max_frames)

    def _on_frames(self, frames: list[memoryview]) -> None:
        if len(frames) < 2:
            return
        sender, header = bytes(frames[0]), bytes(frames[1])
        try:
            self._on_bulk(unpack_body(header), frames[2:], partial(self._answer, sender))
        except ProtocolError:
            self._counters.add("bulk_malformed")

    def _answer(self, sender: bytes, answer: Any) -> None:
        """Back to the connection that the message came on. Lost if that is gone: then nobody waits
        for it."""
        if self._socket.closed:
            return
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart((sender, pack_body(plain(answer))), zmq.NOBLOCK)
        self._reader.drain_soon()

    def close(self) -> None:
        """Stop reading; the socket belongs to the peer's port block."""
        self._reader.close()


class BulkSender:
    """Sends bulk messages. `on_answer` gets a peer and its answer, `on_lost` a peer whose
    connection broke, and why."""

    def __init__(
        self, mesh: Mesh, on_answer: Callable[[str, Any], None], on_lost: Callable[[str, str], None]
    ) -> None:
        self._mesh, self._on_answer, self._on_lost = mesh, on_answer, on_lost
        self._outlets: dict[str, _Outlet] = {}
        mesh.subscribe(self._on_change)

    def send(self, peer: str, header: Any, payloads: Sequence[Frame]) -> None:
        """One message to a peer. Raises PeerLost if it is not there."""
        outlet = self._outlets.get(peer) or self._connect(peer)
        outlet.send(pack_body(plain(header)), payloads)

    def _connect(self, peer: str) -> "_Outlet":
        member = self._mesh.member(peer)
        if member is None or member.linked_at is None:
            raise PeerLost("no bulk connection", peer=self._mesh.name_of(peer))

        def on_answer(frames: list[bytes]) -> None:
            try:
                self._on_answer(peer, unpack_body(frames[-1]))
            except ProtocolError:
                self._mesh.counters.add("bulk_malformed")

        def on_lost(reason: str) -> None:
            self._outlets.pop(peer, None)
            self._on_lost(peer, reason)

        outlet = self._outlets[peer] = _Outlet(self._mesh.factory, member.linked_at, on_answer, on_lost)
        return outlet

    def _on_change(self, change: Change, member: Member) -> None:
        outlet = self._outlets.get(member.info.incarnation)
        if outlet is not None and change in (Change.DIED, Change.LEFT):
            del self._outlets[member.info.incarnation]
            outlet.close()
        elif outlet is not None and change is Change.CALLABLE and member.linked_at != outlet.place:
            outlet.lost("the peer's address changed")

    def close(self) -> None:
        """Close all sockets."""
        for outlet in self._outlets.values():
            outlet.close()
        self._outlets.clear()


class _Outlet:
    """A DEALER to one peer's bulk port, with what waits for its socket. The sender's window bounds
    what waits."""

    def __init__(
        self,
        factory: SocketFactory,
        place: tuple[str, int],
        on_answer: Callable[[list[bytes]], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.place = place
        """Host and port of the peer's calls."""
        self._socket = factory.client_socket(zmq.DEALER)
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[list[Frame]] = deque()
        self._on_lost = on_lost
        self._is_up = self._is_closed = False
        self._retry: asyncio.TimerHandle | None = None
        self._reader = SocketReader(self._socket, on_answer, None, _MAX_READS_PER_TURN)
        self._monitor = ConnectionMonitor(self._socket, self._on_up, self.lost)
        self._socket.connect(endpoint(place[0], place[1] + BULK_OFFSET))

    def send(self, header: bytes, payloads: Sequence[Frame]) -> None:
        """One message, in order after those before it."""
        self._waiting.append([header, *payloads])
        self._pump()

    def _pump(self) -> None:
        while self._waiting and self._is_up and not self._is_closed:
            *parts, last = self._waiting[0]
            try:
                for part in parts:  # `send_multipart` makes an enum of the flags for each: 3 % of a block's CPU time
                    self._socket.send(part, _NOBLOCK_MORE, copy=False)
                self._socket.send(last, _NOBLOCK, copy=False)
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

    def lost(self, reason: str) -> None:
        """What was on its way is lost with the connection: its owner is told."""
        if not self._is_closed:
            self.close()
            self._on_lost(reason)

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
