"""The engine protocol over a scheduler and a model runner: all that engines have in common."""

import asyncio
import contextlib
import logging
import time
from array import array
from collections.abc import Callable, Mapping
from typing import Any

from meshserve.engines.core.rates import StepRates
from meshserve.engines.core.request import END, EngineRequest, Generation, Prefill, check_request, too_long
from meshserve.engines.core.reservation import BlockReservation
from meshserve.engines.core.runner import ModelRunner, StepResult
from meshserve.engines.core.scheduler import Outcome, Scheduler, Stage, Step
from meshserve.engines.protocol import Admission, BlockListener, EngineLoad, GenerationSink, KVBlock, PrefillSink, Reservation
from meshserve.errors import BlockRefused, EngineFailed, InvalidRequest, MeshserveError, PoolFull, Unsupported
from meshserve.kv.pool import block_hashes
from meshserve.wire.card import KVLayout, ModelCard
from meshserve.wire.generation import GenerateRequest

_log = logging.getLogger(__name__)

HANGS_AFTER_S = 1.5
"""A step that is overdue by this time, and still is after the same time again while this process runs, hangs: the engine has failed."""


class CoreEngine:
    """Owns requests from their check to their end, and reservations. The scheduler decides what a
    step computes, the model runner computes it.

    One step is in flight, and takes at least one turn of the event loop. There are no tasks and no
    futures: one handle is armed again and again.

    `clock` gives monotonic seconds. `max_tokens` and `min_tokens` count all output of a sequence, what earlier workers generated
    (`num_generated`) included.
    """

    description = ""
    """For people, in one line: what the engine takes of its host, if that is much. Complete once :meth:`start` has returned."""

    def __init__(self, runner: ModelRunner, clock: Callable[[], float] = time.monotonic) -> None:
        self.runner, self._pool = runner, runner.pool
        self.card: ModelCard = runner.card.within(runner.pool.num_blocks * runner.kv_layout.block_size)
        self.files: Mapping[str, bytes] = runner.files
        self.on_failure: Callable[[MeshserveError], None] = lambda error: None
        """Called once the engine as a whole can compute no more, after its requests have ended; :meth:`start` may try again."""
        self.rates = StepRates(runner.limits)
        self._clock = clock
        self._scheduler: Scheduler[EngineRequest] = Scheduler(runner.pool, runner.kv_layout.block_size, runner.limits)
        self._requests: dict[str, EngineRequest] = {}
        self._reservations: dict[BlockReservation, None] = {}
        self._listener: BlockListener | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        """None while the engine is down: before the start, after a failure, after the close."""
        self._handle: asyncio.Handle | None = None
        """The next turn; None while a step is in flight, and without work."""
        self._step: Step[EngineRequest] | None = None
        self._was_idle = True
        self._watchdog: asyncio.TimerHandle | None = None
        self._expected_at = 0.0
        """When the next turn should come."""

    @property
    def kv_layout(self) -> KVLayout:
        """How KV is kept; complete once the engine has started."""
        return self.runner.kv_layout

    async def start(self) -> None:
        """Get ready to compute. Raises StartupFailed; after a failure, or :meth:`close`, it may be called again."""
        await self.runner.start(self._finished, self._fail)
        self._loop = asyncio.get_running_loop()
        self._wake()

    async def close(self) -> None:
        """Stop all work at once. Sinks are called no more."""
        self._listener = None
        self._end_all()
        await self.runner.close()

    def check(self, request: GenerateRequest) -> None:
        """Raises InvalidRequest, ContextLengthExceeded, Unsupported for what this model cannot do, EngineFailed while it is down."""
        if self._loop is None:
            raise EngineFailed("this worker's engine is down")
        check_request(request, self.runner.vocab_size, self.card.context_length)
        self.runner.check(request.tokens, request.sampling)

    def num_cached_tokens(self, request: GenerateRequest) -> int:
        """Tokens in cached whole blocks at the prompt's start; at least the last token is always left to compute."""
        size = self.kv_layout.block_size
        return len(self._pool.lookup(self._hashes(request)[: (len(request.tokens) - 1) // size])) * size

    def reserve(self, request: GenerateRequest) -> BlockReservation:
        """Set blocks aside for a prompt's KV. Raises PoolFull, and then holds nothing, if there is no room, or others wait for it already.

        InvalidRequest for an empty prompt, Unsupported without handoff, EngineFailed while the engine is down.
        """
        self._check_handoff(request.tokens)
        if self._scheduler.is_waiting_for_room:
            raise PoolFull("others wait for room already")
        hashes, size = self._hashes(request), self.kv_layout.block_size
        reservation = BlockReservation(request, hashes, self._pool, size, self.runner.write_blocks, self._release)
        self._reservations[reservation] = None
        try:
            self.runner.share_prefix(reservation)
        except PoolFull:
            reservation.release()
            raise
        self._wake()  # what was evicted for it must be reported
        return reservation

    def generate(self, request: GenerateRequest, sink: GenerationSink, reservation: Reservation | None = None) -> None:
        """Queue a sequence. Raises what :meth:`check` raises, PoolFull if it could never fit, BlockRefused for an unfit reservation."""
        self.check(request)
        generation = Generation(request, self._hashes(request), sink)
        self.runner.prepare(generation, request.tokens[len(request.tokens) - request.num_generated :])
        if reservation is None:
            self._add(generation)
            return
        if not isinstance(reservation, BlockReservation) or not reservation.is_open or reservation.tokens != request.tokens:
            raise BlockRefused("the reservation is not for this request, or has ended")
        if not reservation.is_complete:
            raise BlockRefused(f"{reservation.num_unwritten} blocks of the reservation were never written")
        generation.num_cached = reservation.num_cached_tokens
        self._add(generation, reservation.blocks)
        self.runner.take_over(reservation, generation)
        reservation.is_open = False
        del self._reservations[reservation]

    def prefill(self, request_id: str, tokens: "array[int]", first_block: int, sink: PrefillSink) -> None:
        """Compute these tokens and give out the blocks from `first_block` on. Raises as :meth:`generate`, Unsupported without handoff."""
        self._check_handoff(tokens)
        if first_block < 0:
            raise InvalidRequest(f"there is no block {first_block}", param="first_block")
        if len(tokens) > self.card.context_length:
            raise too_long(len(tokens), 0, self.card.context_length)
        self.runner.check(tokens, None)
        size, salt = self.kv_layout.block_size, self.card.model_hash
        hashes = block_hashes(tokens, size, salt) if self.runner.shares_prefixes else []
        self._add(Prefill(request_id, tokens, hashes, first_block, sink))

    def cancel(self, request_id: str) -> None:
        """End a generation or a prefill and release its blocks; unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request)
            self._wake()  # its blocks may be what another request waits for

    def admission(self, request_id: str) -> Admission | None:
        """None for unknown ids, and before its first step."""
        request = self._requests.get(request_id)
        if request is None or request.started_at is None:
            return None
        return Admission(request.num_cached or 0, (request.started_at - request.added_at) * 1000)

    def overdue_s(self, request_id: str) -> float | None:
        """How long the next turn, or the model runner's next sign of progress, is overdue; None for unknown ids."""
        if request_id not in self._requests:
            return None
        return max(0.0, self._clock() - self._expected_at) if self._handle is not None else self.runner.overdue_s()

    def load(self) -> EngineLoad:
        """A snapshot, cheap enough for every step."""
        scheduler, pool = self._scheduler, self._pool
        num_running = len(scheduler.running)
        return EngineLoad(
            num_running,
            scheduler.num_unfinished - num_running,
            scheduler.waiting_prefill_tokens,
            pool.num_used,
            len(pool.idle),
            pool.num_blocks,
            scheduler.max_running,
        )

    def watch_blocks(self, listener: BlockListener | None) -> list[int]:
        """Report stored and evicted full prompt blocks from now on, at most once a turn; returns the hashes of those there are."""
        self._listener = listener
        self._pool.record_changes(listener is not None)
        return self._pool.hashes()

    def _hashes(self, request: GenerateRequest) -> list[int]:
        """Of the prompt's blocks, computed once for each request; empty where prefixes are not shared."""
        if not self.runner.shares_prefixes:
            return []
        size, salt, known = self._scheduler.block_size, self.card.model_hash, vars(request).get("block_hashes")
        if known is None or known[:2] != (size, salt):
            known = vars(request)["block_hashes"] = size, salt, block_hashes(request.tokens, size, salt)
        return known[2]

    def _check_handoff(self, tokens: "array[int]") -> None:
        if self._loop is None:
            raise EngineFailed("this worker's engine is down")
        if not self.kv_layout.can_hand_over:
            raise Unsupported(f"this worker does not hand over KV: {self.kv_layout.refusal}")
        if not tokens:
            raise InvalidRequest("the prompt is empty", param="prompt")

    def _release(self, reservation: BlockReservation) -> None:
        del self._reservations[reservation]
        if self._loop is not None:  # else the memory of the blocks is lost
            num_whole = reservation.num_whole
            self._pool.register(reservation.blocks[:num_whole], reservation.hashes[:num_whole])
        self._pool.release(reservation.blocks)
        reservation.blocks = []
        self._wake()

    # --- requests

    def _add(self, request: EngineRequest, blocks: list[int] | None = None) -> None:
        """Queue a request, as :meth:`Scheduler.add` does. Raises InvalidRequest for an id that is known, PoolFull if it could never fit."""
        if request.request_id in self._requests:
            raise InvalidRequest(f"the engine works on a request {request.request_id} already", param="request_id")
        self._scheduler.add(request, self._clock(), blocks)
        self._requests[request.request_id] = request
        self._wake()

    def _end(self, request: EngineRequest) -> None:
        """Take a request out, and release its blocks; its sink is called no more."""
        request.is_live = False
        del self._requests[request.request_id]
        if request.stage is not Stage.ENDED:  # else the scheduler ended it, with its last token
            self._scheduler.end(request)

    def _end_all(self) -> list[Callable[[MeshserveError], None]]:
        """Take no more steps, and ignore the result of the one in flight. All requests and reservations end, and what is cached is
        forgotten, as its memory is not there any more. Returns what tells those concerned.
        """
        for handle in (self._handle, self._watchdog):
            if handle is not None:
                handle.cancel()
        self._loop = self._handle = self._watchdog = self._step = None
        self._was_idle = True
        requests, reservations = list(self._requests.values()), list(self._reservations)
        for request in requests:
            self._end(request)
        for reservation in reservations:
            reservation.release()
        self._pool.evict_idle()
        return [*(reservation.fail for reservation in reservations), *(request.fail for request in requests)]

    def _fail(self, exc: Exception) -> None:
        """The model runner failed, or brought a result that cannot be: nobody knows what is computed. All
        requests end in its error, and the cache is empty.
        """
        _log.debug("the engine fails", exc_info=exc)
        if self._loop is not None:  # else it failed or was closed before
            error = exc if isinstance(exc, MeshserveError) else EngineFailed(f"the engine failed: {exc!r}")
            told = self._end_all()
            self._report_blocks()
            for tell in told:
                with contextlib.suppress(Exception):  # whatever one of them makes of it, the others and the owner are told
                    tell(error)
            self.on_failure(error)

    # --- steps

    def _wake(self) -> None:
        """There may be something to do. Harmless when that is known."""
        if self._handle is None and self._step is None and self._loop is not None:
            self._expected_at = self._clock()
            self._handle = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._handle = None
        step = self._scheduler.schedule(self._clock())
        if step is None:
            self._was_idle = True
            self._report_blocks()
            return
        step.is_first, self._was_idle = self._was_idle, False
        self._step = step
        try:
            self.runner.submit(step)
        except Exception as exc:
            self._fail(exc)
            return
        if self._step is step:  # the step goes on beyond this turn
            self._report_blocks()
            if self._watchdog is None and self._loop is not None:
                self._watchdog = self._loop.call_later(HANGS_AFTER_S, self._look_after, None)

    def _look_after(self, suspect: Step[EngineRequest] | None) -> None:
        """Fail if the step in flight hangs. One timer for all steps.

        That a step is late may be the fault of this process, which may have been stopped: the step is given the same time again.
        """
        self._watchdog, step = None, self._step
        if step is None or self._loop is None:
            return
        is_late = self.runner.overdue_s() >= HANGS_AFTER_S
        if is_late and step is suspect:
            self._fail(EngineFailed("a step of the engine hangs"))
        else:
            self._watchdog = self._loop.call_later(HANGS_AFTER_S, self._look_after, step if is_late else None)

    def _finished(self, result: StepResult) -> None:
        """The step in flight is computed: the model runner's `on_result`."""
        step, self._step = self._step, None
        if step is None:  # the engine failed or was closed meanwhile
            return
        try:
            now = self._clock()
            self.rates.observe(step.num_prompt_tokens, len(step.decodes), step.used_blocks, result.duration_s, now)
            for request, exc in result.failed:
                self._end_in_error(request, exc)
            outcome = self._scheduler.update(step, result.tokens, now)
            if result.blocks or outcome.prefilled:
                self._give_out_prefills(outcome, result)
            self._give_out_tokens(outcome, result, now)
        except Exception as exc:
            self._fail(exc)
            return
        self._was_idle = not self._scheduler.num_unfinished  # known now: no further turn to find out
        if self._pool.has_changes:
            self._report_blocks()
        if not self._was_idle and self._handle is None and self._loop is not None:
            self._expected_at = now  # `_wake` in line: each step passes here
            self._handle = self._loop.call_soon(self._turn)

    def _give_out_prefills(self, outcome: Outcome[Any], result: StepResult) -> None:
        blocks_of: dict[Prefill, list[KVBlock]] = {}
        for prefill, index, num_tokens, payload in result.blocks:
            blocks_of.setdefault(prefill, []).append((index, num_tokens, payload))
        for prefill, blocks in blocks_of.items():
            if prefill.is_live:  # else cancelled meanwhile, or its sink raised
                self._tell(prefill, prefill.sink.on_blocks, blocks)
        for prefill in outcome.prefilled:
            if prefill.is_live:
                self._end(prefill)
                self._tell(prefill, prefill.sink.on_prefilled, prefill.num_cached or 0)

    def _give_out_tokens(self, outcome: Outcome[Any], result: StepResult, now: float) -> None:
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
                    self._end(request)
                    self.rates.finished(request.num_generated)
                    request.sink.on_finish("stop" if token == END else "length", request.stats(now))
            except Exception as exc:
                self._end_in_error(request, exc)

    def _tell(self, prefill: EngineRequest, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as exc:
            self._end_in_error(prefill, exc)

    def _end_in_error(self, request: EngineRequest, exc: Exception) -> None:
        """A sink raised, or its sampler: its sequence ends, the others go on."""
        if request.is_live:
            self._end(request)
            request.fail(EngineFailed(f"the output could not be given out: {exc}"))

    def _report_blocks(self) -> None:
        """Tell the listener what changed since the last time, once a turn."""
        stored, evicted = self._pool.take_changes()
        if self._listener is not None and (stored or evicted):
            self._listener(stored, evicted)
