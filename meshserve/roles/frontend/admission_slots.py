"""Admission slots: how many requests the mesh can take, and which requests get them. Each model has an admission of its own, which is fed
with what the workers report."""

import asyncio
import math
from collections import deque
from collections.abc import Iterable
from functools import partial

from meshserve.config import FrontendConfig
from meshserve.errors import Overloaded, RateLimited
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.watches import Watcher
from meshserve.roles.frontend.admission import Admission, Decision, QueueEntry
from meshserve.wire.card import ModelCard, exact_name
from meshserve.wire.messages import WORKER_LOADS
from meshserve.wire.routing import WorkerLoad

_SWEEP_S = 0.05
_PEAK_S = 0.25
"""What a worker reports is older than what we know of ourselves by less than this."""
_MIN_BACKLOG = 8


def slots_of(load: WorkerLoad) -> float:
    """How many sequences one worker can take at once. One that lets a backlog wait while its batch has room is short of something else."""
    backlog = max(_MIN_BACKLOG, load.max_running // 4)
    if load.num_waiting > backlog and load.num_running < (load.max_running or math.inf):
        return load.num_running + backlog
    return load.max_running or math.inf


def share_of(loads: Iterable[WorkerLoad | None], own_peak: int, num_frontends: int) -> float:
    """The slots that are this frontend's to give: all but what others use, at least an equal part beside them, and at least one.

    `own_peak` is the most that it had under way lately. A worker that said nothing yet (None) may have any number.
    """
    known = list(loads)
    reported = [load for load in known if load is not None]
    if len(reported) < len(known):
        return math.inf
    total = sum(map(slots_of, reported))
    others = max(0, sum(load.num_running + load.num_waiting for load in reported) - own_peak)
    return max(1.0, total - others, total // (num_frontends + 1))


class _Model:
    """One model's admission, and the most that was under way in this span of time and the last."""

    def __init__(self, limits: FrontendConfig) -> None:
        self.admission = Admission(limits)
        self.peaks = [0, 0]
        self.began_s = 0.0

    def note(self, now_s: float) -> None:
        """More may be under way than before."""
        num_running, peaks = self.admission.num_running, self.peaks
        if now_s - self.began_s > _PEAK_S:
            self.peaks, self.began_s = [num_running, peaks[0]], now_s
        elif num_running > peaks[0]:
            peaks[0] = num_running


class AdmissionSlots:
    """Gives a request its slots, and takes them back the moment that nothing more comes for the request."""

    def __init__(self, mesh: Mesh, limits: FrontendConfig) -> None:
        self._mesh, self._limits = mesh, limits
        self._loop = asyncio.get_running_loop()
        self._models: dict[str, _Model] = {}
        self._asked: dict[str, _Model] = {}
        """By each name that was asked for: a model's requests share its slots, whatever they call it. Never changed, so that a request
        leaves where it came in."""
        self._loads: dict[str, WorkerLoad] = {}
        self._watchers: dict[str, Watcher] = {}
        self._waiting: set[QueueEntry] = set()
        self._decisions: deque[Decision] = deque()
        """What is still to be told."""
        self._is_deciding = False
        self._timer: asyncio.TimerHandle | None = None
        mesh.gauges.derive("admission_slots", lambda: sum(found.admission.num_running for found in self._models.values()))
        mesh.gauges.derive("waiting_for_admission", self.num_waiting)
        mesh.subscribe(self._on_change)
        if "decode" in mesh.own.roles:
            self._follow(mesh.incarnation)

    # --- requests

    def ask(self, entry: QueueEntry, model: str) -> bool:
        """Ask for as many slots as the entry has weight. False: it has to wait, until its `admitted` or its `on_error` is called.

        Raises Overloaded or RateLimited.
        """
        serving = self._mesh.peers_serving("decode", model)
        if not serving or serving[0].card is None:
            return True  # the processor knows best how to say that nobody serves this
        found = self._asked.get(model) or self._first_asked(model, serving[0].card)
        try:
            decisions = found.admission.arrive(entry, entry.arrived_s)
        except (Overloaded, RateLimited):
            self._mesh.counters.add("requests_refused")
            raise
        if not entry.is_waiting:
            found.note(entry.arrived_s)
            return True
        self._waiting.add(entry)
        self._decide(decisions)
        self._sweep_soon()
        return False

    def _first_asked(self, model: str, card: ModelCard) -> _Model:
        """Nobody asked for the model by this word before."""
        name = card.model if model in card.names else exact_name(card.model, card.model_hash)
        is_new = name not in self._models
        found = self._asked[model] = self._models.setdefault(name, _Model(self._limits))
        if is_new:
            self._recount(name)
        return found

    def leave(self, entry: QueueEntry, model: str, is_done: bool) -> None:
        """The request ended (well, if `is_done`), or nobody waits for it any more. Harmless after it was refused."""
        found = self._asked.get(model)
        if found is not None:
            self._waiting.discard(entry)
            decisions = found.admission.leave(entry, self._mesh.now_s(), is_done)
            if decisions:
                self._decide(decisions)

    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def _decide(self, decisions: list[Decision]) -> None:
        """Never from within itself: where nobody can be served, a request that gets a slot gives the slot back at once, and so does the
        next one."""
        self._decisions += decisions
        if self._is_deciding:
            return
        self._is_deciding = True
        try:
            while self._decisions:
                entry, error = self._decisions.popleft()
                if entry not in self._waiting:
                    continue
                self._waiting.remove(entry)
                if error is None:
                    entry.admitted()
                else:
                    self._mesh.counters.add("requests_refused")
                    entry.on_error(error)
        finally:
            self._is_deciding = False

    def _sweep_soon(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        for found in self._models.values():
            self._decide(found.admission.sweep(self._mesh.now_s()))
        if self._waiting:
            self._sweep_soon()

    # --- workers

    def _on_change(self, change: Change, member: Member) -> None:
        if "decode" not in member.info.roles:
            return
        if change is Change.CALLABLE:
            self._follow(member.info.incarnation)
        elif change in (Change.DIED, Change.LEFT):
            self._forget(member.info.incarnation)
        for model in self._models:
            self._recount(model)

    def _follow(self, incarnation: str) -> None:
        if incarnation not in self._watchers:
            steps = partial(self._unload, incarnation), partial(self._on_load, incarnation)
            self._watchers[incarnation] = Watcher(self._mesh, incarnation, WORKER_LOADS, *steps)

    def _unload(self, incarnation: str) -> None:
        self._loads.pop(incarnation, None)

    def _on_load(self, incarnation: str, load: WorkerLoad) -> None:
        self._loads[incarnation] = load
        info = self._mesh.info_of(incarnation)
        if info is not None and info.card is not None:
            for name in (*info.card.names, *info.card.exact_names):
                if name in self._models:
                    self._recount(name)

    def _recount(self, model: str) -> None:
        found, now_s = self._models[model], self._mesh.now_s()
        loads = [self._loads.get(info.incarnation) for info in self._mesh.peers_serving("decode", model)]
        found.note(now_s)
        share = share_of(loads, max(found.peaks), len(self._mesh.peers_with("frontend")))
        self._decide(found.admission.set_capacity(share, now_s))

    def _forget(self, incarnation: str) -> None:
        watcher = self._watchers.pop(incarnation, None)
        if watcher is not None:
            watcher.close()
        self._unload(incarnation)

    def close(self) -> None:
        """Follow nobody, and give no more slots."""
        for incarnation in list(self._watchers):
            self._forget(incarnation)
        if self._timer is not None:
            self._timer.cancel()
