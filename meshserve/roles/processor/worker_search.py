"""Finding the worker for a request: a router is asked, another one if that is lost, and without any the workers take turns."""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

from meshserve.errors import InvalidRequest, MeshserveError, NoWorker, PeerLost
from meshserve.mesh.calls import OutgoingCall
from meshserve.mesh.mesh import Mesh
from meshserve.wire.messages import ROUTE
from meshserve.wire.routing import Candidate, RouteRequest, RoutingDecision

_ROUTE_TIMEOUT_S = 0.5
"""A router answers within a millisecond; one that has not answered by now hangs. Higher waits longer for it, lower asks two where the
machine is merely busy."""

_NO_ROUTER = "round-robin (no router)"


class Searching(Protocol):
    """A sequence that needs a worker. Exactly one of these is called for each search, unless the search is cancelled."""

    def routed(self, decision: RoutingDecision) -> None:
        """The candidates are known."""

    def not_routed(self, error: MeshserveError) -> None:
        """There is none."""


class WorkerSearch:
    """One request's search for a worker."""

    __slots__ = ("_asked", "_call", "_finder", "_question", "_waiting")

    def __init__(self, finder: "WorkerFinder", question: RouteRequest, waiting: Searching) -> None:
        self._finder, self._question, self._waiting = finder, question, waiting
        self._asked: list[str] = []
        """Routers."""
        self._call: OutgoingCall | None = None

    def cancel(self) -> None:
        """Nobody wants to know any more. Harmless after the answer."""
        if self._call is not None:
            self._call.cancel()

    def ask(self) -> None:
        """Ask a router that was not asked yet; without one, the workers take turns."""
        mesh = self._finder.mesh
        router = self._finder.next_router(self._asked)
        if router is None:
            self._take_turns()
            return
        self._asked.append(router)
        try:
            self._call = mesh.open(router, ROUTE, self._question, self, _ROUTE_TIMEOUT_S)
        except PeerLost:
            self.ask()

    def on_item(self, item: Any) -> None:
        """Routers send none."""

    def on_end(self, value: Any) -> None:
        """The router's answer."""
        self._call = None
        self._waiting.routed(value)

    def on_error(self, error: MeshserveError) -> None:
        """The router is lost, or knows no worker: one that has just started may not have met those that are known here."""
        self._call = None
        if isinstance(error, InvalidRequest):
            self._waiting.not_routed(error)
            return
        if not isinstance(error, NoWorker):
            self._finder.mesh.counters.add("routers_failed")
        self.ask()

    def _take_turns(self) -> None:
        able = self._finder.take_turns(self._question.model, self._question.excluded)
        if able:
            self._waiting.routed(RoutingDecision(None, _NO_ROUTER, able, []))
        else:
            self._waiting.not_routed(NoWorker(f"no decode worker for the model {self._question.model!r} can take work now"))


class WorkerFinder:
    """What all requests of a processor share when they look for workers."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._router_turn, self._worker_turn = itertools.count(), itertools.count()

    def next_router(self, asked: Sequence[str]) -> str | None:
        """One that was not asked yet: this peer's own, else each in turn; None if there is none left."""
        infos = self.mesh.peers_with("router")
        if infos and not asked and infos[0].incarnation == self.mesh.incarnation:
            return self.mesh.incarnation
        routers = [info.incarnation for info in infos if info.incarnation not in asked]
        if not routers or routers[0] == self.mesh.incarnation:
            return routers[0] if routers else None
        return routers[next(self._router_turn) % len(routers)]

    def take_turns(self, model: str, excluded: Sequence[str]) -> list[Candidate]:
        """Without a router: live workers of this model, each time another one first."""
        able = [info for info in self.mesh.peers_serving("decode", model) if info.incarnation not in excluded]
        start = next(self._worker_turn) % len(able) if able else 0
        return [
            Candidate(info.incarnation, self.mesh.name_of(info.incarnation), 0, 0, 0.0, 0.0, "its turn; there is no router")
            for info in able[start:] + able[:start]
        ]
