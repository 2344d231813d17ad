"""The call sockets of one peer: a ROUTER that is bound, and a DEALER for every peer that it calls."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import zmq

from meshserve.config import TransportConfig
from meshserve.errors import PeerLost, ProtocolError
from meshserve.mesh.calls import CONNECTION_CLOSED
from meshserve.mesh.transport.channel import Channel, SendFrame, Turn
from meshserve.mesh.transport.reading import KEYS_DIFFER, ConnectionMonitor, OnStranger, RouterReader, SocketReader, StrangerMonitor
from meshserve.mesh.transport.sockets import SocketFactory, endpoint
from meshserve.telemetry import Counters
from meshserve.wire import frames
from meshserve.wire.frames import Envelope

OnFrame = Callable[[Channel, list[Envelope]], None]
OnLost = Callable[[Channel, str], None]

_NOBLOCK, _NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_MAX_CHANNELS = 4096


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
            self._transport.lost(self.channel, reason)

    def close(self) -> None:
        if not self.is_up.done():
            self.is_up.cancel()
        self._monitor.close()
        self.reader.close()
        self.socket.close()


class _Router(NamedTuple):
    """The socket that others connect to."""

    socket: "zmq.Socket[bytes]"
    reader: SocketReader
    monitor: StrangerMonitor


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
        self.turn = turn
        self._dealers: dict[Channel, _Dealer] = {}
        self._inbound: dict[bytes, Channel] = {}
        self._routing_ids: dict[Channel, bytes] = {}
        self._router: _Router | None = None

    def serve(self, socket: "zmq.Socket[bytes]", on_stranger: OnStranger) -> None:
        """Read and close this bound ROUTER. A stranger, which fails its handshake, is told of and never heard."""
        max_reads = self.config.max_reads_per_turn
        reader = RouterReader(socket, self._on_router_frames, self.turn.flush, max_reads, self._inbound, self._accept)
        monitor = StrangerMonitor(socket, self._factory.has_key, self._counters, on_stranger)
        self._router = _Router(socket, reader, monitor)

    async def dial(self, host: str, port: int, timeout_s: float) -> Channel:
        """Connect to a peer's calls port. Raises PeerLost with the reason: refused, timed out, keys differ."""
        socket = self._factory.client_socket(zmq.DEALER)
        dealer = _Dealer(self, socket)
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
        return Channel(self.config, self.turn, send, lambda channel: self.lost(channel, "overflow or unreachable"))

    def drop(self, channel: Channel) -> None:
        """Forget a channel and close its socket if it has one of its own. Safe to call twice."""
        channel.is_broken = True
        dealer = self._dealers.pop(channel, None)
        if dealer is not None:
            dealer.close()
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

    def _accept(self, routing_id: bytes, address: str) -> None:
        if len(self._inbound) >= _MAX_CHANNELS:
            self._counters.add("channels_refused")
            return
        assert self._router is not None
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
        channel.far_address = address
        self._inbound[routing_id] = channel
        self._routing_ids[channel] = routing_id

    def close(self) -> None:
        """Close every socket. What waits to be sent is lost: what must arrive was acknowledged before."""
        for channel in list(self._dealers):
            self.drop(channel)
        if self._router is not None:
            self._router.monitor.close()
            self._router.reader.close()
            self._router.socket.close()
