"""The call sockets of one peer: a ROUTER that is bound, and a DEALER for every peer that it calls."""

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

import zmq

from meshserve.config import TransportConfig
from meshserve.errors import PeerLost, ProtocolError
from meshserve.mesh.calls import CONNECTION_CLOSED
from meshserve.mesh.transport.channel import Channel, SendFrame, Turn
from meshserve.mesh.transport.reading import KEYS_DIFFER, ConnectionMonitor, OnStranger, RouterMonitor, RouterReader, SocketReader
from meshserve.mesh.transport.sockets import SocketFactory, endpoint
from meshserve.telemetry import Counters
from meshserve.wire import frames
from meshserve.wire.frames import Envelope

OnFrame = Callable[[Channel, list[Envelope]], None]
OnLost = Callable[[Channel, str], None]

_NOBLOCK, _NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_MAX_CHANNELS = 4096
_LINGER_MS, _PARTING_CHECK_S = 200, 0.005
_HELLO_TIMEOUT_S = 5.0
_MAX_TURNS_TO_READ = 50
"""Of a connection that closed, for what it sent before: a busy ROUTER has other input at every turn."""


class _Dealer:
    """One outgoing connection and its socket."""

    def __init__(self, transport: "Transport", socket: "zmq.Socket[bytes]") -> None:
        self.socket = socket
        self.channel = transport.channel(self._send)
        self.reader = SocketReader(socket, self._on_frames, transport.turn.flush, transport.config.max_reads_per_turn)
        self.is_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport = transport
        self._monitor = ConnectionMonitor(socket, self._on_up, self._on_down)

    def _send(self, data: bytes) -> bool:
        try:
            self.socket.send(data, _NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            raise OSError(error.errno, error.strerror) from error
        finally:
            self.reader.drain_soon()  # a send may swallow the edge of what came in, also one that fails
        return True

    def _on_frames(self, parts: list[bytes]) -> None:
        self._transport.received(self.channel, parts[-1])

    def _on_up(self) -> None:
        self.channel.near_address = self._monitor.near_address
        if not self.is_up.done():
            self.is_up.set_result(None)

    def _on_down(self, reason: str) -> None:
        if not self.is_up.done():
            self.is_up.set_exception(PeerLost(KEYS_DIFFER if reason == CONNECTION_CLOSED else reason))
        else:
            self.reader.drain()  # the last messages of the peer
            self._transport.lose_when_read(self.channel, reason)

    def close(self, linger_ms: int = 0) -> None:
        if not self.is_up.done():
            self.is_up.cancel()
        self._monitor.close()
        self.reader.close()
        self.socket.close(linger_ms)


class _Router(NamedTuple):
    """The socket that others connect to."""

    socket: "zmq.Socket[bytes]"
    reader: SocketReader
    monitor: RouterMonitor


class Transport:
    """Sends and receives messages on channels; knows nothing of what they mean but how long they may be."""

    def __init__(
        self,
        factory: SocketFactory,
        config: TransportConfig,
        counters: Counters,
        turn: Turn,
        on_frame: OnFrame,
        on_lost: OnLost,
    ) -> None:
        """`on_frame` gets the messages of each frame, `on_lost` a channel that broke, and why."""
        self.config, self._factory, self._counters = config, factory, counters
        self._on_frame, self._on_lost = on_frame, on_lost
        self.turn, self._loop = turn, asyncio.get_running_loop()
        self._dealers: dict[Channel, _Dealer] = {}
        self._inbound: dict[bytes, Channel] = {}
        self._routing_ids: dict[Channel, bytes] = {}
        self._router: _Router | None = None
        self._by_descriptor: dict[int, Channel] = {}
        """Inbound connections, by the descriptor that ZeroMQ reads them from."""
        self._unknown_since_s: dict[Channel, float] = {}
        """Inbound connections whose peer has said no hello yet."""

    def serve(self, socket: "zmq.Socket[bytes]", on_stranger: OnStranger) -> None:
        """Read and close this bound ROUTER. A stranger, which fails its handshake, is told of and never heard."""
        max_reads = self.config.max_reads_per_turn
        reader = RouterReader(socket, self._inbound, self._accept, self._on_router_frames, self.turn.flush, max_reads)
        monitor = RouterMonitor(socket, self._factory.has_key, self._counters, on_stranger, self._on_closed)
        self._router = _Router(socket, reader, monitor)

    async def dial(self, host: str, port: int, timeout_s: float) -> Channel:
        """Connect to a peer's calls port. Raises PeerLost with the reason: refused, timed out, keys differ."""
        try:
            socket = self._factory.client_socket(zmq.DEALER)
        except zmq.ZMQError as error:  # no more sockets or descriptors
            raise PeerLost(f"{host}:{port}: {error.strerror}") from error
        try:
            dealer = _Dealer(self, socket)
        except (zmq.ZMQError, OSError) as error:
            socket.close()
            raise PeerLost(f"{host}:{port}: {error.strerror}") from error
        try:
            socket.connect(endpoint(host, port))
            async with asyncio.timeout(timeout_s):
                await dealer.is_up
        except BaseException as error:
            dealer.close()
            if isinstance(error, TimeoutError):
                raise PeerLost(f"{host}:{port} does not answer") from error
            if isinstance(error, zmq.ZMQError):
                raise PeerLost(f"{host}:{port}: {error.strerror}") from error
            raise
        self._dealers[dealer.channel] = dealer
        return dealer.channel

    def channel(self, send: SendFrame) -> Channel:
        """A new channel over this socket."""
        return Channel(self.config, self.turn, send, lambda channel: self.lose_when_read(channel, "overflow or unreachable"))

    def is_open(self, channel: Channel) -> bool:
        """Whether messages of this channel are still read."""
        return channel in self._dealers or channel in self._routing_ids

    def drop(self, channel: Channel) -> None:
        """Forget a channel and close its socket if it has one of its own. Safe to call twice."""
        channel.is_broken = True
        dealer = self._dealers.pop(channel, None)
        if dealer is not None:
            dealer.close()
        self._unknown_since_s.pop(channel, None)
        routing_id = self._routing_ids.pop(channel, None)
        if routing_id is not None:
            self._inbound.pop(routing_id, None)

    def lost(self, channel: Channel, reason: str) -> None:
        """A connection broke. If the peer made it, the peer is told: only the dialling side can make a new one."""
        if channel in self._routing_ids:
            channel.send_last([frames.RESET, reason])
        if channel in self._dealers or channel in self._routing_ids:
            self.drop(channel)
            self._on_lost(channel, reason)

    def received(self, channel: Channel, data: bytes) -> None:
        """One frame from a peer: counted and dropped if malformed, else handed up."""
        channel.received(len(data))
        try:
            messages = frames.unpack(data)
        except ProtocolError:
            self._counters.add("frames_malformed")
            return
        self._on_frame(channel, messages)

    def _on_router_frames(self, parts: list[bytes]) -> None:
        channel = self._inbound.get(parts[0])
        if channel is not None:
            self.received(channel, parts[-1])

    def _accept(self, routing_id: bytes, descriptor: int) -> None:
        if len(self._inbound) >= _MAX_CHANNELS:
            self._counters.add("channels_refused")
            return
        assert self._router is not None
        self._router.monitor.catch_up()  # the descriptor may have been another connection's, whose end is not read yet
        socket, reader = self._router.socket, self._router.reader

        def send(data: bytes) -> bool:
            try:
                socket.send(routing_id, _NOBLOCK_MORE)
                socket.send(data, _NOBLOCK)
            except zmq.Again:
                return False
            except zmq.ZMQError as error:
                raise OSError(error.errno, error.strerror) from error
            finally:
                reader.drain_soon()  # as above
            return True

        channel = self.channel(send)
        channel.far_address = self._router.monitor.addresses.get(descriptor, "")
        self._inbound[routing_id] = channel
        self._routing_ids[channel] = routing_id
        self._unknown_since_s[channel] = time.monotonic()
        self._by_descriptor[descriptor] = channel
        if descriptor not in self._router.monitor.addresses:  # the connection closed before its first message was read
            self._on_closed(descriptor)

    def _on_closed(self, descriptor: int) -> None:
        """A connection to the ROUTER is gone, on which messages may still wait to be read, such as a goodbye."""
        channel = self._by_descriptor.pop(descriptor, None)
        if channel is not None:
            self._loop.call_soon(self.lose_when_read, channel, CONNECTION_CLOSED)

    def lose_when_read(self, channel: Channel, reason: str, num_turns: int = _MAX_TURNS_TO_READ) -> None:
        """A connection broke, and the ROUTER may still hold a goodbye of its peer."""
        if num_turns and self._router is not None and self._router.reader.has_input():
            self._router.reader.drain_soon()  # this look may have consumed the edge that reports new messages
            self._loop.call_soon(self.lose_when_read, channel, reason, num_turns - 1)
        else:
            self.lost(channel, reason)

    @property
    def num_inbound(self) -> int:
        """Connections to this peer that are open, as far as it has noticed."""
        return len(self._inbound)

    @property
    def num_unknown(self) -> int:
        """Of them, those whose peer has said no hello."""
        return sum(not channel.peer for channel in self._unknown_since_s)

    def expire(self, now_s: float) -> None:
        """Forget connections whose peer says no hello."""
        for channel, since_s in list(self._unknown_since_s.items()):
            if channel.peer:
                del self._unknown_since_s[channel]
            elif now_s - since_s > _HELLO_TIMEOUT_S:
                self._counters.add("connections_without_hello")
                self.drop(channel)

    def greeted(self) -> list[Channel]:
        """Channels on which a hello was sent or received, or may be on its way."""
        return [*self._dealers, *(channel for channel in self._inbound.values() if channel.peer)]

    async def part(self) -> None:
        """Wait until the peers, which were told goodbye, have closed their connections; for a moment at most.

        One that saw ours close before it read the goodbye would take this peer for dead.
        """
        ends_s = time.monotonic() + _LINGER_MS / 1000
        while time.monotonic() < ends_s and any(channel.peer for channel in self._inbound.values()):
            await asyncio.sleep(_PARTING_CHECK_S)

    def close(self) -> None:
        """Close every socket. What was sent last, the goodbyes, gets a moment to leave, for which the end of the context waits.

        Nothing depends on its arrival: what must arrive was acknowledged before.
        """
        for channel, dealer in self._dealers.items():
            channel.is_broken = True
            dealer.close(_LINGER_MS)
        self._dealers.clear()
        if self._router is not None:
            self._router.monitor.close()
            self._router.reader.close()
            self._router.socket.close(_LINGER_MS)
