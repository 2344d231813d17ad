"""The call sockets of one peer: a ROUTER that is bound, and a DEALER for every peer that it calls."""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

import zmq

from meshserve.config import TransportConfig
from meshserve.errors import PeerLost, ProtocolError
from meshserve.mesh.calls import CONNECTION_CLOSED
from meshserve.mesh.transport.channel import Channel
from meshserve.mesh.transport.reading import KEYS_DIFFER, ConnectionMonitor, SocketReader
from meshserve.mesh.transport.sockets import SocketFactory, endpoint
from meshserve.mesh.transport.strangers import OnStranger, StrangerMonitor
from meshserve.telemetry import Counters
from meshserve.wire import frames
from meshserve.wire.frames import Envelope

OnFrame = Callable[[Channel, list[Envelope]], None]
OnOwn = Callable[[list[Envelope]], None]
OnLost = Callable[[Channel, str], None]

_log = logging.getLogger(__name__)

_NOBLOCK, _NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_RETRY_S = 0.005
_MAX_CHANNELS = 4096
_HOLD_S = 0.0005
_MAX_HELD = 7
"""Turns that items wait for more, if the last message left so lately: an engine without delays has some for every stream in each turn, and
a message costs both sides as much as ten tokens, and the client's side a write. Calls do not wait."""
_MAX_ROUNDS = 64
"""Of messages between roles of one peer, in one turn. A request takes four."""


