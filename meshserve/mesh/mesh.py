"""One peer's membership of a mesh: who is there, and calls to them. What the floors above know of the network."""

import asyncio
import logging
import random
import secrets
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from meshserve import __version__
from meshserve.config import FIRST_PORT, MeshConfig
from meshserve.errors import Cancelled, HandshakeRefused, MeshserveError, PeerLost, ProtocolError
from meshserve.mesh.addresses import Addresses, choose_addresses, local_addresses, parse_host_port, resolve
from meshserve.mesh.calls import CallTable, Handler, IncomingCall, OutgoingCall, Sink
from meshserve.mesh.handshake import DialFailed, Dialler, check_hello
from meshserve.mesh.keys import MeshKey, read_key_file
from meshserve.mesh.membership import Change, Dial, Member, Membership
from meshserve.mesh.tasks import TaskOwner
from meshserve.mesh.transport.binding import BoundPorts, bind_port_block
from meshserve.mesh.transport.channel import Channel
from meshserve.mesh.transport.sockets import SocketFactory
from meshserve.mesh.transport.transport import Transport
from meshserve.telemetry import Counters
from meshserve.wire import frames
from meshserve.wire.card import ModelCard
from meshserve.wire.frames import Message
from meshserve.wire.hello import Hello, PeerHint, PeerInfo

_log = logging.getLogger(__name__)

_GOSSIP_FANOUT = 3
_GOSSIP_INTERVAL_S = 0.5
_GOSSIP_QUIET_INTERVAL_S = 5.0
_STRANGER_TIMEOUT_S = 10.0

Listener = Callable[[Change, Member], None]


