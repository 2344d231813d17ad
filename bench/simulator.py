"""A mesh in virtual time: the serving code's own scheduler, pool, index and policies, with an event heap for a clock.

The router sees what a live one sees: each worker's report after each of its steps, and at once what it sent out itself. It is never
told how long an output will be.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from bench.traces import TraceRequest
from meshserve.engines.dummy.scheduler import Scheduler, Sequence, Stage, Step
from meshserve.engines.dummy.timing import Timing
from meshserve.engines.rates import StepRates
from meshserve.errors import PoolFull
from meshserve.kv.pool import BlockPool
from meshserve.routing.candidates import Prompt
from meshserve.routing.fleet import Fleet, Question
from meshserve.wire.load import WorkerLoad, WorkerReport


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is simulated."""

    num_workers: int
    num_blocks: int
    """KV blocks of each worker."""
    block_size: int
    timing: Timing
    max_batch: int = 256
    max_batch_tokens: int = 8192


@dataclass(slots=True)
class Served:
    """What became of one request."""

    request: TraceRequest
    worker: str = ""
    num_cached_tokens: int = 0
    first_token_at: float = 0.0
    finished_at: float = 0.0

    @property
    def ttft_ms(self) -> float:
        """From arrival to the first token."""
        return (self.first_token_at - self.request.arrival_s) * 1000

    @property
    def latency_ms(self) -> float:
        """From arrival to the last token."""
        return (self.finished_at - self.request.arrival_s) * 1000


class _Job(Sequence):
    __slots__ = ("request_id", "served")

    def __init__(self, request_id: str, served: Served) -> None:
        request = served.request
        super().__init__(request.num_tokens, request.hashes, request.num_output_tokens)
        self.request_id = request_id
        self.served = served


class _Worker:
    """One engine: at most one step at a time, a report after each."""

    def __init__(self, incarnation: str, cluster: Cluster) -> None:
        self.incarnation = incarnation
        self.pool = BlockPool(cluster.num_blocks)
        self.pool.record_changes(True)
        self.scheduler: Scheduler[_Job] = Scheduler(
            self.pool,
            cluster.timing,
            block_size=cluster.block_size,
            max_batch=cluster.max_batch,
            max_batch_tokens=cluster.max_batch_tokens,
        )
        self.rates = StepRates()
        self.is_due = False
        self._admitted: list[str] = []

    def add(self, job: _Job, now: float) -> None:
        """Raises PoolFull if it could never fit."""
        self.scheduler.add(job, now)
        self._admitted.append(job.request_id)

    def report(self) -> WorkerReport:
        """What changed since the last one."""
        scheduler, pool = self.scheduler, self.pool
        load = WorkerLoad(
            scheduler.num_running,
            scheduler.num_waiting,
            scheduler.waiting_prefill_tokens,
            pool.num_used,
            pool.num_idle,
            pool.num_blocks,
            **self.rates.figures(),
        )
        stored, evicted = pool.take_changes()
        admitted, self._admitted = self._admitted, []
        return WorkerReport(load, tuple(stored), tuple(evicted), tuple(admitted))


@dataclass(slots=True)
class Simulation:
    """One run of a trace. `served` has what was finished, in that order; `num_refused` counts prompts that fit on no worker."""

    cluster: Cluster
    policy: str
    fleet: Fleet
    served: list[Served] = field(default_factory=list)
    num_refused: int = 0
    _workers: dict[str, _Worker] = field(default_factory=dict)
    _events: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    _order: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def worker_names(self) -> list[str]:
        """Those that tokens come from."""
        return [f"w{number}" for number in range(self.cluster.num_workers)]

    def run(self, requests: Iterable[TraceRequest]) -> None:
        """Serve them all."""
        for name in self.worker_names:
            worker = _Worker(name, self.cluster)
            self._workers[worker.incarnation] = worker
            self.fleet.join(worker.incarnation, worker.incarnation)
            self.fleet.report(worker.incarnation, worker.report(), 0.0)
        events = self._events
        for number, request in enumerate(requests):
            while events and events[0][0] < request.arrival_s:
                now, _, happen = heapq.heappop(events)
                happen(now)
            self._arrive(number, request)
        while events:
            now, _, happen = heapq.heappop(events)
            happen(now)

    def _arrive(self, number: int, request: TraceRequest) -> None:
        now, request_id = request.arrival_s, str(number)
        prompt = Prompt(request.num_tokens, self.cluster.block_size, request.hashes)
        chosen = self.fleet.choose(self.policy, Question(request_id, prompt, self.worker_names), now).decode[0]
        worker = self._workers[chosen.incarnation]
        try:
            worker.add(_Job(request_id, Served(request, chosen.incarnation)), now)
        except PoolFull:
            self.num_refused += 1
            return
        if not worker.is_due:  # not at once: what arrives at the same moment shares the first step
            worker.is_due = True
            self._at(now, lambda now: self._begin(worker, now))

    def _begin(self, worker: _Worker, now: float) -> None:
        step = worker.scheduler.plan(now)
        worker.is_due = step is not None
        if step is not None:
            self._at(now + step.duration_s, lambda now: self._end(worker, step, now))

    def _end(self, worker: _Worker, step: Step[_Job], now: float) -> None:
        num_prompt_tokens = sum(num_tokens for _, num_tokens in step.prefills)
        worker.rates.observe(num_prompt_tokens, len(step.decodes), worker.pool.num_used, step.duration_s)
        for job in worker.scheduler.complete(step, now).producing:
            if job.stage is Stage.ENDED:
                self._finish(job, now)
        self.fleet.report(worker.incarnation, worker.report(), now)
        self._begin(worker, now)

    def _finish(self, job: _Job, now: float) -> None:
        served = job.served
        self._workers[served.worker].rates.finished(job.num_generated)
        served.num_cached_tokens = job.num_cached or 0
        served.first_token_at = job.first_token_at or now
        served.finished_at = now
        self.served.append(served)

    def _at(self, time_s: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), happen))
