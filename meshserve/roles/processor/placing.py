"""Finding the worker for a request: a router is asked, another one if that is lost, and without any the workers take turns."""

import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from meshserve.errors import InvalidRequest, MeshserveError, NoWorker, PeerLost, ProtocolError
from meshserve.mesh.calls import OutgoingCall
from meshserve.mesh.mesh import Mesh
from meshserve.routing.candidates import Candidate
from meshserve.wire.generation import pack_tokens

_ROUTE_TIMEOUT_S = 0.5
"""A router answers within a millisecond; one that has not answered by now hangs. Higher waits longer for it, lower asks two where the
machine is merely busy."""

_NO_ROUTER = "round-robin (no router)"


@dataclass(slots=True)
class Placement:
    """Where a request may go, best first, and who said so."""

    router: str | None
    """Its name; None if there was none to ask."""
    policy: str
    decode: list[Candidate]
    prefill: list[Candidate]


@dataclass(slots=True)
class Placing:
    """One request's search for a worker. Exactly one of `on_placed` and `on_failed` is called for each `begin`, unless it is cancelled."""

    placer: "Placer"
    request_id: str
    model: str
    tokens: "array[int]"
    policy: str | None
    session: str
    on_placed: Callable[[Placement], None]
    on_failed: Callable[[MeshserveError], None]
    _excluded: Sequence[str] = ()
    _asked: list[str] | None = None
    _call: OutgoingCall | None = None

    def begin(self, excluded: Sequence[str]) -> None:
        """Look for a worker that is none of these incarnations."""
        self._excluded, self._asked = excluded, []
        self._ask_next()

    def cancel(self) -> None:
        """Nobody wants to know any more. Harmless after the answer."""
        if self._call is not None:
            self._call.cancel()

    def _ask_next(self) -> None:
        assert self._asked is not None
        router = self.placer.next_router(self._asked)
        if router is None:
            self._take_turns()
            return
        self._asked.append(router)
        question = {
            "request_id": self.request_id,
            "model": self.model,
            "tokens": self.tokens if router == self.placer.mesh.incarnation else pack_tokens(self.tokens),
            "policy": self.policy,
            "session": self.session,
            "excluded": list(self._excluded),
        }
        try:
            self._call = self.placer.mesh.open(router, "route", question, self, _ROUTE_TIMEOUT_S)
        except PeerLost:
            self._ask_next()

    def on_item(self, item: Any) -> None:
        """Routers send none."""

    def on_end(self, value: Any) -> None:
        """The router's answer."""
        self._call = None
        try:
            decode, prefill = map(_candidates, (value["decode"], value["prefill"]))
            placement = Placement(str(value["router"]), str(value["policy"]), decode, prefill)
            if not decode:
                raise ProtocolError("a router that knows no worker says so")
        except (ProtocolError, KeyError, TypeError):
            self.placer.mesh.counters.add("router_answers_malformed")
            self._ask_next()
            return
        self.on_placed(placement)

    def on_error(self, error: MeshserveError) -> None:
        """The router is lost, or knows no worker: one that has just started may not have met those that are known here."""
        self._call = None
        if isinstance(error, InvalidRequest):
            self.on_failed(error)
            return
        if not isinstance(error, NoWorker):
            self.placer.mesh.counters.add("routers_failed")
        self._ask_next()

    def _take_turns(self) -> None:
        able = self.placer.take_turns(self.model, self._excluded)
        if able:
            self.on_placed(Placement(None, _NO_ROUTER, able, []))
        else:
            self.on_failed(NoWorker(f"no decode worker for the model {self.model!r} can take work now"))


def _candidates(items: Any) -> list[Candidate]:
    """As a router names them, or as this very peer's does. Raises ProtocolError or TypeError."""
    return [item if type(item) is Candidate else Candidate.from_wire(item) for item in items]


class Placer:
    """What all requests of a processor share when they look for workers."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._router_turn, self._worker_turn = itertools.count(), itertools.count()

    def next_router(self, asked: Sequence[str]) -> str | None:
        """One that was not asked yet: this peer's own, else each in turn; None if there is none left."""
        routers = [info.incarnation for info in self.mesh.peers_with("router") if info.incarnation not in asked]
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
