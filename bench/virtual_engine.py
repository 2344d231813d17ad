"""One engine in virtual time: the dummy's scheduler over its block pool, without KV bytes, and the reports that routers get of it."""

from collections import deque
from typing import Generic, TypeVar

from meshserve.engines.core.rates import StepRates
from meshserve.engines.core.scheduler import Outcome, Scheduler, Sequence, Step, StepLimits
from meshserve.engines.dummy.options import Timing
from meshserve.errors import PoolFull
from meshserve.kv.pool import BlockPool
from meshserve.wire.routing import WorkerLoad, WorkerReport

S = TypeVar("S", bound=Sequence)


class SimulatedEngine(Generic[S]):
    """At most one step at a time; `is_due` says that one runs or is about to."""

    def __init__(
        self,
        incarnation: str,
        num_blocks: int,
        block_size: int,
        timing: Timing,
        max_batch: int,
        max_batch_tokens: int,
        handoff_s_per_token: float = 0.0,
    ) -> None:
        self.incarnation = incarnation
        self.is_due = False
        self.pool = BlockPool(num_blocks)
        self.pool.record_changes(True)
        self._timing = timing
        limits = StepLimits(max_batch, max_batch_tokens)
        self._scheduler: Scheduler[S] = Scheduler(self.pool, block_size, limits)
        self._rates = StepRates(limits)
        self._handoff_ns_per_token = round(handoff_s_per_token * 1e9)
        self._admitted: list[str] = []
        self._computed: deque[S] = deque()  # their KV came from elsewhere, and there was no room for it yet

    def check_fits(self, sequence: S) -> None:
        """Raises PoolFull if it could never fit."""
        needed = self._num_blocks(sequence.num_tokens + max(0, sequence.max_new_tokens - 1))
        if needed > self.pool.num_blocks:
            raise PoolFull(f"{needed} KV blocks are needed, and this worker has {self.pool.num_blocks} in all")

    def add(self, sequence: S, request_id: str, now: float, is_computed: bool = False) -> None:
        """Queue a sequence. With `is_computed`, the KV of all its tokens but the last has come from elsewhere."""
        self._admitted.append(request_id)
        if is_computed:
            self._computed.append(sequence)
        else:
            self._scheduler.add(sequence, now)

    def begin(self, now: float) -> Step[S] | None:
        """The next step, if there is something to do."""
        while self._computed and self._take_in(self._computed[0], now):
            self._computed.popleft()
        return self._scheduler.schedule(now)

    def duration_s(self, step: Step[S]) -> float:
        """How long the step takes on the hardware that is played."""
        return self._timing.step_s(step.num_prompt_tokens, len(step.decodes), step.used_blocks / self.pool.num_blocks)

    def end(self, step: Step[S], now: float) -> Outcome[S]:
        """The step was computed, and measured as a real engine would."""
        self._rates.observe(step.num_prompt_tokens, len(step.decodes), step.used_blocks, self.duration_s(step), now)
        outcome = self._scheduler.update(step, [0] * (len(step.decodes) + len(step.prefills)), now)
        for sequence in outcome.producing:
            if sequence.num_generated == sequence.max_new_tokens:
                self._rates.finished(sequence.num_generated)
        return outcome

    def expected_ms(self, num_tokens: int) -> tuple[float | None, float]:
        """Until so many prompt tokens are computed here, None until that was measured; and a decode step, if sequences run."""
        scheduler, rates = self._scheduler, self._rates
        num_running = len(scheduler.running)
        found_s = rates.prefill_s(scheduler.waiting_prefill_tokens + num_tokens, num_running)
        return None if found_s is None else found_s * 1000, rates.decode_s() * 1000 if num_running else 0.0

    def report(self) -> WorkerReport:
        """What changed since the last one."""
        scheduler, pool = self._scheduler, self.pool
        load = WorkerLoad(
            len(scheduler.running),
            scheduler.num_unfinished - len(scheduler.running) + len(self._computed),
            scheduler.waiting_prefill_tokens,
            pool.num_used,
            len(pool.idle),
            pool.num_blocks,
            **(self._rates.figures() | {"handoff_ns_per_token": self._handoff_ns_per_token}),
        )
        stored, evicted = pool.take_changes()
        admitted, self._admitted = self._admitted, []
        return WorkerReport(load, tuple(stored), tuple(evicted), tuple(admitted))

    def _take_in(self, sequence: S, now: float) -> bool:
        prefix = self.pool.lookup(sequence.hashes[: (sequence.num_tokens - 1) // self._scheduler.block_size])
        try:
            blocks = self.pool.acquire(prefix, self._num_blocks(sequence.num_tokens) - len(prefix))
        except PoolFull:
            return False
        self._scheduler.add(sequence, now, blocks)
        return True

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._scheduler.block_size)
