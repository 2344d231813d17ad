"""Reading ZeroMQ sockets under asyncio, without `zmq.asyncio`.

ZMQ's file descriptor is edge-triggered: it says that something may have changed, once. So a reader drains until there is nothing
left, and looks again after every send, which may have swallowed the edge. One reader per socket, and it is never cancelled
half-way through a message. (Reading the descriptor under uvloop costs about two thirds of `zmq.asyncio`.)
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable, Container
from typing import Any

import zmq

from meshserve.mesh.calls import CONNECTION_CLOSED
from meshserve.telemetry import Counters

KEYS_DIFFER = "it took the connection and closed it: the keys differ, or only one side has one"
"""CURVE tells a stranger nothing but this."""

MAX_FRAMES = 3
"""Of a message on the call sockets: routing id and payload, and one to spare."""

# Plain integers: looking at an enum's members costs about as much as receiving a message.
_EVENTS, _POLLIN, _RCVMORE, _NOBLOCK = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.RCVMORE), int(zmq.NOBLOCK)

_READS_OF_EVENTS = 50


class SocketReader:
    """Calls `on_frames` with each message of one socket, then `on_turn` once per turn in which there were any.

    For messages of a few KB: each frame is copied, which costs less than to share it.
    """

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        on_frames: Callable[[list[Any]], None],
        on_turn: Callable[[], None] | None,
        max_reads_per_turn: int,
        max_frames: int = MAX_FRAMES,
    ) -> None:
        self._socket, self._on_frames, self._on_turn = socket, on_frames, on_turn
        self._max_reads, self._max_frames = max_reads_per_turn, max_frames
        self._loop = asyncio.get_running_loop()
        self._descriptor: int = socket.FD
        self._is_closed = self.is_draining = False
        self._is_busy = self._has_sent = False
        self._loop.add_reader(self._descriptor, self.drain)
        self._loop.call_soon(self.drain)  # what came before the descriptor was watched

    def drain(self) -> None:
        """Read what is there, up to the bound; the rest in the next turn. Looks again after `on_turn`, whose sends may swallow an edge.

        Where there was but one message the last time, its answers leave before it looks for a second: looking costs as much as five
        receives. Where there were more, all are read first: what they lead to leaves together.
        """
        if self._is_closed or self.is_draining:
            return
        self.is_draining = True
        num_read = 0
        try:
            has_input = True
            while has_input:
                while has_input and num_read < self._max_reads:
                    num_read += 1
                    if frames := self._receive():
                        self._on_frames(frames)
                    has_input = (num_read > 1 or self._is_busy) and self.has_input()
                self._has_sent = num_read == 1 and not self._is_busy  # or it did not look yet
                if self._on_turn is not None:
                    self._on_turn()
                has_input = num_read < self._max_reads and (has_input or (self._has_sent and self.has_input()))
        except BaseException:
            if not self._is_closed:
                self._loop.call_soon(self.drain)  # what is left has no edge of its own any more
            raise
        finally:
            self.is_draining, self._is_busy = False, num_read > 1
        if num_read >= self._max_reads:
            self.drain_soon()

    def drain_soon(self) -> None:
        """To be called after every send on this socket."""
        self._has_sent = True
        if not self.is_draining and self.has_input():
            self._loop.call_soon(self.drain)

    def has_input(self) -> bool:
        """Whether a message waits to be read."""
        return not self._is_closed and bool(self._socket.get(_EVENTS) & _POLLIN)  # type: ignore[operator]  # EVENTS is an integer

    def close(self) -> None:
        """Stop reading; the socket itself stays open."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._descriptor)

    def _receive(self) -> list[Any] | None:
        """The next message, empty if it had too many frames; None if there is none."""
        if self._is_closed:
            return None
        try:
            frames = [self._socket.recv(_NOBLOCK)]
        except zmq.Again:
            return None
        while self._socket.get(_RCVMORE):
            frame = self._socket.recv(_NOBLOCK)
            if len(frames) <= self._max_frames:
                frames.append(frame)
        return frames if len(frames) <= self._max_frames else []


class RouterReader(SocketReader):
    """Of a ROUTER: tells of each new connection, before its first message, where it comes from.

    Only a message that is received without a copy says so, which costs as much as three plain ones; so the first one
    of a connection is received in that way, and no other.
    """

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        known: Container[bytes],
        on_connection: Callable[[bytes, int], None],
        on_frames: Callable[[list[Any]], None],
        on_turn: Callable[[], None] | None,
        max_reads_per_turn: int,
    ) -> None:
        """`known` are the routing ids of connections that were told of; `on_connection` gets one, and its descriptor."""
        super().__init__(socket, on_frames, on_turn, max_reads_per_turn)
        self._known, self._on_connection = known, on_connection

    def _receive(self) -> list[Any] | None:
        if self._is_closed:
            return None
        try:
            routing_id = self._socket.recv(_NOBLOCK)
        except zmq.Again:
            return None
        frames = [routing_id]
        is_new = routing_id not in self._known
        while self._socket.get(_RCVMORE):
            if is_new and len(frames) == 1:
                frame = self._socket.recv(_NOBLOCK, copy=False)
                self._on_connection(routing_id, int(frame.get(zmq.SRCFD)))
                frames.append(frame.bytes)
                continue
            data = self._socket.recv(_NOBLOCK)
            if len(frames) <= self._max_frames:
                frames.append(data)
        return frames if len(frames) <= self._max_frames else []