class _OneAnswer:
    """The sink of a call that wants its end value only."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def on_item(self, item: Any) -> None:
        pass

    def on_end(self, value: Any) -> None:
        if not self.answer.done():
            self.answer.set_result(value)

    def on_error(self, error: MeshserveError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Mesh:
    """A peer, as its roles see it: others with their state, calls to them and to itself, and word of what changes.

    Life: `start` (bind), register handlers, `join` (be found), ..., `announce_draining`, `close`.
    """

    def __init__(self, config: MeshConfig, card: ModelCard | None = None, counters: Counters | None = None) -> None:
        self.config = config
        self.counters = counters or Counters()
        self.incarnation = secrets.token_hex(8)
        self.tasks = TaskOwner()
        self._card = card
        self._listeners: list[Listener] = []
        self._dealers: dict[str, Channel] = {}
        self._inbound: dict[str, Channel] = {}
        self._is_dial_due = self._is_changed = False
        self.refused: dict[str, str] = {}
        """Who could not be joined, and why: for people."""

    # --- life

    async def start(self) -> None:
        """Bind this peer's ports (an observer binds none). Raises StartupFailed, UsageError or KeyRefused."""
        self._loop = asyncio.get_running_loop()
        self._started_s = self._loop.time()
        addresses = choose_addresses(self.config.interface, local_addresses())
        self.key: MeshKey | None = read_key_file(Path(self.config.key_file)) if self.config.key_file else None
        self.factory = SocketFactory(self.config.transport, self.key, self.counters)
        self.factory.set_silence_limit(self.config.failure_timeout_s + self.config.death_timeout_s)
        try:
            self._open(addresses)
        except BaseException:
            self.factory.close()
            raise

    def _open(self, addresses: Addresses) -> None:
        self._addresses = addresses
        self.ports: BoundPorts | None = None
        if self.config.roles:
            self.ports = bind_port_block(self.factory, addresses.bind_hosts, self.config.port)
        port = self.ports.first if self.ports else 0
        name = self.config.name or f"{socket.gethostname().split('.')[0]}-{self.incarnation[:4]}"
        advertised = addresses.advertised if self.config.roles else ()
        self.own = PeerInfo(self.incarnation, name, self.config.mesh, self.config.roles, advertised, port, __version__, self._card)
        self.membership = Membership(self.own, self.config, self._loop.time())
        self.transport = Transport(self.factory, self.config.transport, self.counters, self._on_message, self._on_lost)
        self.transport.loopback.peer = self.incarnation
        if self.ports is not None:
            self.transport.adopt_router(self.ports.calls)
        self.calls = CallTable(self.config.transport.max_streams_per_peer, self.name_of)
        self._dialler = Dialler(self.config, self.transport, self._hello)
        self._discovery: Any = None

    async def join(self, http: str | None = None) -> None:
        """Find others and be found, from now on until `close`. Returns at once; peers come as they answer."""
        self.own = self.membership.own = PeerInfo(
            self.own.incarnation,
            self.own.name,
            self.own.mesh,
            self.own.roles,
            self.own.addresses,
            self.own.port,
            __version__,
            self._card,
            http,
        )
        for seed in self.config.seeds:
            host, port = parse_host_port(seed, FIRST_PORT)
            self.tasks.spawn(self._seed(host, port))
        self.tasks.spawn(self._tick_forever())
        if self.config.use_mdns:
            await self._start_discovery()

    async def _seed(self, host: str, port: int) -> None:
        while not (found := await asyncio.to_thread(resolve, host)):
            _log.warning("--peer %s: no such host; trying again", host)
            await asyncio.sleep(self.config.redial_max_s)
        for address in found[:4]:
            self.membership.seed(address, port, self._loop.time())
        self._dial_soon()

    async def _start_discovery(self) -> None:
        from meshserve.mesh.discovery import MdnsDiscovery  # a slow import that peers without mDNS need not wait for

        discovery = MdnsDiscovery(self.own.mesh, self.incarnation, self._addresses.mdns_interfaces, self._on_hint)
        try:
            await discovery.start()
        except OSError as error:
            _log.warning("mDNS does not work here (%s): peers are found by --peer only", error.strerror or error)
            return
        self._discovery = discovery
        if self.config.roles:
            discovery.announce(self.own)

    def announce_draining(self) -> None:
        """Tell all peers that this one takes no new work."""
        self.own = self.membership.own = self.own.draining()
        for channel in self._dealers.values():
            channel.send([frames.HELLO, self._hello(None).to_wire()])

    async def close(self) -> None:
        """Say goodbye, end all streams, and give everything back."""
        self.calls.close()
        for channel in self._dealers.values():
            channel.send([frames.GOODBYE, "bye"])
        self.transport.turn.flush()
        if self._dealers:
            await asyncio.sleep(0.02)  # LINGER is 0: ZeroMQ's own thread gets a moment to send the goodbyes, which nothing depends on
        await self.tasks.close()
        if self._discovery is not None:
            await self._discovery.close()
        self.transport.close()
        if self.ports is not None:
            self.ports.close()
        self.factory.close()

    # --- who is there

    def subscribe(self, listener: Listener) -> None:
        """Be called with every change of a peer (not of observers, nor of this peer)."""
        self._listeners.append(listener)

    def member(self, incarnation: str) -> Member | None:
        """The live or suspect peer of this incarnation, if there is one."""
        return self.membership.members.get(incarnation)

    def name_of(self, incarnation: str) -> str:
        """For people: a peer's name, or what is known of it."""
        if incarnation == self.incarnation:
            return self.own.name
        member = self.membership.members.get(incarnation)
        return member.shown_name if member is not None else f"a peer that left ({incarnation[:4]})"

    def info_of(self, incarnation: str) -> PeerInfo | None:
        """What a peer (this one included) said of itself."""
        if incarnation == self.incarnation:
            return self.own
        member = self.membership.members.get(incarnation)
        return member.info if member is not None else None

    def peers_with(self, role: str) -> list[PeerInfo]:
        """Peers that can take work in this role now, oldest first; this peer too, if it holds it."""
        own = [self.own] if role in self.own.roles and not self.own.is_draining else []
        return own + [member.info for member in self.membership.listed() if role in member.info.roles and member.can_take_work]

    def can_take_work(self, incarnation: str) -> bool:
        """Alive, reachable and not draining; this very peer always is, until it drains."""
        if incarnation == self.incarnation:
            return not self.own.is_draining
        member = self.membership.members.get(incarnation)
        return member is not None and member.can_take_work

    # --- calls

    def serve(self, method: str, handler: Handler) -> None:
        """Answer calls of this method. The handler returns at once and ends the call when it is done."""
        self.calls.handlers[method] = handler

    def serve_async(self, method: str, handler: Callable[[IncomingCall], Awaitable[Any]]) -> None:
        """The same for a coroutine: its result ends the call, its MeshserveError fails it, a cancelled call cancels it."""

        async def run(call: IncomingCall) -> None:
            try:
                call.end(await handler(call))
            except MeshserveError as error:
                call.fail(error)
            except asyncio.CancelledError:
                call.fail(Cancelled("cancelled"))
                raise
            except Exception as error:
                _log.exception("%s failed", method)
                call.fail(MeshserveError(f"{method} failed: {type(error).__name__}"))

        def start(call: IncomingCall) -> None:
            task = self.tasks.spawn(run(call))
            call.on_cancel = task.cancel

        self.serve(method, start)

    def open(self, peer: str, method: str, body: Any, sink: Sink, timeout_s: float) -> OutgoingCall:
        """Open a stream to a peer, or to this one. Raises PeerLost at once if there is no connection to it."""
        channel = self.transport.loopback if peer == self.incarnation else self._dealers.get(peer)
        if channel is None:
            name = self.name_of(peer)
            raise PeerLost(f"no connection to {name}", peer=name)
        return self.calls.open(channel, method, body, sink, self._loop.time(), timeout_s)

    async def call(self, peer: str, method: str, body: Any, timeout_s: float) -> Any:
        """Open a stream and wait for its end value. Raises the MeshserveError it ends in; cancelling cancels the call."""
        sink = _OneAnswer()
        opened = self.open(peer, method, body, sink, timeout_s)
        try:
            return await sink.answer
        except asyncio.CancelledError:
            opened.cancel()
            raise

    # --- what comes in

    def _on_message(self, channel: Channel, message: Message) -> None:
        kind = message[0]
        if channel.peer:
            if kind >= frames.OPEN:
                self._heard(channel.peer)
                self.calls.received(channel, message, self._loop.time())
                return
        elif kind not in (frames.HELLO, frames.WELCOME, frames.REFUSED):
            self.counters.add("messages_before_hello")
            return
        self._on_control(channel, kind, message)

    def _heard(self, peer: str) -> None:
        member = self.membership.members.get(peer)
        if member is not None:
            if member.state == "alive":
                member.heard_s = self._loop.time()
            else:
                self._tell(self.membership.heard(peer, self._loop.time()))

    def _on_control(self, channel: Channel, kind: int, message: Message) -> None:
        if kind == frames.HELLO:
            self._on_hello(channel, message[1])
        elif kind in (frames.WELCOME, frames.REFUSED):
            if not self._dialler.answered(channel, message) and kind == frames.WELCOME and channel.peer:
                self._on_news(channel, message[1])
        elif kind == frames.PING:
            self._heard(channel.peer)
            channel.send([frames.PONG, message[1]])
        elif kind == frames.PONG:
            self._on_pong(channel.peer, message[1])
        elif kind == frames.GOODBYE:
            self._forget(channel.peer, "it left")
            self._tell(self.membership.goodbye(channel.peer, self._loop.time()))

    def _on_hello(self, channel: Channel, data: Any) -> None:
        try:
            hello = check_hello(data, self.own.mesh)
            if hello.peer.incarnation == self.incarnation:
                raise HandshakeRefused("you dialled yourself")
        except ProtocolError:
            self.counters.add("hellos_malformed")
            return
        except HandshakeRefused as error:
            self.counters.add("hellos_refused")
            channel.send([frames.REFUSED, error.to_wire()])
            return
        if channel.peer not in ("", hello.peer.incarnation):
            return
        channel.peer = hello.peer.incarnation
        before = self._inbound.get(channel.peer)
        if before is not None and before is not channel:
            self.calls.peer_stopped_listening(channel.peer)
            self.transport.drop(before)
        self._inbound[channel.peer] = channel
        self._learn(hello)
        channel.send([frames.WELCOME, self._hello(None).to_wire()])

    def _on_news(self, channel: Channel, data: Any) -> None:
        """A peer that we dialled answers a repeated hello."""
        try:
            hello = check_hello(data, self.own.mesh)
        except (ProtocolError, HandshakeRefused):
            self.counters.add("hellos_malformed")
            return
        if hello.peer.incarnation == channel.peer:
            self._learn(hello)

    def _learn(self, hello: Hello) -> None:
        now_s = self._loop.time()
        self._tell(self.membership.hello(hello.peer, hello.age_s, now_s))
        for hint in hello.hints:
            self.membership.hint(hint, now_s)
        self._dial_soon()

    def _on_hint(self, hint: PeerHint) -> None:
        self.membership.hint(hint, self._loop.time())
        self._dial_soon()

    def _on_pong(self, peer: str, number: int) -> None:
        self._heard(peer)
        member = self.membership.members.get(peer)
        rtt_ms = self._loop.time() * 1000 - number / 1000  # the ping carried our own clock, in microseconds
        if member is not None and 0 <= rtt_ms < 1e6:
            member.rtt_ms = rtt_ms

    def _on_lost(self, channel: Channel, reason: str) -> None:
        if not channel.peer:
            self._dialler.lost(channel, reason)
        elif self._dealers.get(channel.peer) is channel:
            del self._dealers[channel.peer]
            self.calls.peer_lost(channel.peer, reason)
            self._tell(self.membership.unlinked(channel.peer, self._loop.time()))
            self._dial_soon()
        elif self._inbound.get(channel.peer) is channel:
            del self._inbound[channel.peer]
            self.calls.peer_stopped_listening(channel.peer)

    # --- what goes out

    def _hello(self, expected: str | None) -> Hello:
        return Hello(self.own, self._loop.time() - self._started_s, self.membership.hints(), expected)

    def _dial_soon(self) -> None:
        if not self._is_dial_due:
            self._is_dial_due = True
            self._loop.call_soon(self._dial_due)

    def _dial_due(self) -> None:
        self._is_dial_due = False
        for dial in self.membership.due_dials(self._loop.time()):
            self.tasks.spawn(self._dial(dial))

    async def _dial(self, dial: Dial) -> None:
        try:
            reached = await self._dialler.dial(dial)
        except DialFailed as error:
            self._note_refusal(dial, error)
            self._tell(self.membership.dial_failed(dial.key, error.is_refused, self._loop.time()))
            return
        incarnation = reached.hello.peer.incarnation
        self.refused.pop(dial.key, None)
        reached.channel.peer = incarnation
        self._learn(reached.hello)
        self.membership.dial_found(dial.key, incarnation, self._loop.time())
        if incarnation in self._dealers:
            self.transport.drop(reached.channel)
            return
        self._dealers[incarnation] = reached.channel
        self._tell(self.membership.linked(incarnation, reached.address, self._loop.time()))

    def _note_refusal(self, dial: Dial, error: DialFailed) -> None:
        if self.refused.get(dial.key) != error.message and not error.is_refused and "dialled yourself" not in error.message:
            _log.warning(
                "cannot join %s: %s",
                dial.key if dial.incarnation is None else f"the peer at {dial.addresses[0]}:{dial.port}",
                error.message,
            )
        if len(self.refused) < 256:
            self.refused[dial.key] = error.message

    def _tell(self, changes: list[tuple[Change, Member]]) -> None:
        for change, member in changes:
            if change in (Change.DIED, Change.LEFT):
                self._forget(member.info.incarnation, "it died" if change is Change.DIED else "it left")
            self._is_changed = True
            if not member.info.is_observer:
                for listener in self._listeners:
                    listener(change, member)

    def _forget(self, incarnation: str, reason: str) -> None:
        for channel in (self._dealers.pop(incarnation, None), self._inbound.pop(incarnation, None)):
            if channel is not None:
                self.transport.drop(channel)
        self.calls.peer_lost(incarnation, reason)

    # --- time

    async def _tick_forever(self) -> None:
        next_gossip_s = lonely_s = 0.0
        while True:
            now_s = self._loop.time()
            self._tick(now_s)
            if now_s >= next_gossip_s:
                next_gossip_s = now_s + (_GOSSIP_INTERVAL_S if self._is_changed else _GOSSIP_QUIET_INTERVAL_S)
                self._gossip()
            if not lonely_s and now_s - self._started_s > self.config.lonely_after_s:
                lonely_s = now_s
                self._warn_if_lonely()
            await asyncio.sleep(self.config.tick_interval_s)

    def _tick(self, now_s: float) -> None:
        actions = self.membership.tick(now_s)
        self._tell(actions.changes)
        for dial in actions.dials:
            self.tasks.spawn(self._dial(dial))
        number = int(now_s * 1e6)
        for incarnation in actions.pings:
            channel = self._dealers.get(incarnation)
            if channel is not None:
                channel.send([frames.PING, number])
        self.calls.expire(now_s)

    def _gossip(self) -> None:
        """Tell a few peers whom we know: rumours reach all in a few rounds, at a cost that does not grow with the mesh."""
        fanout = _GOSSIP_FANOUT if self._is_changed else 1
        self._is_changed = False
        channels = list(self._dealers.values())
        for channel in random.sample(channels, min(fanout, len(channels))):
            channel.send([frames.HELLO, self._hello(None).to_wire()])

    def _warn_if_lonely(self) -> None:
        if not self._dealers and set(self.own.roles) != {"frontend", "processor", "router", "decode", "prefill"}:
            reasons = f" ({'; '.join(sorted(set(self.refused.values())))})" if self.refused else ""
            _log.warning(
                "no other peer of mesh %r found yet%s. Are they on this network? Try --peer HOST with the address of one of them.",
                self.own.mesh,
                reasons,
            )
