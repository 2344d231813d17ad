"""Plays the scheduler's steps on the event loop, one at a time, and gives out what they bring."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from meshserve.engines.core.rates import StepRates
from meshserve.engines.core.request import END, EngineRequest, Generation, Prefill
from meshserve.engines.core.runner import ModelRunner, StepResult
from meshserve.engines.core.scheduler import Outcome, Scheduler, Step
from meshserve.engines.protocol import BlockListener
from meshserve.errors import EngineFailed, InvalidRequest, MeshserveError

_log = logging.getLogger(__name__)

HANGS_AFTER_S = 1.5
"""A step that is overdue by as much, and still is after as long again while this process runs, hangs: the engine has failed."""


class Stepper:
    """Owns an engine's requests from :meth:`add` to their end. One step in flight, each at least one turn of the event loop.

    No tasks and no futures: one handle, re-armed. `on_failure` is called, with no step in flight, when the model runner raises or hangs.
    """

    def __init__(self, runner: ModelRunner, clock: Callable[[], float], on_failure: Callable[[MeshserveError], None]) -> None:
        self.scheduler: Scheduler[Any] = Scheduler(runner.pool, runner.kv_layout.block_size, runner.limits)
        self.rates = StepRates(runner.limits)
        self.requests: dict[str, EngineRequest] = {}
        self.listener: BlockListener | None = None
        """Told of blocks stored and evicted once a turn."""
        self._runner, self._clock, self._on_failure = runner, clock, on_failure
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.Handle | None = None
        self._step: Step[Any] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._is_resting = True
        self._expected_at = 0.0

    @property
    def is_up(self) -> bool:
        """Between :meth:`start` and :meth:`stop`."""
        return self._loop is not None

    def start(self) -> None:
        """Take steps on the running event loop from now on."""
        self._loop = asyncio.get_running_loop()
        self.kick()

    def stop(self) -> list[EngineRequest]:
        """Take no more steps, and ignore the result of the one in flight. All requests end, and are returned."""
        for handle in (self._handle, self._watch):
            if handle is not None:
                handle.cancel()
        self._loop = self._handle = self._watch = self._step = None
        self._is_resting = True
        requests = list(self.requests.values())
        for request in requests:
            self.end(request)
        return requests

    def add(self, request: EngineRequest, blocks: list[int] | None = None) -> None:
        """Queue a request, as :meth:`Scheduler.add` does. Raises InvalidRequest for an id that is known, PoolFull if it could never fit."""
        if request.request_id in self.requests:
            raise InvalidRequest(f"the engine works on a request {request.request_id} already", param="request_id")
        self.scheduler.add(request, self._clock(), blocks)
        self.requests[request.request_id] = request
        self.kick()

    def end(self, request: EngineRequest) -> None:
        """Take a request out, and release its blocks; its sink is called no more."""
        request.is_live = False
        del self.requests[request.request_id]
        self.scheduler.end(request)

    def kick(self) -> None:
        """There may be something to do. Harmless when that is known."""
        if self._handle is None and self._step is None and self._loop is not None:
            self._expected_at = self._clock()
            self._handle = self._loop.call_soon(self._turn)

    def overdue_s(self) -> float:
        """How long ago the next turn, or the next sign of progress of the model runner, should have come."""
        return max(0.0, self._clock() - self._expected_at) if self._handle is not None else self._runner.overdue_s()

    def report_blocks(self) -> None:
        """Tell the listener what changed since the last time."""
        if self.listener is not None:
            stored, evicted = self.scheduler.pool.take_changes()
            if stored or evicted:
                self.listener(stored, evicted)

    # --- a step

    def _turn(self) -> None:
        self._handle = None
        step = self.scheduler.schedule(self._clock())
        if step is None:
            self._is_resting = True
            self.report_blocks()
            return
        step.is_first, self._is_resting = self._is_resting, False
        self._step = step
        try:
            self._runner.submit(step)
        except Exception as exc:
            self._fail(exc)
            return
        if self._step is step:  # it goes on beyond this turn
            self.report_blocks()
            if self._watch is None and self._loop is not None:
                self._watch = self._loop.call_later(HANGS_AFTER_S, self._look, None)

    def _look(self, suspect: Step[Any] | None) -> None:
        """One timer for all steps. That a step is late may be this process's fault, which may have been stopped: it is given as much
        time again."""
        self._watch, step = None, self._step
        if step is None or self._loop is None:
            return
        is_late = self._runner.overdue_s() >= HANGS_AFTER_S
        if is_late and step is suspect:
            self._fail(EngineFailed("a step of the engine hangs"))
        else:
            self._watch = self._loop.call_later(HANGS_AFTER_S, self._look, step if is_late else None)

    def finished(self, result: StepResult) -> None:
        """The step in flight is computed: the model runner's `on_result`."""
        step, self._step = self._step, None
        if step is None:  # stopped meanwhile
            return
        try:
            self._take(step, result)
        except Exception as exc:
            self._fail(exc)
            return
        self._is_resting = self.scheduler.is_idle  # known now: no turn more to find out
        self.report_blocks()
        if not self._is_resting:
            self.kick()

    def _fail(self, exc: Exception) -> None:
        """The model runner raised, or brought a result that cannot be: what is computed and what is not is unknown."""
        _log.debug("the engine fails", exc_info=exc)
        self._step = None
        if self._loop is not None:  # else stopped meanwhile
            self._on_failure(exc if isinstance(exc, MeshserveError) else EngineFailed(f"the engine failed: {exc!r}"))

    def _take(self, step: Step[Any], result: StepResult) -> None:
        now = self._clock()
        self.rates.observe(step.num_prompt_tokens, len(step.decodes), step.used_blocks, result.duration_s)
        for request, exc in result.failed:
            self._end_in_error(request, exc)
        outcome = self.scheduler.update(step, result.tokens, now)
        for prefill, *block in result.blocks:
            if prefill.is_live:  # else cancelled meanwhile, or its sink raised
                self._tell(prefill, prefill.sink.on_block, *block)
        for prefill in outcome.prefilled:
            if prefill.is_live:
                self.end(prefill)
                self._tell(prefill, prefill.sink.on_finish, prefill.num_cached or 0)
        self._give_out(outcome, result, now)

    def _give_out(self, outcome: Outcome[Any], result: StepResult, now: float) -> None:
        logprobs = result.logprobs
        request: Generation
        for request, token in zip(outcome.producing, outcome.tokens, strict=True):
            if not request.is_live:  # cancelled meanwhile, perhaps by the sink that was called before
                continue
            try:
                if request.prompt_logprobs is not None:
                    rated, request.prompt_logprobs = request.prompt_logprobs, None
                    request.sink.on_prompt_logprobs(rated)
                if token != END and request.is_live:
                    request.tokens.append(token)
                    request.sink.on_tokens([token], [logprobs[request]] if logprobs and request in logprobs else None)
                    if request.num_generated < request.max_new_tokens:
                        continue
                if request.is_live:
                    self.end(request)
                    self.rates.finished(request.num_generated)
                    request.sink.on_finish("stop" if token == END else "length", request.stats(now))
            except Exception as exc:
                self._end_in_error(request, exc)

    def _tell(self, prefill: Prefill, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as exc:
            self._end_in_error(prefill, exc)

    def _end_in_error(self, request: EngineRequest, exc: Exception) -> None:
        """A sink raised, or its sampler: its sequence ends, the others go on."""
        if request.is_live:
            self.end(request)
            request.sink.on_error(EngineFailed(f"the output could not be given out: {exc}"))
