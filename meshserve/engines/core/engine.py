"""The engine protocol over scheduler, stepper and a model runner: all that engines have in common."""

import contextlib
import time
from array import array
from collections.abc import Callable, Mapping

from meshserve.engines.core.limits import check_request
from meshserve.engines.core.rates import StepRates
from meshserve.engines.core.request import EngineRequest, Generation, Prefill
from meshserve.engines.core.reservation import BlockReservation
from meshserve.engines.core.runner import ModelRunner, StepResult
from meshserve.engines.core.scheduler import Outcome, Scheduler, Step
from meshserve.engines.core.stepper import Stepper
from meshserve.engines.protocol import Admission, BlockListener, EngineLoad, GenerationSink, PrefillSink, Reservation
from meshserve.errors import BlockRefused, ContextLengthExceeded, EngineFailed, InvalidRequest, MeshserveError, PoolFull, Unsupported
from meshserve.kv.hashes import block_hashes
from meshserve.wire.card import ModelCard
from meshserve.wire.generation import BlockHashes, GenerateRequest
from meshserve.wire.layout import KVLayout


class CoreEngine:
    """Owns the requests, the queue and the block pool on the event loop; the model runner computes.

    `clock` gives monotonic seconds. `max_tokens` and `min_tokens` count all output of a sequence, what earlier workers generated
    (`num_generated`) included.
    """

    def __init__(self, runner: ModelRunner, clock: Callable[[], float] = time.monotonic) -> None:
        self.runner = runner
        self.card: ModelCard = runner.card
        self.files: Mapping[str, bytes] = runner.files
        self.rates = StepRates(runner.limits)
        self.on_failure: Callable[[MeshserveError], None] = lambda error: None
        """Called once the engine as a whole can compute no more, after its requests have ended; :meth:`start` may try again."""
        self._clock, self._pool = clock, runner.pool
        self._scheduler: Scheduler[EngineRequest] = Scheduler(runner.pool, runner.kv_layout.block_size, runner.limits)
        self._stepper = Stepper(self._scheduler, runner, clock, self._take_step, self._report_blocks, self._fail_all)
        self._requests: dict[str, EngineRequest] = {}
        self._reservations: dict[BlockReservation, None] = {}
        self._listener: BlockListener | None = None
        self._is_up = False

    @property
    def kv_layout(self) -> KVLayout:
        """How KV is kept; complete once the engine has started."""
        return self.runner.kv_layout

    @property
    def description(self) -> str:
        """Nothing: an engine that takes much of its host says so here."""
        return ""

    async def start(self) -> None:
        """Get ready to compute. Raises StartupFailed; after a failure, or :meth:`close`, it may be called again."""
        await self.runner.start(self._stepper.finished, self._fail_all)
        self._is_up = True
        self._stepper.start()

    async def close(self) -> None:
        """Stop all work at once. Sinks are called no more."""
        self._is_up = False
        self._stepper.stop()
        self._listener = None
        self._end_all()
        await self.runner.close()

    def check(self, request: GenerateRequest) -> None:
        """Raises InvalidRequest, ContextLengthExceeded or, for what this model cannot do, Unsupported."""
        check_request(request, self.runner.vocab_size)
        self._check_length(len(request.tokens) - request.num_generated, request.sampling.max_tokens)
        self.runner.check_tokens(request.tokens)
        self.runner.check(request)

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
        size, hashes = self.kv_layout.block_size, self._hashes(request)
        reservation = BlockReservation(request, hashes, self._pool, size, self.runner, self._release)
        try:
            self.runner.share_prefix(reservation)
        except PoolFull:
            self._pool.release(reservation.blocks)
            raise
        self._reservations[reservation] = None
        self._stepper.kick()  # what was evicted for it must be reported
        return reservation

    def generate(self, request: GenerateRequest, sink: GenerationSink, reservation: Reservation | None = None) -> None:
        """Queue a sequence. Raises what :meth:`check` raises, PoolFull if it could never fit, BlockRefused for an unfit reservation."""
        self._check_is_up()
        self.check(request)
        self._check_is_new(request.request_id)
        generation = Generation(request, self._hashes(request), sink)
        self.runner.prepare(generation, request.tokens[len(request.tokens) - request.num_generated :])
        if reservation is None:
            self._add(generation, None)
            return
        if not isinstance(reservation, BlockReservation) or not reservation.is_open or reservation.tokens != request.tokens:
            raise BlockRefused("the reservation is not for this request, or has ended")
        if not reservation.is_complete:
            raise BlockRefused(f"{reservation.num_unwritten} blocks of the reservation were never written")
        generation.num_cached = reservation.num_cached_tokens
        self.runner.take_over(reservation, generation)
        self._add(generation, reservation.blocks)
        reservation.is_open = False
        self._reservations.pop(reservation, None)

    def prefill(self, request_id: str, tokens: "array[int]", first_block: int, sink: PrefillSink) -> None:
        """Compute the KV of all these tokens and give out the blocks from `first_block` on. Raises as :meth:`generate` does, and
        Unsupported without handoff."""
        self._check_handoff(tokens)
        if first_block < 0:
            raise InvalidRequest(f"there is no block {first_block}", param="first_block")
        self._check_length(len(tokens), 0)
        self.runner.check_tokens(tokens)
        self._check_is_new(request_id)
        size, salt = self.kv_layout.block_size, self.card.model_hash
        hashes = block_hashes(tokens, size, salt) if self.runner.shares_prefixes else []
        self._add(Prefill(request_id, tokens, hashes, first_block, sink), None)

    def cancel(self, request_id: str) -> None:
        """End a generation or a prefill and release its blocks; unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request)
            self._stepper.kick()  # what it held may be what another waits for

    def admission(self, request_id: str) -> Admission | None:
        """None for unknown ids, and before its first step."""
        request = self._requests.get(request_id)
        if request is None or request.started_at is None:
            return None
        return Admission(request.num_cached or 0, (request.started_at - request.added_at) * 1000)

    def overdue_s(self, request_id: str) -> float | None:
        """How far the engine is behind its own expectation; None for unknown ids."""
        return self._stepper.overdue_s() if request_id in self._requests else None

    def load(self) -> EngineLoad:
        """A snapshot, cheap enough for every step."""
        scheduler, pool = self._scheduler, self._pool
        return EngineLoad(
            scheduler.num_running,
            scheduler.num_waiting,
            scheduler.waiting_prefill_tokens,
            pool.num_used,
            pool.num_idle,
            pool.num_blocks,
            scheduler.max_running,
        )

    def watch_blocks(self, listener: BlockListener | None) -> list[int]:
        """Report stored and evicted full prompt blocks from now on, at most once a turn; returns the hashes of those there are."""
        self._listener = listener
        self._pool.record_changes(listener is not None)
        return self._pool.hashes()

    # --- requests

    def _hashes(self, request: GenerateRequest) -> list[int]:
        """Computed once for each request: whether to hand over, reserving and generating all ask for them. None where no KV is found
        by them."""
        if not self.runner.shares_prefixes:
            return []
        size, salt, known = self.kv_layout.block_size, self.card.model_hash, request.hashes
        if known is None or known.block_size != size or known.salt != salt:
            known = request.hashes = BlockHashes(size, salt, block_hashes(request.tokens, size, salt))
        return known.hashes

    def _check_is_up(self) -> None:
        if not self._is_up:
            raise EngineFailed("this worker's engine is down")

    def _check_handoff(self, tokens: "array[int]") -> None:
        self._check_is_up()
        if not self.kv_layout.can_hand_over:
            raise Unsupported(f"this worker does not hand over KV: {self.kv_layout.refusal}")
        if not tokens:
            raise InvalidRequest("the prompt is empty", param="prompt")

    def _check_length(self, num_prompt: int, num_output: int) -> None:
        if num_prompt + num_output > self.card.context_length:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.card.context_length} tokens. However, you requested "
                f"{num_prompt + num_output} tokens ({num_prompt} in the prompt, {num_output} in the completion). "
                "Please reduce the length of either.",
                param="prompt" if num_prompt >= self.card.context_length else "max_tokens",
            )

    def _check_is_new(self, request_id: str) -> None:
        if request_id in self._requests:
            raise InvalidRequest(f"the engine works on a request {request_id} already", param="request_id")

    def _add(self, request: EngineRequest, blocks: list[int] | None) -> None:
        self._scheduler.add(request, self._clock(), blocks)
        self._requests[request.request_id] = request
        self._stepper.kick()

    def _end(self, request: EngineRequest) -> None:
        request.is_live = False
        del self._requests[request.request_id]
        self._scheduler.end(request)

    def _release(self, reservation: BlockReservation) -> None:
        self._reservations.pop(reservation, None)
        self._pool.release(reservation.blocks)
        reservation.blocks = []
        self._stepper.kick()

    # --- steps

    def _take_step(self, step: Step[EngineRequest], result: StepResult) -> None:
        now = self._clock()
        self.rates.observe(step.num_prompt_tokens, len(step.decodes), step.used_blocks, result.duration_s)
        for request, exc in result.failed:
            self._fail(request, exc)
        outcome = self._scheduler.update(step, result.tokens, now)
        if result.blocks or outcome.prefilled:
            self._give_out_blocks(result, outcome, now)
        logprobs = result.logprobs
        for request, token in zip(outcome.producing, outcome.tokens, strict=True):
            if request.is_live:  # else cancelled meanwhile, perhaps by the sink that was called before
                try:
                    reason = request.give_out(token, logprobs.get(request) if logprobs else None)
                    if reason and request.is_live:
                        self._finish(request, reason, now)
                except Exception as exc:
                    self._fail(request, exc)

    def _give_out_blocks(self, result: StepResult, outcome: Outcome[EngineRequest], now: float) -> None:
        for prefill, index, num_tokens, payload in result.blocks:
            if prefill.is_live:
                try:
                    prefill.give_out_block(index, num_tokens, payload)
                except Exception as exc:
                    self._fail(prefill, exc)
        for request in outcome.prefilled:
            if request.is_live:
                self._finish(request, "computed", now)

    def _finish(self, request: EngineRequest, reason: str, now: float) -> None:
        self._end(request)
        if request.max_new_tokens:
            self.rates.finished(request.num_generated)
        request.finish(reason, now)

    def _fail(self, request: EngineRequest, exc: Exception) -> None:
        """A sink raised, or its sampler: its sequence ends, the others go on."""
        if request.is_live:
            self._end(request)
            request.fail(EngineFailed(f"the output could not be given out: {exc}"))

    def _fail_all(self, error: MeshserveError) -> None:
        """The model runner can compute no more: all requests end in its error, and the cache is empty."""
        if not self._is_up:
            return
        self._is_up = False
        self._stepper.stop()
        reservations = list(self._reservations)
        requests = self._end_all()
        self._report_blocks()
        for fail in (*(reservation.fail for reservation in reservations), *(request.fail for request in requests)):
            with contextlib.suppress(Exception):  # whatever one of them makes of it, the others and the owner are told
                fail(error)
        self.on_failure(error)

    def _end_all(self) -> list[EngineRequest]:
        """What runs ends and what is cached is forgotten, as the memory is not there any more."""
        requests = list(self._requests.values())
        for request in requests:
            self._end(request)
        for reservation in list(self._reservations):
            reservation.release()
        self._pool.evict_idle()
        return requests

    def _report_blocks(self) -> None:
        if self._listener is not None:
            stored, evicted = self._pool.take_changes()
            if stored or evicted:
                self._listener(stored, evicted)
