"""The router role: answers "which worker is best, and why" from what workers report and what routers send out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from meshserve.errors import InvalidRequest, NoWorker
from meshserve.kv.pool import block_hashes
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.watches import Watcher, WatchSource
from meshserve.routing.fleet import Fleet, Question
from meshserve.routing.policies import POLICIES
from meshserve.routing.workers import CostSettings, Prompt
from meshserve.wire.card import KVLayout, ModelCard, exact_name
from meshserve.wire.hello import PeerInfo, with_room
from meshserve.wire.messages import IN_FLIGHT, ROUTE, WORKER_REPORTS
from meshserve.wire.routing import InFlightReservation, RouteRequest, RoutingDecision, WorkerReport

_WORKERS = {"decode", "prefill"}


@dataclass(slots=True)
class _WorkerSet:
    """The workers for one model."""

    found_in: list[PeerInfo]
    """What `peers_serving` said: another list as soon as any peer changes."""
    card: ModelCard
    layout: KVLayout
    decode: list[str]
    """Incarnations."""
    prefill: list[str]
    """Those of workers that exchange KV blocks with them."""
    shortest: int
    """Tokens of a request that each of the decode workers takes."""


class RouterRole:
    """Serves `route`. Follows every worker that it can reach, and what other routers send them."""

    def __init__(self, mesh: Mesh, policy: str, settings: CostSettings | None = None) -> None:
        self._mesh, self._policy = mesh, policy
        self.fleet = Fleet(settings)
        self._workers: dict[str, Watcher] = {}
        self._routers: dict[str, Watcher] = {}
        self._worker_sets: dict[str, _WorkerSet] = {}
        """By model."""
        # without a snapshot: what was sent before a router came is reported, or dropped, within two seconds
        self._in_flight = WatchSource(mesh, IN_FLIGHT, lambda: ())
        mesh.gauges.derive("in_flight_reservations", lambda: self.fleet.num_in_flight(time.monotonic()))
        mesh.gauges.derive("reserved_tokens", self.fleet.num_in_flight_tokens)
        mesh.serve(ROUTE, self._on_route)
        mesh.subscribe(self._on_change)
        if _WORKERS & set(mesh.own.roles):
            self._follow(mesh.incarnation)

    # --- following workers and other routers

    def _on_change(self, change: Change, member: Member) -> None:
        incarnation, roles = member.info.incarnation, set(member.info.roles)
        if change is Change.CALLABLE:
            if _WORKERS & roles:
                self._follow(incarnation)
            if "router" in roles and incarnation not in self._routers:
                self._routers[incarnation] = Watcher(
                    self._mesh, incarnation, IN_FLIGHT, lambda: None, self._on_in_flight
                )
        elif change in (Change.DIED, Change.LEFT):
            self._forget(incarnation)
        if change in (Change.JOINED, Change.DIED, Change.LEFT):
            # a worker has a suffix to its name only while there is another worker of that name
            for worker in self._workers:
                self.fleet.rename(worker, self._mesh.name_of(worker))

    def _follow(self, incarnation: str) -> None:
        if incarnation in self._workers:
            return
        info = self._mesh.info_of(incarnation)
        kind = info.layout.fingerprint if info is not None and info.layout is not None else ""
        self.fleet.join(incarnation, self._mesh.name_of(incarnation), kind)

        def on_reset() -> None:
            self.fleet.forget_blocks(incarnation)

        def on_report(report: WorkerReport) -> None:
            if not self.fleet.report(incarnation, report, time.monotonic()):
                name = self._mesh.name_of(incarnation)
                self._mesh.faults.note("report", name, "it holds more KV blocks than it has")

        self._workers[incarnation] = Watcher(self._mesh, incarnation, WORKER_REPORTS, on_reset, on_report)

    def _on_in_flight(self, reservation: InFlightReservation) -> None:
        self.fleet.hear(reservation, time.monotonic())

    def _forget(self, incarnation: str) -> None:
        for watchers in (self._workers, self._routers):
            watcher = watchers.pop(incarnation, None)
            if watcher is not None:
                watcher.close()
        self._worker_sets.clear()
        self.fleet.leave(incarnation)

    # --- answering

    def _on_route(self, call: IncomingCall) -> None:
        asked: RouteRequest = call.body
        policy = asked.policy or self._policy
        if policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise InvalidRequest(f"unknown policy {policy!r}; there are: {known}", param="meshserve.policy")
        for incarnation in asked.excluded:  # these do not report the request: it came to nothing there
            self.fleet.release(incarnation, asked.request_id)
        workers = self._worker_set_for(asked.model, asked.model_hash, asked.excluded)
        if workers is None:
            raise NoWorker(f"no decode worker for the model {asked.model!r} can take work now")
        block_size = workers.layout.block_size
        hashes = block_hashes(asked.tokens, block_size, workers.card.model_hash)
        prompt = Prompt(len(asked.tokens), block_size, hashes)
        decode = workers.decode
        if asked.num_tokens > workers.shortest:
            decode = [info.incarnation for info in with_room(workers.found_in, asked.num_tokens)]
        question = Question(asked.request_id, prompt, decode, workers.prefill, asked.session)
        found = self.fleet.choose(policy, question, time.monotonic())
        if self._in_flight.watchers and found.reservation is not None:
            self._in_flight.publish(found.reservation)
        call.end(RoutingDecision(self._mesh.own.name, policy, found.decode, found.prefill))

    def _worker_set_for(self, model: str, model_hash: str, excluded: Sequence[str]) -> _WorkerSet | None:
        """Workers that can take work for the model of this name and hash; None if nobody decodes it.

        Found once, as long as `peers_serving` gives the same list.
        """
        decode = self._mesh.peers_serving("decode", model)
        if decode and model_hash and (found := decode[0].card) is not None and found.model_hash != model_hash:
            model = exact_name(model, model_hash)  # by most workers of this name, another model is meant
            decode = self._mesh.peers_serving("decode", model)
        workers = self._worker_sets.get(model)
        if workers is not None and workers.found_in is decode and not excluded:
            return workers
        # whatever they call the model: equal layouts are of one model
        prefill = self._mesh.peers_with("prefill")
        if excluded:
            decode = [info for info in decode if info.incarnation not in excluded]
            prefill = [info for info in prefill if info.incarnation not in excluded]
        if not decode:
            return None
        card, layout = decode[0].card, decode[0].layout
        assert card is not None and layout is not None, "a hello has both or neither"
        prefill = [info for info in prefill if layout.accepts(info.layout)]
        for info in (*decode, *prefill):
            self._follow(info.incarnation)
        names = [info.incarnation for info in decode], [info.incarnation for info in prefill]
        workers = _WorkerSet(decode, card, layout, *names, min(info.card.context_length for info in decode if info.card is not None))
        if not excluded:
            self._worker_sets[model] = workers
        return workers

    def close(self) -> None:
        """Stop following workers and routers."""
        for incarnation in [*self._workers, *self._routers]:
            self._forget(incarnation)