class BufferReader(SocketReader):
    """For big frames: views of ZeroMQ's own memory, which lives as long as they do."""

    def _receive(self) -> list[Any] | None:
        if self._is_closed:
            return None
        try:
            frame = self._socket.recv(_NOBLOCK, copy=False)
        except zmq.Again:
            return None
        frames = [frame.buffer]
        while frame.more:
            frame = self._socket.recv(_NOBLOCK, copy=False)
            if len(frames) <= self._max_frames:
                frames.append(frame.buffer)
        return frames if len(frames) <= self._max_frames else []


# --- what becomes of connections

_HANDSHAKE_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)
_FAILED = (int(zmq.EVENT_HANDSHAKE_FAILED_AUTH), int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL))
_MECHANISM_MISMATCH = 0x11000002


class _Monitor:
    """Reads what becomes of one socket's connections."""

    def __init__(self, socket: "zmq.Socket[bytes]", events: int) -> None:
        self._socket = socket
        self._events = socket.get_monitor_socket(events)
        self._reader = SocketReader(self._events, self._on_frames, None, _READS_OF_EVENTS)
        self._is_closed = False

    def _on_frames(self, frames: list[bytes]) -> None:
        self._on_event(*struct.unpack("=HI", frames[0]))

    def _on_event(self, event: int, value: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Stop watching; to be called before the socket is closed."""
        if not self._is_closed:
            self._is_closed = True
            self._reader.close()
            self._socket.disable_monitor()
            self._events.close(linger=0)  # after that: a report into a closed one would wait for ever


class ConnectionMonitor(_Monitor):
    """Tells when the one connection of a client socket is made, refused or lost."""

    def __init__(
        self, socket: "zmq.Socket[bytes]", on_up: Callable[[], None], on_down: Callable[[str], None]
    ) -> None:
        super().__init__(socket, _HANDSHAKE_EVENTS | zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED)
        self._on_up, self._on_down = on_up, on_down
        self.near_address = ""
        """Of this host, at which the connection ends; empty before there is one."""

    def _on_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_CONNECTED:
            self.near_address = address_of(value, is_far=False)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._on_up()
        else:
            self._on_down(KEYS_DIFFER if event in _FAILED else CONNECTION_CLOSED)


OnStranger = Callable[[str, str], None]
"""Called with an address, empty if it is not known any more, and the reason."""


class RouterMonitor(_Monitor):
    """Tells of each stranger, a peer that fails the handshake and of which no frame is read; and of each connection that closed.

    A context has one I/O thread, so a failure is followed by the end of that very connection, and a descriptor is given
    to a new connection only after the end of the old one was told.
    """

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        has_key: bool,
        counters: Counters,
        on_stranger: OnStranger,
        on_closed: Callable[[int], None],
    ) -> None:
        super().__init__(socket, zmq.EVENT_ACCEPTED | _HANDSHAKE_EVENTS)
        self._counters, self._on_stranger, self._on_closed = counters, on_stranger, on_closed
        self._mismatch = "it has a key, and this mesh has none"
        if has_key:
            self._mismatch = "it has no key, and this mesh has one"
        self.addresses: dict[int, str] = {}
        """Of the other ends of the connections that are open, by descriptor."""
        self._reason: str | None = None

    def catch_up(self) -> None:
        """Report all events that are due."""
        self._reader.drain()
        while self._reader.has_input() and not self._reader.is_draining:
            self._reader.drain()

    def _on_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self.addresses[value] = address_of(value)
        elif event in _FAILED:
            if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:  # those of ZAP count themselves
                self._counters.add("strangers_refused")
            self._reason = self._mismatch if value == _MECHANISM_MISMATCH else "its key is not this mesh's"
        elif event == zmq.EVENT_DISCONNECTED:
            address, reason, self._reason = self.addresses.pop(value, ""), self._reason, None
            self._on_closed(value)
            if reason is not None:
                self._on_stranger(address, reason)
        else:
            self._reason = None


def address_of(descriptor: int, is_far: bool = True) -> str:
    """Of the other end, or of this one. The connection may be gone by now, and its number another's: no more than a hint."""
    with contextlib.suppress(OSError):
        copy = os.dup(descriptor)
        try:
            connection = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, fileno=copy)
        except OSError:  # the socket is closed; `socket.fromfd` would leave the copy open
            os.close(copy)
            raise
        with connection:
            name = connection.getpeername() if is_far else connection.getsockname()
            return str(name[0]).removeprefix("::ffff:")
    return ""
