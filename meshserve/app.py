"""A peer: its roles, joined to the floors below; starts, drains and stops it."""

import asyncio
import contextlib
import gc
import logging
from collections.abc import Callable
from itertools import chain, repeat
from typing import TYPE_CHECKING

from meshserve.config import MeshConfig, ServeConfig
from meshserve.engines.loading import load_engine
from meshserve.engines.protocol import Engine, EngineOptions
from meshserve.errors import MeshserveError, StartupFailed
from meshserve.handoff.provider import PrefillProvider
from meshserve.handoff.requester import PrefillRequester
from meshserve.mesh.files import offer_files
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.sightings import why_gone
from meshserve.mesh.transport.sockets import endpoint
from meshserve.observe.peer_feed import FeedSource
from meshserve.observe.receipt_store import Receipts
from meshserve.observe.status import serve_status
from meshserve.observe.variants import differing, serving
from meshserve.observe.worker_report import WorkerReporter
from meshserve.routing.workers import CostSettings
from meshserve.telemetry import EventLog, log_event

if TYPE_CHECKING:
    from meshserve.observe.otlp import Exporter

_log = logging.getLogger(__name__)

_IDLE_CHECK_S = 0.02
_SAY_FIRST_S, _SAY_AGAIN_S = 0.5, 10.0
"""Into a drain, and between two lines of what it waits for."""
_WORKER_ROLES = ("decode", "prefill")
_RESTART_PAUSES_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Before each try to start an engine that failed; the last one again and again."""

_OBJECTS_PER_COLLECTION = 5_000
_COLLECTIONS_PER_OLDER = (10, 10)
"""A request is a few hundred objects, and hardly any of them is garbage that only a collector finds. Python's own 700 would look at those
of all requests under way several times while each of them lives; a look at 5,000 takes up to 1 ms."""


class Peer:
    """One process of a mesh. `start` returns when it serves; `stop` when nothing of it is left."""

    def __init__(self, mesh_config: MeshConfig, config: ServeConfig, say: Callable[[str], None] = lambda line: None) -> None:
        self._config, self._say = config, say
        self._roles = mesh_config.roles
        self._engine: Engine | None = None
        if {"decode", "prefill"} & set(self._roles):
            options = EngineOptions(config.model, dict(config.engine_options), config.kv_cache_tokens, config.kv_type)
            self._engine = load_engine(config.engine, options)
            self._engine.card = self._engine.card.served_as(config.served_model_names)
        try:
            self._event_log = EventLog(config.record)
        except OSError as error:
            raise StartupFailed(f"--record {config.record}: cannot write there: {error.strerror}") from error
        self.mesh = Mesh(mesh_config, self._engine.card if self._engine else None, event_log=self._event_log)
        self._closers = contextlib.AsyncExitStack()
        self._at_work: dict[str, Callable[[], int]] = {}
        """By role: how many requests it has under way, for which a drain waits."""
        self._on_drain: list[Callable[[], None]] = []
        self.http_url: str | None = None
        self._workers_line = ""
        self._variants: list[str] = []
        self._reporter: WorkerReporter | None = None
        self._requester: PrefillRequester | None = None
        self._exporter: Exporter | None = None

    async def start(self) -> None:
        """Bind, build the roles, join the mesh, and say so in the ready line. Raises StartupFailed, UsageError or KeyRefused."""
        try:
            if self._engine is not None:
                # before the mesh: a hello names the KV layout, and a peer that cannot load its model must not be seen
                self._closers.push_async_callback(self._engine.close)
                await self._engine.start()
                self.mesh.describe(self._engine.kv_layout)
            await self.mesh.start()
            self._closers.push_async_callback(self.mesh.close)
            await self._start_roles()
            if "router" in self._roles:
                self.mesh.subscribe(self._say_workers)
            await self.mesh.join(self.http_url)
        except BaseException:
            await self._closers.aclose()
            raise
        gc.collect()
        gc.freeze()  # what start-up made stays: the collector need not walk it again
        gc.set_threshold(_OBJECTS_PER_COLLECTION, *_COLLECTIONS_PER_OLDER)
        self._say(self.ready_line())
        self._say_workers()

    @property
    def engine_description(self) -> str:
        """One line of what this peer's engine takes, once it has started; "" if there is nothing to say."""
        return self._engine.description if self._engine is not None else ""

    def ready_line(self) -> str:
        """The one line on stdout that scripts and people wait for."""
        own = self.mesh.own
        address = endpoint(own.addresses[0], own.port)
        http = f" http={self.http_url}" if self.http_url else ""
        return f"ready name={own.name} roles={','.join(own.roles)} mesh={own.mesh} address={address}{http}"

    async def _start_roles(self) -> None:
        if self._config.otlp is not None and {"frontend", "processor"} & set(self._roles):
            from meshserve.observe.otlp import Exporter  # an HTTP client: a slow import that most peers need not wait for

            self._exporter = Exporter(self.mesh, self._config.otlp)
            self._closers.push_async_callback(self._exporter.close)
        if self._engine is not None:
            self._start_workers(self._engine)
        if "router" in self._roles:
            from meshserve.roles.router import RouterRole  # as below: a peer loads only the roles that it has

            settings = CostSettings(max_local_prefill_tokens=self._config.handoff.max_local_prefill_tokens)
            router = RouterRole(self.mesh, self._config.policy, settings)
            self._closers.callback(router.close)
        if "processor" in self._roles:
            from meshserve.roles.processor.kept_responses import ResponseStore
            from meshserve.roles.processor.processor import ProcessorRole

            on_kept = self._exporter.request_ended if self._exporter is not None else None
            receipts = Receipts(self.mesh, self._config.receipts_kept, on_kept) if self._config.observe else None
            limits = self._config.handoff.max_lost_peers, self._config.max_migrations
            store = ResponseStore(self._config.responses_kept, self._config.responses_kept_bytes)
            processor = ProcessorRole(self.mesh, *limits, receipts, self._config.stall_timeout_s, store)
            self._closers.push_async_callback(processor.close)
            self._at_work["processor"] = lambda: len(processor.running)
        # after the roles of which it reports, before the frontend: the first HTTP request may ask for all peers
        serve_status(self.mesh, self._reporter)
        if self._config.observe:
            feed = FeedSource(self.mesh, self._reporter.load if self._reporter is not None else None)
            self._closers.callback(feed.close)
        if "frontend" in self._roles:
            from meshserve.roles.frontend.server import FrontendRole  # HTTP is a slow import that other roles need not wait for

            frontend = FrontendRole(self.mesh, self._config, self._exporter)
            self.http_url = await frontend.start()
            self._closers.push_async_callback(frontend.close)
            self._at_work["frontend"] = lambda: frontend.num_under_way

    def _start_workers(self, engine: Engine) -> None:
        """Decode and prefill share one engine, its reports, and the paths of the handoff."""
        engine.on_failure = self._engine_failed
        self._closers.push_async_callback(engine.close)
        offer_files(self.mesh, engine.files)
        config, roles = self._config, self._roles
        provider = PrefillProvider(self.mesh, engine, config.handoff) if "prefill" in roles else None
        requester = self._requester = PrefillRequester(self.mesh, engine, config.handoff) if "decode" in roles else None
        reporter = self._reporter = WorkerReporter(self.mesh, engine, provider, requester)
        if provider is not None:
            from meshserve.roles.prefill import PrefillRole

            prefill = PrefillRole(provider, reporter)
            self._closers.callback(provider.close)
            self._at_work["prefill"] = lambda: prefill.num_under_way
            self._on_drain.append(prefill.drain)
        if requester is not None:
            from meshserve.roles.decode import DecodeRole

            decode = DecodeRole(self.mesh, engine, requester, reporter, config.max_decode_queue, config.observe)
            self._closers.callback(requester.close)
            self._at_work["decode"] = lambda: decode.num_under_way
        self._closers.callback(reporter.close)

    def _engine_failed(self, error: MeshserveError) -> None:
        """The engine has ended its requests. Until it runs again, this peer plays its other roles only."""
        _log.error("the engine failed: %s; it is started again", error.message)
        self.mesh.announce_withdrawn(tuple(role for role in self._roles if role in _WORKER_ROLES))
        if self._requester is not None:
            self._requester.engine_failed()
        self.mesh.tasks.spawn(self._restart_engine())

    async def _restart_engine(self) -> None:
        """Try again and again, with growing pauses: the cause may pass, such as a lack of memory."""
        assert self._engine is not None
        for pause_s in chain(_RESTART_PAUSES_S, repeat(_RESTART_PAUSES_S[-1])):
            await asyncio.sleep(pause_s)
            try:
                await self._engine.start()
            except MeshserveError as error:
                _log.error("the engine did not start: %s", error.message)
                continue
            except Exception as error:  # a bug; but without another try the roles would stay withdrawn for ever
                _log.error("the engine did not start: %s: %s", type(error).__name__, error, exc_info=_log.isEnabledFor(logging.DEBUG))
                continue
            self.mesh.describe(self._engine.kv_layout)
            self.mesh.announce_withdrawn(())
            log_event(_log, "engine_restarted", "the engine runs again")
            return

    def _say_workers(self, change: Change | None = None, member: Member | None = None) -> None:
        """One line when the workers that could be routed to come or go."""
        groups = {role: [self.mesh.name_of(info.incarnation) for info in self.mesh.peers_with(role)] for role in ("decode", "prefill")}
        counts = ", ".join(f"{len(names)} {role}" for role, names in groups.items())
        names = ", ".join(name for role in groups for name in groups[role])
        line = f"{counts} ready: {names}" if names else "no workers: waiting for `meshserve run --role decode` somewhere on this network"
        serving = self.mesh.peers_serving
        unused = [info for info in self.mesh.peers_with("decode") if info.card and info not in serving("decode", info.card.model)]
        if unused:
            others = ", ".join(self.mesh.name_of(info.incarnation) for info in unused)
            line += f"; used by exact name only (NAME#HASH, as /v1/models lists them): {others}, whose model is not that of most workers"
        if "router" in self._roles and line != self._workers_line:
            self._workers_line = line
            self._warn_of_variants()
            why = _why_fewer(change, member) if change is not None and member is not None else ""
            self._say(f"{line} ({member.shown_name} {why})" if member is not None and why else line)

    def _warn_of_variants(self) -> None:
        """Of two models, or two KV layouts, under one name: once for each such state."""
        workers = {info.incarnation: info for role in _WORKER_ROLES for info in self.mesh.peers_with(role)}
        found = [one for info in workers.values() if (one := serving(self.mesh.name_of(info.incarnation), info)) is not None]
        variants = differing(found)
        for words in variants:
            if words not in self._variants:
                advice = "requests for the name go to the model of most workers: ask for NAME#HASH, or give each a --served-model-name"
                log_event(_log, "model_variants", f"{words}; {advice}", logging.WARNING)
        self._variants = variants

    async def drain(self) -> bool:
        """Take no new work and finish what runs; False if the drain timeout came first."""
        began_s = self.mesh.now_s()
        log_event(_log, "drain_begun", "drain: no new work from now on", timeout_s=self._config.drain_timeout_s)
        self.mesh.announce_draining()
        for stop_taking in self._on_drain:
            stop_taking()
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await self._wait_for_work()
        except TimeoutError:
            within = f"within --drain-timeout {self._config.drain_timeout_s:g} s"
            _log.warning("running requests did not finish %s: they go on elsewhere, or end in an error", within)
            return False
        took_s = round(self.mesh.now_s() - began_s, 3)
        log_event(_log, "drain_ended", f"drain: all that ran is done after {took_s:.1f} s", took_s=took_s)
        return True

    async def _wait_for_work(self) -> None:
        """Says what it waits for, to whoever pressed Ctrl-C and sees a process that does not end."""
        began_s = self.mesh.now_s()
        said_s = began_s - _SAY_AGAIN_S + _SAY_FIRST_S
        while at_work := [f"{role} {num}" for role, count in self._at_work.items() if (num := count())]:
            now_s = self.mesh.now_s()
            if now_s - said_s >= _SAY_AGAIN_S:
                said_s = now_s
                left_s = self._config.drain_timeout_s - (now_s - began_s)
                work = ", ".join(at_work)
                words = f"drain: waiting for requests under way ({work}), at most {left_s:.0f} s more; a second signal ends at once"
                log_event(_log, "drain_waits", words, logging.WARNING, left_s=round(left_s, 3))
            await asyncio.sleep(_IDLE_CHECK_S)

    async def stop(self) -> None:
        """Say goodbye and give everything back. Whatever still runs ends in an error."""
        await self._closers.aclose()
        self._event_log.close()
        gc.unfreeze()


def _why_fewer(change: Change, member: Member) -> str:
    """Why this worker gets no work any more; empty if nothing of the kind happened to it."""
    if change in (Change.LEFT, Change.DIED):
        return why_gone(change, member)
    if change is Change.SUSPECTED:
        return "lost its connection" if member.was_cut else "is silent"
    if member.info.is_draining:
        return "is draining"
    return "restarts its engine" if member.info.withdrawn else ""
