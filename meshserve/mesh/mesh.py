"""One peer of a mesh, as the floors above know it: the other peers, and calls to them."""

import asyncio
import logging
import re
import secrets
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from meshserve import __version__
from meshserve.config import MeshConfig
from meshserve.errors import Cancelled, MeshserveError, PeerLost
from meshserve.mesh.calls import CallTable, Handler, IgnoredAnswer, IncomingCall, OutgoingCall, Sink
from meshserve.mesh.faults import Faults
from meshserve.mesh.interfaces import AddressWatch, choose_addresses, interface_names, local_addresses
from meshserve.mesh.keys import MeshKey, read_key_file
from meshserve.mesh.links import Links
from meshserve.mesh.membership import Change, Member, PeerState
from meshserve.mesh.tasks import TaskOwner
from meshserve.mesh.transport.channel import Turn
from meshserve.mesh.transport.sockets import BoundPorts, SocketFactory, bind_port_block
from meshserve.telemetry import Counters, EventLog, Gauges, Histograms, RequestCounts, log_event
from meshserve.wire.card import KVLayout, ModelCard
from meshserve.wire.hello import PeerInfo
from meshserve.wire.messages import Method
from meshserve.wire.structs import replace

_log = logging.getLogger(__name__)

_MAX_ANSWERS = 64
_MAX_HOST_NAME = 58
"""A name has up to 63 letters."""
_MAX_SHOWN_ADDRESSES = 4


