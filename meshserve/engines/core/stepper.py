"""Plays the scheduler's steps on the event loop, one at a time."""

import asyncio
from collections.abc import Callable

from meshserve.engines.core.request import EngineRequest
from meshserve.engines.core.runner import ModelRunner, StepResult
from meshserve.engines.core.scheduler import Scheduler, Step


class Stepper:
    """One step in flight, each at least one turn of the event loop. No tasks and no futures: one handle, re-armed.

    `on_step` is called with each step and its result, `on_turn` when a step has begun or ended and when nothing is left to do.
    """

    def __init__(
        self,
        scheduler: Scheduler[EngineRequest],
        runner: ModelRunner,
        clock: Callable[[], float],
        on_step: Callable[[Step[EngineRequest], StepResult], None],
        on_turn: Callable[[], None],
    ) -> None:
        self._scheduler, self._runner, self._clock = scheduler, runner, clock
        self._on_step, self._on_turn = on_step, on_turn
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.Handle | None = None
        self._step: Step[EngineRequest] | None = None
        self._is_resting = True
        self._expected_at = 0.0

    def start(self) -> None:
        """Take steps on the running event loop from now on."""
        self._loop = asyncio.get_running_loop()
        self.kick()

    def stop(self) -> None:
        """Take no more steps; the result of the one in flight is ignored."""
        if self._handle is not None:
            self._handle.cancel()
        self._loop = self._handle = self._step = None
        self._is_resting = True

    def kick(self) -> None:
        """There may be something to do. Harmless when that is known."""
        if self._handle is None and self._step is None and self._loop is not None:
            self._arm(self._loop)

    def overdue_s(self) -> float:
        """How long ago the next turn, or the next sign of progress of the model runner, should have come."""
        return max(0.0, self._clock() - self._expected_at) if self._handle is not None else self._runner.overdue_s()

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._expected_at = self._clock()
        self._handle = loop.call_soon(self._turn)

    def finished(self, result: StepResult) -> None:
        """The step in flight is computed: the model runner's `on_result`."""
        step, self._step = self._step, None
        if step is None or self._loop is None:  # stopped meanwhile
            return
        self._on_step(step, result)
        if self._scheduler.is_idle:  # known now: no turn more to find out
            self._rest()
        elif self._handle is None and self._loop is not None:
            self._on_turn()
            self._arm(self._loop)

    def _turn(self) -> None:
        self._handle = None
        step = self._scheduler.schedule(self._clock())
        if step is None:
            self._rest()
            return
        step.is_first, self._is_resting = self._is_resting, False
        self._step = step
        self._runner.submit(step)
        if self._step is step:  # it goes on beyond this turn
            self._on_turn()

    def _rest(self) -> None:
        self._is_resting = True
        self._on_turn()
