"""Plays the scheduler's steps on the event loop, in slices short enough that nobody else on the loop waits for them."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from meshserve.engines.dummy.contents import Cursor, KVContents
from meshserve.engines.dummy.jobs import Job
from meshserve.engines.dummy.scheduler import Scheduler, Stage, Step

_SLICE_TOKENS = 64
_SLICE_BYTES = 1 << 18
"""A slice is the smaller of both."""
_TURN_SLICES = 8
_TURN_S = 0.0005
"""After so many slices or so long the turn ends: 64 tokens take 50 us in memory that was used before, and 500 us have been measured
where the system had to find the pages first."""


class _Slice(NamedTuple):
    job: Job
    end: int
    due: float


class Driver:
    """One step at a time, each at least one turn of the event loop. No tasks and no futures: one handle, re-armed.

    A step's prompt tokens are computed evenly over its duration and all its output appears at its end. A step is due at its
    predecessor's due time plus its own duration, so that late wake-ups do not add up; only who is later than a whole step starts afresh.
    """

    def __init__(
        self,
        scheduler: Scheduler[Job],
        contents: KVContents,
        clock: Callable[[], float],
        on_step: Callable[[Step[Job], float, float], None],
        on_failure: Callable[[Job, Exception], None],
        on_turn: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._contents = contents
        self._clock = clock
        self._on_step = on_step
        self._on_failure = on_failure
        self._on_turn = on_turn
        self._slice_tokens = max(1, min(_SLICE_TOKENS, _SLICE_BYTES // contents.kv_bytes_per_token))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.Handle | None = None
        self._step: Step[Job] | None = None
        self._slices: list[_Slice] = []  # last one first
        self._began = 0.0
        self._due: float | None = None  # when the current step, or the last one of an unbroken row, ends
        self._expected_at: float | None = None

    def start(self) -> None:
        """Take the running event loop for one's own."""
        self._loop = asyncio.get_running_loop()
        self.kick()

    def stop(self) -> None:
        """Cancel what is scheduled, for good."""
        if self._handle is not None:
            self._handle.cancel()
        self._loop = self._handle = self._step = self._expected_at = None
        self._slices = []

    def kick(self) -> None:
        """There may be something to do. Harmless when that is known."""
        if self._handle is None and self._loop is not None:
            self._wait(self._clock(), 0.0)

    def overdue_s(self) -> float:
        """How long ago the next turn should have come."""
        return max(0.0, self._clock() - self._expected_at) if self._expected_at is not None else 0.0

    def _wait(self, now: float, delay_s: float) -> None:
        if self._loop is None:  # stopped by a sink within this turn
            return
        self._expected_at = now + delay_s
        self._handle = self._loop.call_later(delay_s, self._turn) if delay_s > 0 else self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        now = self._clock()
        if self._step is None and not self._begin(now):
            self._rest()
            return
        delay_s = self._compute_slices(now) if self._slices else 0.0
        if not self._slices and self._due is not None:
            delay_s = max(0.0, self._due - now)
        if not self._slices and not delay_s:
            self._finish(now)
            if self._scheduler.is_idle:  # known now: no turn more to find out
                self._rest()
                return
        self._on_turn()
        self._wait(now, delay_s)

    def _rest(self) -> None:
        self._handle = self._due = self._expected_at = None
        self._on_turn()

    def _begin(self, now: float) -> bool:
        step = self._scheduler.plan(now)
        if step is None:
            return False
        begins_at = now if self._due is None or now > self._due + step.duration_s else self._due
        self._began, self._due = begins_at, begins_at + step.duration_s
        for job in step.admitted:
            job.cursor = Cursor(self._contents, job.blocks, job.num_computed)
        for job in step.decodes:
            job.cursor.append(job.tokens[-1])  # type: ignore[union-attr]  # set when it was admitted; this is the hot path
        self._step = step
        if step.prefills:
            self._slices = self._cut(step, begins_at)
        return True

    def _cut(self, step: Step[Job], begins_at: float) -> list[_Slice]:
        slices: list[_Slice] = []
        num_new = sum([num_tokens for _, num_tokens in step.prefills])
        num_done = 0
        for job, num_tokens in step.prefills:
            start, end = job.first_to_visit(self._contents.block_size), job.num_computed + num_tokens
            while start < end:
                stop = min(start + self._slice_tokens, end)
                num_done += max(0, stop - max(start, job.num_computed))
                slices.append(_Slice(job, stop, begins_at + step.duration_s * (num_done / num_new if num_new else 1.0)))
                start = stop
        slices.reverse()
        return slices

    def _compute_slices(self, now: float) -> float:
        """Compute what is due and fits into one turn. Seconds until the next one that is left over is due."""
        slices, ends_at = self._slices, now + _TURN_S
        for _ in range(min(_TURN_SLICES, len(slices))):
            job, end, due = slices[-1]
            if due > now:
                return due - now
            slices.pop()
            self._visit(job, end)
            if slices and self._clock() > ends_at:
                break
        return 0.0

    def _visit(self, job: Job, end: int) -> None:
        if job.stage is not Stage.RUNNING:  # cancelled meanwhile: its blocks may be somebody else's by now
            return
        try:
            job.visit(end, self._contents)
        except Exception as exc:
            self._on_failure(job, exc)

    def _finish(self, now: float) -> None:
        step, self._step = self._step, None
        if step is not None:
            self._on_step(step, self._began, now)
