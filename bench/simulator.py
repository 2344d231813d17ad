"""A mesh in virtual time: the serving code's own scheduler, pool, index and policies, with an event heap for a clock.

The router sees what a live one sees: each worker's report after each of its steps, and at once what it sent out itself. It is never
told how long an output will be. With prefill workers, prompts go where the router ranks them first: the claims, hedges and retries of
a live mesh, which cost it a round trip of a millisecond, are left out, and so is a queue for the network.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from bench.traces import TraceRequest
from bench.virtual_engine import SimulatedEngine
from meshserve.config import HandoffConfig
from meshserve.engines.core.scheduler import Sequence, Stage, Step
from meshserve.engines.dummy.options import Timing
from meshserve.errors import PoolFull
from meshserve.routing.fleet import Answer, Fleet, Question
from meshserve.routing.policies import decide_handoff
from meshserve.routing.workers import Prompt


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is simulated."""

    num_workers: int
    num_blocks: int
    """KV blocks of each worker."""
    block_size: int
    timing: Timing
    num_prefill: int = 0
    """Prefill workers beside them, with as many blocks each."""
    kv_gbps: float = 10.0
    """Gigabits per second at which KV goes from one worker to another."""
    kv_bytes_per_token: int = 131_072
    """Of an 8-billion-parameter Llama 3 in bfloat16: 32 layers, 8 KV heads of 128, two bytes, keys and values."""
    max_batch: int = 256
    max_batch_tokens: int = 8192

    @property
    def handoff_s_per_token(self) -> float:
        """Seconds on the network for the KV of one token."""
        return self.kv_bytes_per_token * 8 / (self.kv_gbps * 1e9)


@dataclass(slots=True)
class Served:
    """What became of one request."""

    request: TraceRequest
    worker: str
    prefill_worker: str | None = None
    """None if the worker computed the prompt itself."""
    num_cached_tokens: int = 0
    """Of the prompt, in the cache of the worker that computed the rest of it."""
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
    __slots__ = ("is_prefill", "request_id", "served")

    def __init__(self, request_id: str, served: Served, is_prefill: bool = False) -> None:
        request = served.request
        num_tokens, num_output = (request.num_tokens - 1, 0) if is_prefill else (request.num_tokens, request.num_output_tokens)
        super().__init__(num_tokens, request.hashes, num_output)
        self.request_id, self.served, self.is_prefill = request_id, served, is_prefill


Engine = SimulatedEngine[_Job]


@dataclass(slots=True)
class Simulation:
    """One run of a trace. `served` has what was finished, in that order; `num_refused` counts prompts that fit on no worker."""

    cluster: Cluster
    policy: str
    fleet: Fleet
    served: list[Served] = field(default_factory=list)
    num_refused: int = 0
    _engines: dict[str, Engine] = field(default_factory=dict)
    _events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)
    _order: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def worker_names(self) -> list[str]:
        """Those that tokens come from."""
        return [f"w{number}" for number in range(self.cluster.num_workers)]

    @property
    def prefill_names(self) -> list[str]:
        """Those that only compute prompts."""
        return [f"p{number}" for number in range(self.cluster.num_prefill)]

    def run(self, requests: Iterable[TraceRequest]) -> None:
        """Serve them all."""
        self._start()
        for number, request in enumerate(requests):
            self._happen_until(request.arrival_s)
            self._arrive(str(number), request)
        self._happen_until(float("inf"))

    def _start(self) -> None:
        cluster = self.cluster
        handoff_s = cluster.handoff_s_per_token if cluster.num_prefill else 0.0
        for name in self.worker_names + self.prefill_names:
            engine = Engine(
                name, cluster.num_blocks, cluster.block_size, cluster.timing, cluster.max_batch, cluster.max_batch_tokens, handoff_s
            )
            self._engines[name] = engine
            self.fleet.join(name, name)
            self.fleet.report(name, engine.report(), 0.0)

    def _happen_until(self, time_s: float) -> None:
        events = self._events
        while events and events[0][0] < time_s:
            now, _, happen, arguments = heapq.heappop(events)
            happen(*arguments, now)

    def _at(self, time_s: float, happen: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), happen, arguments))

    # --- requests

    def _arrive(self, request_id: str, request: TraceRequest) -> None:
        now = request.arrival_s
        prompt = Prompt(request.num_tokens, self.cluster.block_size, request.hashes)
        answer = self.fleet.choose(self.policy, Question(request_id, prompt, self.worker_names, self.prefill_names), now)
        served = Served(request, answer.decode[0].incarnation)
        job = _Job(request_id, served)
        try:
            self._engines[served.worker].check_fits(job)
        except PoolFull:
            self.num_refused += 1
            return
        if self._is_remote(request, answer):
            served.prefill_worker = answer.prefill[0].incarnation
            self._add(self._engines[served.prefill_worker], _Job(request_id, served, is_prefill=True), now)
        else:
            self._add(self._engines[served.worker], job, now)

    def _is_remote(self, request: TraceRequest, answer: Answer) -> bool:
        """The decode worker's rule."""
        if not answer.prefill or answer.prefill[0].load >= HandoffConfig().max_prefill_queue:
            return False
        engine, uncached = self._engines[answer.decode[0].incarnation], request.num_tokens - 1
        uncached -= answer.decode[0].overlap_blocks * self.cluster.block_size
        local_ms, step_ms = engine.expected_ms(uncached)
        ready_ms = answer.prefill[0].ready_ms
        remote_ms = ready_ms + uncached * self.cluster.handoff_s_per_token * 1000 + step_ms if ready_ms else None
        return decide_handoff(uncached, None, local_ms, remote_ms, step_ms > 0)[0]

    def _add(self, engine: Engine, job: _Job, now: float) -> None:
        engine.add(job, job.request_id, now)
        self._kick(engine, now)

    def _take_over(self, job: _Job, now: float) -> None:
        """The prompt's KV is on its worker."""
        served = job.served
        engine = self._engines[served.worker]
        engine.add(_Job(job.request_id, served), job.request_id, now, is_computed=True)
        self._kick(engine, now)

    # --- steps

    def _kick(self, engine: Engine, now: float) -> None:
        if not engine.is_due:  # an event, not at once: what arrives at the same moment shares the first step
            engine.is_due = True
            self._at(now, self._begin, engine)

    def _begin(self, engine: Engine, now: float) -> None:
        step = engine.begin(now)
        engine.is_due = step is not None
        if step is not None:
            self._at(now + engine.duration_s(step), self._end, engine, step)

    def _end(self, engine: Engine, step: Step[_Job], now: float) -> None:
        outcome = engine.end(step, now)
        for job in outcome.producing:
            if job.stage is Stage.ENDED:
                self._finish(job, now)
        for job in outcome.prefilled:
            self._hand_over(job, now)
        self.fleet.report(engine.incarnation, engine.report(), now)
        self._begin(engine, now)

    def _finish(self, job: _Job, now: float) -> None:
        served = job.served
        if served.prefill_worker is None:
            served.num_cached_tokens = job.num_cached or 0
        served.first_token_at = now if job.first_token_at is None else job.first_token_at
        served.finished_at = now
        self.served.append(served)

    def _hand_over(self, job: _Job, now: float) -> None:
        served, size = job.served, self.cluster.block_size
        served.num_cached_tokens = job.num_cached or 0
        held = len(self._engines[served.worker].pool.lookup(job.hashes[: job.num_tokens // size]))
        self._at(now + (job.num_tokens - held * size) * self.cluster.handoff_s_per_token, self._take_over, job)