class Turn:
    """Collects the channels that have something to send, and flushes them once a turn of the event loop.

    What this peer's roles have to say to each other is delivered first, and what they answer to that: a request passes from one to the
    next in one turn, and what comes of it leaves with the rest. Never within a send, so that nobody is called back by what he calls.
    """

    def __init__(self, on_broken: Callable[[Channel], None], deliver: Callable[[list[Envelope]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._dirty: list[Channel] = []
        self._is_due = self._is_delivering = False
        self._sent_s, self._num_held = -1.0, 0
        self._on_broken, self._deliver = on_broken, deliver
        self._afterwards: list[Callable[[], None]] = []
        self._later: list[Callable[[], None]] = []
        self.loopback: Channel | None = None
        """Ends in this very peer; set by whoever makes it."""

    def schedule(self, channel: Channel) -> None:
        """Flush this channel at the end of the turn."""
        self._dirty.append(channel)
        self.flush_soon()

    def flush_soon(self) -> None:
        """At the end of the turn there is something to do."""
        if not self._is_due and not self._is_delivering:
            self._is_due = True
            self._loop.call_soon(self._flush_unless_held)

    def afterwards(self, callback: Callable[[], None]) -> None:
        """Call this once at the end of the turn, when the roles have no more to say to each other and what is for others is sent."""
        self._afterwards.append(callback)
        self.flush_soon()

    def later(self, callback: Callable[[], None]) -> None:
        """The same, but after all of those: for what nobody waits for."""
        self._later.append(callback)
        self.flush_soon()

    def hurry(self) -> None:
        """Send what is ready for other peers now, where nothing more comes in this turn: a turn of the loop costs 5 us.

        What this peer's own roles say to each other keeps to the end of the turn.
        """
        if self._dirty and self.loopback is not None and not self.loopback.is_dirty:
            self.flush()

    def _deliver_loopback(self, loopback: Channel) -> None:
        self._is_delivering = True
        try:
            for _ in range(_MAX_ROUNDS):
                messages = loopback.take_unpacked()
                if not messages:
                    return
                self._deliver(messages)
        finally:
            self._is_delivering = False
        if loopback.is_dirty:  # roles that never come to an end: others have their turn
            self.flush_soon()

    def _flush_unless_held(self) -> None:
        """The end of a turn in which nothing was read. Who sends turn by turn, as an engine without delays does, sends a few at a time."""
        if self._is_due and self._num_held < _MAX_HELD and self._may_wait():
            self._num_held += 1
            self._loop.call_soon(self._flush_unless_held)  # first, as it must come whatever the roles do
            if self.loopback is not None and self.loopback.is_dirty:
                self._deliver_loopback(self.loopback)
            return
        if self._is_due:
            self.flush()

    def _may_wait(self) -> bool:
        if not self._dirty or time.monotonic() - self._sent_s >= _HOLD_S:
            return False
        return not any(channel.is_urgent for channel in self._dirty)

    def flush(self) -> None:
        """Send what is ready now. Called early at the end of a batch of input, where all answers to it are known."""
        if self._is_delivering:
            return
        self._is_due = False
        if self.loopback is not None and self.loopback.is_dirty:
            self._deliver_loopback(self.loopback)
        dirty, self._dirty = self._dirty, []
        if dirty:
            self._sent_s, self._num_held = time.monotonic(), 0
        for channel in dirty:
            if not channel.flush():
                self._loop.call_later(_RETRY_S, self._retry, channel)
            if channel.is_broken:
                _call_all([partial(self._on_broken, channel)])
        if self._afterwards:
            callbacks, self._afterwards = self._afterwards, []
            _call_all(callbacks)
        if self._later:
            callbacks, self._later = self._later, []
            _call_all(callbacks)

    def _retry(self, channel: Channel) -> None:
        if not channel.is_dirty and not channel.is_broken:
            channel.is_dirty = True
            self.schedule(channel)


def _call_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except Exception:  # a fault of ours: what others wait for must come all the same
            _log.exception("what was left for the end of a turn failed")


class _Dealer:
    """One outgoing connection and its socket."""

    def __init__(self, transport: "Transport", socket: "zmq.Socket[bytes]") -> None:
        self.socket = socket
        self.channel = Channel(transport.config, self._send, transport.turn.schedule)
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


class Transport:
    """Sends and receives messages on channels; knows nothing of what they mean but how long they may be."""

    def __init__(
        self, factory: SocketFactory, config: TransportConfig, counters: Counters, on_frame: OnFrame, on_own: OnOwn, on_lost: OnLost
    ) -> None:
        """`on_own` is given what is sent on `loopback`."""
        self.config, self._factory, self._counters = config, factory, counters
        self._on_frame, self._on_lost = on_frame, on_lost
        self.turn = Turn(lambda channel: self.lost(channel, "overflow or unreachable"), on_own)
        self._dealers: dict[Channel, _Dealer] = {}
        self._inbound: dict[bytes, Channel] = {}
        self._routing_ids: dict[Channel, bytes] = {}
        self._router: zmq.Socket[bytes] | None = None
        self._router_reader: SocketReader | None = None
        self._strangers: StrangerMonitor | None = None
        self.loopback = self.turn.loopback = Channel(config, self._send_to_self, lambda channel: self.turn.flush_soon())
        self.loopback.is_local = True

    def adopt_router(self, socket: "zmq.Socket[bytes]", on_stranger: OnStranger) -> None:
        """Serve this bound ROUTER socket; closes with the transport. Who fails its handshake is told of, and never heard."""
        self._router = socket
        self._strangers = StrangerMonitor(socket, self._factory.has_key, self._counters, on_stranger)
        self._router_reader = SocketReader(socket, self._on_router_frames, self.turn.flush, self.config.max_reads_per_turn)

    async def dial(self, host: str, port: int, timeout_s: float) -> Channel:
        """Connect to a peer's calls port. Raises PeerLost with the reason: refused, timed out, keys differ."""
        socket = self._factory.client_socket(zmq.DEALER)
        dealer = _Dealer(self, socket)
        try:
            socket.connect(endpoint(host, port))
            async with asyncio.timeout(timeout_s):
                await dealer.is_up
        except TimeoutError as error:
            dealer.close()
            raise PeerLost(f"{host}:{port} does not answer") from error
        except zmq.ZMQError as error:
            dealer.close()
            raise PeerLost(f"{host}:{port}: {error.strerror}") from error
        except BaseException:
            dealer.close()
            raise
        self._dealers[dealer.channel] = dealer
        return dealer.channel

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
        """A connection ended that nobody ended on purpose. Its owner is told, if it is there: only he can make a new one."""
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
        if channel is None:
            if len(self._inbound) >= _MAX_CHANNELS:
                self._counters.add("channels_refused")
                return
            channel = self._accept(parts[0])
        self.received(channel, parts[-1])

    def _accept(self, routing_id: bytes) -> Channel:
        def send(data: bytes) -> bool:
            assert self._router is not None and self._router_reader is not None
            try:
                self._router.send(routing_id, _NOBLOCK_MORE)
                self._router.send(data, _NOBLOCK)
            except zmq.Again:
                return False
            except zmq.ZMQError as error:
                raise OSError(error.errno, error.strerror) from error
            finally:
                self._router_reader.drain_soon()  # as above
            return True

        channel = Channel(self.config, send, self.turn.schedule)
        self._inbound[routing_id] = channel
        self._routing_ids[channel] = routing_id
        return channel

    def inbound_channels(self) -> list[Channel]:
        """Channels of connections that others made to us."""
        return list(self._routing_ids)

    def _send_to_self(self, data: bytes) -> bool:
        raise AssertionError("loopback messages are never packed")

    def close(self) -> None:
        """Close every socket. What waits to be sent is lost: what must arrive was acknowledged before."""
        for channel in list(self._dealers):
            self.drop(channel)
        if self._router_reader is not None and self._router is not None:
            if self._strangers is not None:
                self._strangers.close()
            self._router_reader.close()
            self._router.close()
            self._router = None
