"""Load on a target: closed loop, where each client waits for its answer, or open loop, where requests are due whatever the target does.

In an open loop latency counts from the time a request was due: else a target that stalls would also stop the measuring of it
(coordinated omission; Tene, How NOT to Measure Latency, 2013).
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from meshserve.cli.bench.alarm import Alarm
from meshserve.cli.bench.arrivals import Level
from meshserve.cli.bench.exchange import Exchange, Job, Target
from meshserve.cli.bench.selfcheck import SelfCheck
from meshserve.cli.bench.tally import Tally

_TICK_S = 0.05
_AFTER_ERROR_S = 0.05
"""Before a client of the closed loop asks again, so that a target that refuses everything is not asked 10,000 times a second."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much, and for how long."""

    clients: Level | None = None
    """Of a closed loop; None is an open one."""
    num_requests: int | None = None
    duration_s: float | None = None
    num_warmup: int = 0
    warmup_s: float = 0.0
    max_open: int = 10_000
    """Of an open loop: requests under way."""
    timeout_s: float = 120.0
    think_s: float = 0.0
    """Between an answer and the next turn of a conversation."""
    receipt_every: int = 0
    """Ask for a receipt with every n-th request, if the target gives them; 0 is never."""


class Load:
    """One run. `jobs` are taken as they are needed, and `dues` are seconds from the start, one for each job of an open loop."""

    def __init__(
        self,
        target: Target,
        plan: Plan,
        jobs: Iterable[Job],
        dues: Iterator[float] | None,
        tally: Tally,
        next_turn: Callable[[Job, str], Job | None] | None = None,
        on_end: Callable[[Exchange], None] | None = None,
    ) -> None:
        self._target, self._plan, self._tally = target, plan, tally
        self._jobs, self._dues, self._next_turn, self._on_end = iter(jobs), dues, next_turn, on_end
        self.check = SelfCheck()
        self._loop = asyncio.get_running_loop()
        self._began_s = 0.0
        self._num_started = self._num_measured = 0
        self._open: dict[int, Exchange] = {}
        """By identity, in the order in which they were started."""
        self._pauses: set[asyncio.TimerHandle] = set()
        self._is_exhausted = False
        self._changed = asyncio.Event()
        self._task: asyncio.Task[object] | None = None
        self.is_stopped = False
        self.num_left = 0
        """Requests that were under way when the run was stopped."""

    @property
    def num_open(self) -> int:
        """Requests under way."""
        return len(self._open)

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began_s

    def stop(self) -> None:
        """End now, with what there is: no more is sent, and what is under way is left out."""
        if self._task is not None and not self.is_stopped:
            self._task.cancel()
        self.is_stopped = True

    async def run(self) -> None:
        """Until all is sent and answered, or timed out; or stopped."""
        self._task = None if self.is_stopped else asyncio.current_task()
        if self._task is None:
            return
        self._began_s = time.monotonic()
        watch = self._loop.create_task(self._watch())
        try:
            if self._plan.clients is None:
                await self._run_open()
            else:
                self._fill()
            while self._open or not self._is_over(time.monotonic()):
                self._changed.clear()
                await self._changed.wait()
        except asyncio.CancelledError:
            if not self.is_stopped or self._task.uncancel():
                raise
            self._tally.close_window(time.monotonic())
            self.num_left = sum(exchange.is_measured for exchange in self._open.values())
        finally:
            self._task = None
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            self._abandon()
            self.check.stop()

    def _is_over(self, now_s: float) -> bool:
        """Whether no more is to be sent."""
        tally, num_wanted = self._tally, self._plan.num_requests
        if self._is_exhausted or (num_wanted is not None and self._num_measured >= num_wanted):
            return True
        return tally.ends_s is not None and now_s >= tally.ends_s

    # --- starting one

    def _start(self, job: Job, due_s: float, encoded: Any) -> None:
        is_measured = self._is_measured(due_s)
        exchange = Exchange(job, due_s, self._ended, is_measured)
        self._num_started += 1
        self._num_measured += is_measured
        self._open[id(exchange)] = exchange
        self._target.start(encoded, exchange)

    def _is_measured(self, due_s: float) -> bool:
        """Whether the warm-up is over; the first request after it opens the window."""
        if self._tally.began_s is not None:
            return True
        if self._num_started < self._plan.num_warmup or due_s < self._began_s + self._plan.warmup_s:
            return False
        self._tally.open_window(due_s, self._plan.duration_s)
        self.check.start()
        return True

    def _encode(self, job: Job) -> Any:
        every = self._plan.receipt_every
        return self._target.encode(job, bool(every) and self._target.is_mesh and self._num_started % every == 0)

    def _next_job(self) -> Job | None:
        job = next(self._jobs, None)
        if job is None:
            self._is_exhausted = True
        return job

    # --- open loop

    async def _run_open(self) -> None:
        alarm = Alarm(self._loop)
        try:
            while (job := self._next_job()) is not None:
                due_s = self._due(job)
                if due_s is None or self._is_over(due_s):
                    return
                encoded = self._encode(job)
                await alarm.until(due_s)
                self.check.late.observe(time.monotonic() - due_s)
                if self.num_open >= self._plan.max_open and not await self._wait_for_room(due_s):
                    return
                self._start(job, due_s, encoded)
        finally:
            alarm.close()
            self._is_exhausted = True

    def _due(self, job: Job) -> float | None:
        offset_s = job.due_s if job.due_s is not None else next(self._dues, None) if self._dues is not None else 0.0
        return None if offset_s is None else self._began_s + offset_s

    async def _wait_for_room(self, due_s: float) -> bool:
        """False if the time to send was over before there was any; then what was due until now is counted."""
        self._tally.num_delayed += 1
        while self.num_open >= self._plan.max_open:
            if self._is_over(time.monotonic()):
                self._tally.num_unsent += 1 + self._num_due_before(self._tally.ends_s or due_s)
                return False
            self._changed.clear()
            await self._changed.wait()
        return True

    def _num_due_before(self, end_s: float) -> int:
        count = 0
        while (job := next(self._jobs, None)) is not None:
            due_s = self._due(job)
            if due_s is None or due_s >= end_s:
                break
            count += 1
        return count

    # --- closed loop

    def _fill(self) -> None:
        """As many under way as there are clients now."""
        assert self._plan.clients is not None
        num_clients = math.floor(self._plan.clients.at(self.elapsed_s) + 1e-9)
        while len(self._open) + len(self._pauses) < num_clients and not self._is_over(time.monotonic()):
            job = self._next_job()
            if job is None:
                return
            self._send_now(job)

    def _send_now(self, job: Job) -> None:
        encoded = self._encode(job)
        self._start(job, time.monotonic(), encoded)

    # --- the end of one

    def _ended(self, exchange: Exchange) -> None:
        self._open.pop(id(exchange), None)
        self._tally.ended(exchange)
        if self._on_end is not None:
            self._on_end(exchange)
        self._changed.set()
        job = None
        if self._next_turn is not None and exchange.error is None:
            job = self._next_turn(exchange.job, exchange.ending.text)
        if job is not None:
            self._pause(self._plan.think_s, job)
        elif self._plan.clients is not None:
            if exchange.error is None:
                self._fill()
            else:
                self._pause(_AFTER_ERROR_S, None)

    def _pause(self, seconds: float, job: Job | None) -> None:
        """Go on after a while: with this job, or with the next one."""

        def go_on() -> None:
            self._pauses.discard(handle)
            self._changed.set()
            if job is not None and not self._is_over(time.monotonic()):
                self._send_now(job)
            elif self._plan.clients is not None:
                self._fill()

        handle = self._loop.call_later(seconds, go_on)
        self._pauses.add(handle)

    async def _watch(self) -> None:
        """Ends what takes too long, and starts clients that a ramp brings."""
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            for exchange in list(self._open.values()):
                if now_s - (exchange.sent_s or exchange.due_s) < self._plan.timeout_s:
                    break
                if exchange.cancel is not None:
                    exchange.cancel()
                exchange.fail(now_s, "timeout")
            if self._plan.clients is not None:
                self._fill()
            self._changed.set()

    def _abandon(self) -> None:
        for handle in self._pauses:
            handle.cancel()
        for exchange in list(self._open.values()):
            if exchange.cancel is not None:
                exchange.cancel()
        self._open.clear()