class _OneAnswer(IgnoredAnswer):
    """The sink of a call that wants its end value only."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

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

    def __init__(
        self,
        config: MeshConfig,
        card: ModelCard | None = None,
        layout: KVLayout | None = None,
        event_log: EventLog | None = None,
    ) -> None:
        """`card` and `layout` are those of this peer's engine, if it has one."""
        self.config = config
        self.counters = Counters()
        self.faults = Faults(self.counters)
        self.histograms = Histograms()
        self.gauges = Gauges()
        self.request_counts: RequestCounts = {}
        """Of this peer's frontend, if it has one."""
        self.event_log = event_log or EventLog()
        self.incarnation = secrets.token_hex(8)
        self.event_log.begin(self.incarnation)
        self.tasks = TaskOwner()
        self._card, self._layout = card, layout
        self.key: MeshKey | None = None
        self.ports: BoundPorts | None = None
        self._watch: AddressWatch | None = None
        self._able: dict[str, list[PeerInfo]] = {}
        """Answers of `peers_with`, until a peer changes: every request asks several times."""
        self._serving: dict[tuple[str, str], list[PeerInfo]] = {}
        """The same of `peers_serving`."""

    # --- life

    async def start(self) -> None:
        """Bind this peer's ports (an observer binds none). Raises StartupFailed, UsageError or KeyRefused."""
        self._addresses = choose_addresses(self.config.interface, local_addresses(), interface_names())
        self.key = read_key_file(Path(self.config.key_file)) if self.config.key_file else None
        silence_limit_s = self.config.failure_timeout_s + self.config.death_timeout_s
        self.factory = SocketFactory(self.config.transport, self.key, self.counters, silence_limit_s)
        try:
            if self.config.roles:
                self.ports = bind_port_block(self.factory, self._addresses.bind_hosts, self.config.port)
        except BaseException:
            self.factory.close()
            raise
        self.own = self._introduction()
        self.turn = Turn()
        max_streams = self.config.transport.max_streams_per_peer
        self.calls = CallTable(self.incarnation, self.turn, max_streams, self.name_of, self.counters)
        self.links = Links(self.config, self.own, self._addresses, self.factory, self.counters, self.calls)
        self.links.listeners.append(lambda change, member: self._changed())
        self.gauges.derive("tasks", lambda: self.tasks.num_running)
        self.gauges.derive("connections_without_hello", lambda: self.links.transport.num_unknown)
        if self.ports is not None:
            self.links.transport.serve(self.ports.calls, self.links.on_stranger)

    def _introduction(self) -> PeerInfo:
        host = re.sub(r"[^\w-]", "-", socket.gethostname().split(".")[0])[:_MAX_HOST_NAME]  # a host may be called anything: spaces too
        name = self.config.name or f"{host}-{self.incarnation[:4]}"
        advertised = self._addresses.advertised if self.config.roles else ()
        port = self.ports.first if self.ports else 0
        label = self.incarnation, name, self.config.mesh, self.config.roles
        return PeerInfo(*label, advertised, port, __version__, self._card, self._layout)

    async def join(self, http: str | None = None) -> None:
        """Find others and be found, from now on until `close`. Returns at once; peers come as they answer."""
        self._announce(replace(self.own, http=http))
        await self.links.join()
        if self.config.roles:
            self._watch = AddressWatch(self._on_network)

    def _on_network(self) -> None:
        """This host's addresses changed: bind, announce and dial anew what they concern; all else goes on."""
        pinned = (self.config.interface,) if self.config.interface else ()  # it may be gone for a while, which is no fault of its name
        before, self._addresses = self._addresses, choose_addresses(self.config.interface, local_addresses(), pinned)
        if self._addresses == before:
            return
        if self.ports is not None and self._addresses.bind_hosts != before.bind_hosts:
            self.ports.move(before.bind_hosts, self._addresses.bind_hosts)
        if self._addresses.advertised != before.advertised:
            addresses = ", ".join(self._addresses.advertised[:_MAX_SHOWN_ADDRESSES])
            log_event(_log, "addresses_changed", f"this host's addresses changed: now {addresses}", level=logging.WARNING)
            self._announce(replace(self.own, addresses=self._addresses.advertised))
        self.links.moved(self._addresses)

    def describe(self, layout: KVLayout) -> None:
        """How this peer's engine keeps KV, where that is known only now: before `start`, or before others hear of it again."""
        self._layout = layout

    def announce_withdrawn(self, roles: tuple[str, ...]) -> None:
        """Tell all peers which of its roles this peer cannot play now: an engine that failed takes the workers' roles away for a while."""
        self._announce(replace(self.own, withdrawn=roles, layout=self._layout))

    def announce_draining(self) -> None:
        """Tell all peers that this one takes no new work."""
        self._announce(replace(self.own, is_draining=True))

    def _announce(self, own: PeerInfo) -> None:
        self.own = own
        self.links.announce(own)
        self._changed()

    async def close(self) -> None:
        """End all streams, say goodbye, and give everything back."""
        if self._watch is not None:
            self._watch.close()
        self.calls.close()
        await self.tasks.close()
        await self.links.close()
        if self.ports is not None:
            self.ports.close()
        self.factory.close()

    # --- who is there

    def subscribe(self, listener: Callable[[Change, Member], None]) -> None:
        """Be called with every change of a peer (not of observers, nor of this peer)."""
        self.links.listeners.append(listener)

    def member(self, incarnation: str) -> Member | None:
        """The live or suspect peer of this incarnation, if there is one."""
        return self.links.membership.members.get(incarnation)

    def name_of(self, incarnation: str) -> str:
        """For people: a peer's name, or what is known of it."""
        if incarnation == self.incarnation:
            return self.own.name
        member = self.links.membership.members.get(incarnation)
        return member.shown_name if member is not None else f"a peer that left ({incarnation[:4]})"

    def info_of(self, incarnation: str) -> PeerInfo | None:
        """What a peer (this one included) said of itself."""
        if incarnation == self.incarnation:
            return self.own
        member = self.links.membership.members.get(incarnation)
        return member.info if member is not None else None

    def peers_with(self, role: str) -> list[PeerInfo]:
        """Peers that can take work in this role now, this one first if it holds it, then oldest first. Not to be changed."""
        able = self._able.get(role)
        if able is None:
            own = [self.own] if self.own.can_play(role) and not self.own.is_draining else []
            others = [member.info for member in self.links.membership.listed() if member.info.can_play(role) and member.can_take_work]
            able = self._able[role] = own + others
        return able

    def peers_serving(self, role: str, model: str) -> list[PeerInfo]:
        """Those of them whose model has this name. Not to be changed.

        Of different models under one name, that of most workers: tokens of one mean something else to another, and no output may
        go on with other weights. Each answers to its exact name too (`NAME#HASH`).
        """
        serving = self._serving.get((role, model))
        if serving is None:
            serving = _of_one_model([info for info in self.peers_with(role) if info.card is not None and info.card.is_called(model)])
            if len(self._serving) >= _MAX_ANSWERS:  # clients may ask for anything
                self._serving.clear()
            self._serving[role, model] = serving
        return serving

    def silent_peers_with(self, role: str) -> list[PeerInfo]:
        """Peers that are suspect or in doubt now, and would take work in this role if that ended."""
        members = self.links.membership.listed()
        silent = [member.info for member in members if member.state is PeerState.SUSPECT or member.doubted_for]
        return [info for info in silent if info.can_play(role) and not info.is_draining]

    def has_or_awaits(self, role: str) -> bool:
        """Whether a request that needs a peer of this role is served, or waits for one that has just fallen silent."""
        awaited, now_s = self.config.failure_timeout_s, self.now_s()
        return bool(self.peers_with(role)) or any(is_awaited(one, role, now_s, awaited) for one in self.links.membership.listed())

    def _changed(self) -> None:
        self._able.clear()
        self._serving.clear()

    def can_take_work(self, incarnation: str) -> bool:
        """Alive, reachable and not draining; this very peer always is, until it drains."""
        if incarnation == self.incarnation:
            return not self.own.is_draining
        member = self.links.membership.members.get(incarnation)
        return member is not None and member.can_take_work

    def is_linked(self, incarnation: str) -> bool:
        """Whether calls to this peer can be made now."""
        return incarnation == self.incarnation or incarnation in self.links.channels

    def reaches_us(self, incarnation: str) -> bool:
        """Whether this peer has a connection of its own to us: it can make calls, and send KV blocks. A firewall may let only one of two
        peers dial the other."""
        return incarnation == self.incarnation or self.links.is_dialled_by(incarnation)

    # --- calls

    now_s = staticmethod(time.monotonic)
    """The clock of deadlines and measurements: monotonic, this process's own. (uvloop's own clock has steps of a millisecond.)"""

    def serve(self, method: Method, handler: Handler) -> None:
        """Answer calls of this method. The handler returns at once and ends the call when it is done."""
        self.calls.handlers[method.name] = method, handler

    def serve_async(self, method: Method, handler: Callable[[IncomingCall], Awaitable[Any]]) -> None:
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
                _log.exception("%s failed", method.name)
                call.fail(MeshserveError(f"{method.name} failed: {type(error).__name__}"))

        def start(call: IncomingCall) -> None:
            task = self.tasks.spawn(run(call))
            call.on_cancel = lambda: _cancel(task)

        self.serve(method, start)

    def open(self, peer: str, method: Method, body: Any, sink: Sink, timeout_s: float) -> OutgoingCall:
        """Open a stream to a peer, or to this one. Raises PeerLost at once if there is no connection to it."""
        now_s = time.monotonic()
        if peer == self.incarnation:
            return self.calls.open_here(method, body, sink, now_s + timeout_s)
        channel = self.links.channels.get(peer)
        if channel is None:
            name = self.name_of(peer)
            raise PeerLost(f"no connection to {name}", peer=name)
        return self.calls.open(channel, method, body, sink, now_s, timeout_s)

    async def call(self, peer: str, method: Method, body: Any, timeout_s: float) -> Any:
        """Open a stream and wait for its end value. Raises the MeshserveError it ends in; cancelling cancels the call."""
        sink = _OneAnswer()
        opened = self.open(peer, method, body, sink, timeout_s)
        try:
            return await sink.answer
        except asyncio.CancelledError:
            opened.cancel()
            raise


def is_awaited(member: Member, role: str, now_s: float, failure_timeout_s: float) -> bool:
    """Whether requests wait for this member, as it may be back at any moment: it became suspect no longer ago than they wait."""
    if not member.info.can_play(role) or member.info.is_draining:
        return False
    if member.state is PeerState.SUSPECT:
        return now_s - member.suspect_since_s < failure_timeout_s
    return bool(member.doubted_for)


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


def _of_one_model(serving: list[PeerInfo]) -> list[PeerInfo]:
    """Those whose model most of them have. All peers that know the same workers decide alike."""
    models = [(info.card.model_hash, info.card.text) for info in serving if info.card is not None]
    counts = Counter(models)
    if len(counts) <= 1:
        return serving
    chosen = max(counts, key=lambda model: (counts[model], repr(model)))
    return [info for info, model in zip(serving, models, strict=True) if model == chosen]
