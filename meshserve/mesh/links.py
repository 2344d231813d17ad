"""The links of one peer: what it does to be and stay in its mesh. Dials, hellos, pings and goodbyes."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from meshserve.config import ROLES, MeshConfig
from meshserve.errors import HandshakeRefused, ProtocolError
from meshserve.mesh.calls import CONNECTION_CLOSED, PEER_DIED, PEER_LEFT, CallTable
from meshserve.mesh.handshake import DialFailed, Dialler, check_hello
from meshserve.mesh.hearsay import Dial
from meshserve.mesh.interfaces import Addresses
from meshserve.mesh.membership import Change, Member, Membership, PeerState
from meshserve.mesh.search import Search
from meshserve.mesh.sightings import Sightings, describe_stranger
from meshserve.mesh.tasks import TaskOwner
from meshserve.mesh.transport.channel import Channel
from meshserve.mesh.transport.sockets import SocketFactory
from meshserve.mesh.transport.transport import Transport
from meshserve.telemetry import Counters, log_event
from meshserve.wire import frames
from meshserve.wire.frames import Envelope
from meshserve.wire.hello import MAX_HINTS, Hello, PeerHint, PeerInfo

_log = logging.getLogger(__name__)

_GOSSIP_FANOUT = 3
_GOSSIP_INTERVAL_S, _GOSSIP_QUIET_INTERVAL_S = 0.2, 5.0
_MAX_INBOUND_PER_PEER = 8
_MAX_ERRORS, _MAX_NUMBERED = 32, 4096


class Links:
    """Owns the transport and the membership."""

    def __init__(
        self, config: MeshConfig, own: PeerInfo, addresses: Addresses, factory: SocketFactory, counters: Counters, calls: CallTable
    ) -> None:
        self._config, self._counters, self._calls = config, counters, calls
        self._loop = asyncio.get_running_loop()
        self._started_s = time.monotonic()
        self.own = own
        self._addresses = addresses
        self.membership = Membership(own, config, self._started_s)
        self.transport = Transport(factory, config.transport, counters, calls.turn, self._on_frame, self._on_lost)
        self.listeners: list[Callable[[Change, Member], None]] = []
        self.refused: dict[str, str] = {}
        """Peers that could not be joined, and why: for people."""
        self.sightings = Sightings()
        self.channels: dict[str, Channel] = {}
        """Our own connection to each peer that is up."""
        self._inbound: dict[str, list[Channel]] = {}
        self._num_lost: dict[str, int] = {}
        """Number of lost connections to each peer, by incarnation."""
        self._dialler = Dialler(config, self.transport, self._hello, addresses)
        self.search = Search(config, self._on_seed, self._on_announced, self._started_s)
        self._tasks = TaskOwner()
        self._is_dial_due = self._is_changed = self._is_leaving = False
        self._errors: set[str] = set()

    # --- life

    async def join(self) -> None:
        """Find others and be found, from now on until `close`. Returns at once; peers come as they answer."""
        self._tasks.spawn(self._tick_forever())
        await self._search_now()

    async def _search_now(self) -> None:
        interfaces = self._addresses.mdns_interfaces
        await self.search.ask(self.own, interfaces, time.monotonic())
        if interfaces != self._addresses.mdns_interfaces:  # they changed meanwhile
            await self._search_now()

    def _on_seed(self, host: str, port: int) -> None:
        self.membership.hearsay.seed(host, port, time.monotonic())
        self._dial_soon()

    def moved(self, addresses: Addresses) -> None:
        """This host has other addresses: connections from one that it no longer has are made again, and failed dials are tried again."""
        self._addresses = self._dialler.addresses = addresses
        here = {local.address for local in addresses.local}
        for channel in list(self.channels.values()):
            near = channel.near_address.partition("%")[0]
            if near and near not in here and not near.startswith("127."):
                self.transport.lost(channel, "this host's address changed")
        self.membership.network_changed(time.monotonic())
        self.search.start_over()
        self._tasks.spawn(self._search_now())
        self._dial_soon()

    def is_dialled_by(self, incarnation: str) -> bool:
        """Whether a connection that this peer made to us is open."""
        return bool(self._inbound.get(incarnation))

    def announce(self, own: PeerInfo) -> None:
        """Tell all peers what changed about this one."""
        self.own = self.membership.own = own
        for channel in self.channels.values():
            channel.send([frames.HELLO, self._hello(None).to_wire()])

    async def close(self) -> None:
        """Say goodbye on each channel that may have had a hello, so that no peer counts us as dead; then release everything."""
        self._is_leaving = self._dialler.is_closed = True
        for channel in self.transport.greeted():
            channel.send([frames.GOODBYE, "bye"])
        self.transport.turn.flush()
        await self.transport.part()
        self.transport.close()  # before the tasks end: a cancelled dial would drop its connection and the unsent goodbye
        await self._tasks.close()
        await self.search.close()

    # --- what comes in

    def _on_frame(self, channel: Channel, messages: list[Envelope]) -> None:
        """Any frame is one sign of life, however many streams' messages it holds."""
        now_s = time.monotonic()
        if channel.peer:
            self._heard(channel.peer, now_s)
        receive = self._calls.received
        for message in messages:
            if channel.is_broken and not self.transport.is_open(channel):  # for example after a goodbye
                return
            kind = message[0]
            if kind >= frames.OPEN and channel.peer:
                receive(channel, message, now_s)
            elif kind == frames.CREDIT:
                channel.credited(message[1])
            elif channel.peer or kind in (frames.HELLO, frames.WELCOME, frames.REFUSED):
                self._on_control(channel, kind, message)
            elif kind != frames.RESET:
                # Nothing of a stranger is read but a hello or the answer to ours: dropping the connection sends a RESET.
                # A RESET itself is not answered with another one.
                self._counters.add("messages_before_hello")
                self.transport.lost(channel, "it said no hello")
                return

    def _heard(self, peer: str, now_s: float) -> None:
        member = self.membership.members.get(peer)
        if member is not None:
            if member.state is PeerState.ALIVE:
                member.heard_s = now_s
            else:
                self._tell(self.membership.heard(peer, now_s))

    def _on_control(self, channel: Channel, kind: int, message: Envelope) -> None:
        if kind == frames.HELLO:
            self._on_hello(channel, message[1])
        elif kind in (frames.WELCOME, frames.REFUSED):
            if not self._dialler.answered(channel, message) and kind == frames.WELCOME and channel.peer:
                self._on_news(channel, message[1])
        elif kind == frames.PING:
            channel.send([frames.PONG, message[1]])
        elif kind == frames.PONG:
            self._on_pong(channel.peer, message[1])
        elif kind == frames.RESET:
            if self.channels.get(channel.peer) is channel:
                self.transport.lost(channel, f"it was dropped there: {message[1][:80]}")
        elif kind == frames.GOODBYE:
            self._forget(channel.peer, PEER_LEFT)
            self._tell(self.membership.goodbye(channel.peer, time.monotonic()))

    def _on_hello(self, channel: Channel, data: Any) -> None:
        try:
            hello = check_hello(data, self.own)
            if hello.peer.incarnation == self.own.incarnation:
                raise HandshakeRefused("you dialled yourself", kind="self")
        except ProtocolError:
            self._counters.add("hellos_malformed")
            return
        except HandshakeRefused as error:
            self._counters.add("hellos_refused")
            if error.kind != "self":
                self.on_stranger(describe_stranger(data), error.message)
            channel.send([frames.REFUSED, error.to_wire()])
            return
        if channel.peer not in ("", hello.peer.incarnation):
            return
        self._learn(hello, channel.far_address)
        if hello.peer.incarnation not in self.membership.members:  # it left, and this is late
            self.transport.drop(channel)
            return
        channel.peer = hello.peer.incarnation
        if hello.expected in (None, self.own.incarnation):  # else the number counts the links to another incarnation
            self._accept(channel, hello.link_number)
        channel.send([frames.WELCOME, self._hello(None).to_wire()])
        if self._is_leaving:
            channel.send([frames.GOODBYE, "bye"])

    def _accept(self, channel: Channel, link_number: int) -> None:
        """A peer may have several connections to us for a while, if two of its dials were answered. All are kept.

        Connections with lower numbers were lost by the peer before this one: they are dropped, with their streams.
        """
        channels = self._inbound.setdefault(channel.peer, [])
        if channel in channels:
            return
        channel.link_number = link_number
        lost = [other for other in channels if other.link_number < link_number]
        for other in lost or channels[: max(0, len(channels) + 1 - _MAX_INBOUND_PER_PEER)]:
            channels.remove(other)
            self._calls.peer_stopped_listening(channel.peer, "its link broke", other)
            self.transport.drop(other)
        channels.append(channel)

    def _on_news(self, channel: Channel, data: Any) -> None:
        """A peer that we dialled answers a repeated hello."""
        try:
            hello = check_hello(data, self.own)
        except (ProtocolError, HandshakeRefused):
            self._counters.add("hellos_malformed")
            return
        if hello.peer.incarnation == channel.peer:
            self._learn(hello)

    def _learn(self, hello: Hello, speaks_from: str = "") -> None:
        now_s = time.monotonic()
        self._tell(self.membership.hello(hello.peer, hello.age_s, now_s, speaks_from))
        for hint in hello.hints:
            self.membership.hint(hint, hello.peer.incarnation, now_s)
        self._dial_soon()

    def _on_announced(self, mesh: str, hint: PeerHint) -> None:
        self.sightings.announced(mesh, hint)
        if mesh == self.own.mesh:
            self.membership.hint(hint, "mdns", time.monotonic())
            self._dial_soon()

    def on_stranger(self, who: str, reason: str) -> None:
        """A stranger was not let in."""
        if self.sightings.refused(who, reason, time.monotonic()):
            log_event(_log, "stranger_refused", f"refused {who or 'somebody'}: {reason}", who=who, reason=reason)

    def _on_pong(self, peer: str, number: int) -> None:
        member = self.membership.members.get(peer)
        rtt_ms = time.monotonic() * 1000 - number / 1000  # the ping carried our own clock, in microseconds
        if member is not None and 0 <= rtt_ms < 1e6:
            member.rtt_ms = rtt_ms

    def _on_lost(self, channel: Channel, reason: str) -> None:
        if not channel.peer:
            self._dialler.lost(channel, reason)
        elif self.channels.get(channel.peer) is channel:
            del self.channels[channel.peer]
            self._num_lost[channel.peer] = self._num_lost.pop(channel.peer, 0) + 1
            if len(self._num_lost) > _MAX_NUMBERED:
                del self._num_lost[next(iter(self._num_lost))]
            self._counters.add("links_lost")
            self._calls.peer_lost(channel.peer, reason)
            self._tell(self.membership.unlinked(channel.peer, time.monotonic()))
            self._dial_soon()
        elif channel in self._inbound.get(channel.peer, ()):
            self._inbound[channel.peer].remove(channel)
            self._calls.peer_stopped_listening(channel.peer, CONNECTION_CLOSED, channel)
            if not self._inbound[channel.peer] and channel.peer not in self.channels:  # a dial shows whether the peer lives
                self._tell(self.membership.unlinked(channel.peer, time.monotonic()))
                self._dial_soon()

    # --- what goes out

    async def introduce(self, host: str, port: int) -> PeerInfo:
        """Say hello at this address once and hang up: tells which peer is there, for diagnosis. Raises DialFailed."""
        reached = await self._dialler.dial(Dial("", (host,), port, None))
        self.transport.drop(reached.channel)
        return reached.hello.peer

    def _hello(self, expected: str | None) -> Hello:
        hints = () if self.own.is_observer else self.membership.hints()  # an observer must not join the peers that it looks at
        return Hello(self.own, time.monotonic() - self._started_s, hints[:MAX_HINTS], expected, self._num_lost.get(expected or "", 0))

    def _dial_soon(self) -> None:
        if not self._is_dial_due:
            self._is_dial_due = True
            self._loop.call_soon(self._dial_due)

    def _dial_due(self) -> None:
        self._is_dial_due = False
        for dial in self.membership.due_dials(time.monotonic()):
            self._tasks.spawn(self._dial(dial))

    async def _dial(self, dial: Dial) -> None:
        try:
            reached = await self._dialler.dial(dial)
        except OSError as error:  # for example no descriptors: the peer is dialled again later
            self._tell(self.membership.dial_failed(dial, False, time.monotonic()))
            _log.warning("cannot dial: %s", error.strerror)
            return
        except DialFailed as error:
            self._note_refusal(dial, error)
            self._tell(self.membership.dial_failed(dial, error.is_refused, time.monotonic(), error.answered_by))
            return
        incarnation = reached.hello.peer.incarnation
        self.refused.pop(dial.key, None)
        self.sightings.reached(dial)
        self._learn(reached.hello)
        self.membership.dial_found(dial.key, incarnation, time.monotonic())
        if incarnation in self.channels or incarnation not in self.membership.members:  # the other dial was faster; or it left
            self.transport.drop(reached.channel)
            return
        if reached.channel.is_broken:  # lost again before it could be of use
            self._tell(self.membership.dial_failed(dial, False, time.monotonic()))
        else:
            self.channels[incarnation] = reached.channel
            self._tell(self.membership.linked(incarnation, reached.address, time.monotonic()))

    def _note_refusal(self, dial: Dial, error: DialFailed) -> None:
        if self._is_leaving or self.membership.has_left(dial.incarnation):
            return
        if not error.is_refused and "dialled yourself" not in error.message:
            place = f"{dial.addresses[0]}:{dial.port}"
            num_times = self.sightings.not_reached(place, time.monotonic())
            if num_times:
                name = self.sightings.name_of_gone(dial.incarnation)
                who = place if dial.incarnation is None else f"{name} at {place}" if name else f"the peer at {place}"
                again = f" ({num_times} times so far)" if num_times > 1 else ""
                fields = {"incarnation": dial.incarnation, "reason": error.message, "times": num_times}
                log_event(_log, "cannot_join", f"cannot join {who}: {error.message}{again}", logging.WARNING, **fields)
        if len(self.refused) < 256:
            self.refused[dial.key] = error.message

    def _tell(self, changes: list[tuple[Change, Member]]) -> None:
        for change, member in changes:
            if change in (Change.DIED, Change.LEFT):
                self._forget(member.info.incarnation, PEER_DIED if change is Change.DIED else PEER_LEFT)
            if change is Change.MOVED:
                moved = self.channels.get(member.info.incarnation)
                if moved is not None:
                    self.transport.lost(moved, "the peer's address changed")
            self._is_changed = True
            if not member.info.is_observer:
                if change in (Change.DIED, Change.LEFT):
                    self.sightings.ended(change, member, time.monotonic())
                for listener in self.listeners:
                    self._safely(listener, change, member)

    def _forget(self, incarnation: str, reason: str) -> None:
        dealer = self.channels.pop(incarnation, None)
        for channel in [*self._inbound.pop(incarnation, ()), *([dealer] if dealer is not None else [])]:
            self.transport.drop(channel)
        self._calls.peer_lost(incarnation, reason)

    # --- time

    async def _tick_forever(self) -> None:
        last_gossip_s = lonely_s = 0.0
        while True:
            now_s = time.monotonic()
            self._safely(self._tick, now_s)
            if now_s - last_gossip_s >= (_GOSSIP_INTERVAL_S if self._is_changed else _GOSSIP_QUIET_INTERVAL_S):
                last_gossip_s = now_s
                self._safely(self._gossip)
            if not self.channels and not self.own.is_observer and self.search.is_due(now_s):
                self._tasks.spawn(self._search_now())
            if not lonely_s and now_s - self._started_s > self._config.lonely_after_s:
                lonely_s = now_s
                self._safely(self._warn_if_lonely)
            await asyncio.sleep(self._config.tick_interval_s)

    def _safely(self, call: Callable[..., None], *arguments: Any) -> None:
        """What a listener or a deadline raises stops neither the others nor the clock."""
        try:
            call(*arguments)
        except Exception as error:
            if repr(error) not in self._errors and len(self._errors) < _MAX_ERRORS:  # once, not ten times a second
                self._errors.add(repr(error))
                _log.error("an error beside the links, which go on: %r", error, exc_info=_log.isEnabledFor(logging.DEBUG))

    def _tick(self, now_s: float) -> None:
        actions = self.membership.tick(now_s)
        self._tell(actions.changes)
        for dial in actions.dials:
            self._tasks.spawn(self._dial(dial))
        number = int(now_s * 1e6)
        for incarnation in actions.pings:
            channel = self.channels.get(incarnation)
            if channel is not None:
                channel.send([frames.PING, number])
                self._counters.add("pings_sent")
        self._calls.expire(now_s)
        self.transport.expire(now_s)

    def _gossip(self) -> None:
        """Tell a few peers of those that we know: gossip reaches all in a few rounds, whatever the mesh's size."""
        fanout = min(_GOSSIP_FANOUT if self._is_changed else 1, len(self.channels))
        self._is_changed = False
        for channel in random.sample(list(self.channels.values()), fanout):
            channel.send([frames.HELLO, self._hello(None).to_wire()])
            self._counters.add("hellos_sent")

    def _warn_if_lonely(self) -> None:
        if not self.channels and not self.own.is_observer and set(self.own.roles) != set(ROLES):
            reasons = f" ({'; '.join(sorted(set(self.refused.values())))})" if self.refused else ""
            _log.warning(
                "no other peer of mesh %r found yet%s. Are they on this network? Try --peer HOST with the address of one of them.",
                self.own.mesh,
                reasons,
                extra={"event": "mesh_alone", "fields": {"mesh": self.own.mesh}},
            )
