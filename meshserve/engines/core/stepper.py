"""Plays the scheduler's steps on the event loop, one at a time."""

import asyncio
import logging
from collections.abc import Callable

from meshserve.engines.core.request import EngineRequest
from meshserve.engines.core.runner import ModelRunner, StepResult
from meshserve.engines.core.scheduler import Scheduler, Step
from meshserve.errors import EngineFailed, MeshserveError

_log = logging.getLogger(__name__)

HANGS_AFTER_S = 1.5
"""A step that is overdue by as much, and still is after as long again while this process runs, hangs: the engine has failed."""


class Stepper:
    """One step in flight, each at least one turn of the event loop. No tasks and no futures: one handle, re-armed.

    `on_step` is called with each step and its result, `on_turn` when a step has begun or ended and when nothing is left to do;
    `on_failure`, with no step in flight, when the model runner raises or hangs.
    """

    def __init__(
        self,
        scheduler: Scheduler[EngineRequest],
        runner: ModelRunner,
        clock: Callable[[], float],
        on_step: Callable[[Step[EngineRequest], StepResult], None],
        on_turn: Callable[[], None],
        on_failure: Callable[[MeshserveError], None],
    ) -> None:
        self._scheduler, self._runner, self._clock = scheduler, runner, clock
        self._on_step, self._on_turn, self._on_failure = on_step, on_turn, on_failure
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.Handle | None = None
        self._step: Step[EngineRequest] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._is_resting = True
        self._expected_at = 0.0

    def start(self) -> None:
        """Take steps on the running event loop from now on."""
        self._loop = asyncio.get_running_loop()
        self.kick()

    def stop(self) -> None:
        """Take no more steps; the result of the one in flight is ignored."""
        for handle in (self._handle, self._watch):
            if handle is not None:
                handle.cancel()
        self._loop = self._handle = self._watch = self._step = None
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
        try:
            self._on_step(step, result)
        except Exception as exc:
            self._fail(exc)
            return
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
        try:
            self._runner.submit(step)
        except Exception as exc:
            self._fail(exc)
            return
        if self._step is step:  # it goes on beyond this turn
            self._on_turn()
            if self._watch is None and self._loop is not None:
                self._watch = self._loop.call_later(HANGS_AFTER_S, self._look, None)

    def _look(self, suspect: Step[EngineRequest] | None) -> None:
        """One timer for all steps. That a step is late may be this process's fault, which may have been stopped: it is given as much
        time again."""
        self._watch, step = None, self._step
        if step is None or self._loop is None:
            return
        is_late = self._runner.overdue_s() >= HANGS_AFTER_S
        if is_late and step is suspect:
            self._step = None
            self._on_failure(EngineFailed("a step of the engine hangs"))
        else:
            self._watch = self._loop.call_later(HANGS_AFTER_S, self._look, step if is_late else None)

    def _fail(self, exc: Exception) -> None:
        """The model runner raised, or brought a result that cannot be: what is computed and what is not is unknown."""
        _log.debug("the engine fails", exc_info=exc)
        self._step = None
        if self._loop is None:  # stopped meanwhile
            return
        self._on_failure(exc if isinstance(exc, MeshserveError) else EngineFailed(f"the engine failed: {exc!r}"))

    def _rest(self) -> None:
        self._is_resting = True
        self._on_turn()
