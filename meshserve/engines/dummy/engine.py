"""The dummy engine: the engine protocol over scheduler, KV contents and driver."""

import time
from array import array
from collections.abc import Callable, Mapping

from meshserve.engines.dummy.checking import check_prompt_logprobs, check_sampling, chooser_for
from meshserve.engines.dummy.contents import KVContents
from meshserve.engines.dummy.driver import Driver
from meshserve.engines.dummy.jobs import GenerationJob, Job, PrefillJob, RatedJob
from meshserve.engines.dummy.options import parse_options
from meshserve.engines.dummy.reservation import DummyReservation
from meshserve.engines.dummy.scheduler import Scheduler, Step
from meshserve.engines.protocol import Admission, BlockListener, EngineLoad, EngineOptions, GenerationSink, PrefillSink, Reservation
from meshserve.engines.rates import StepRates
from meshserve.engines.tokenizers import ByteTokenizer
from meshserve.errors import BlockRefused, ContextLengthExceeded, EngineFailed, InvalidRequest, PoolFull
from meshserve.kv.hashes import block_hashes
from meshserve.kv.pool import BlockPool
from meshserve.wire.generation import GenerateRequest


class DummyEngine:
    """Real KV bytes, tokens that depend on their contents, the timing of a profile; no model.

    `clock` gives monotonic seconds. Raises UsageError for options it does not know. `max_tokens` and `min_tokens` count all output
    of a sequence, what earlier workers generated (`num_generated`) included.
    """

    def __init__(self, options: EngineOptions, clock: Callable[[], float] = time.monotonic) -> None:
        parsed = parse_options(options)
        self._speech = parsed.speech()
        self._vocab_size = self._speech.spoken_size if self._speech else ByteTokenizer.vocab_size
        self.card = parsed.card(options.model or "dummy", can_spell=self._speech is None or self._speech.can_spell)
        self.files: Mapping[str, bytes] = parsed.files_by_hash()
        self._clock = clock
        self._pool = BlockPool(parsed.num_blocks)
        self._contents = KVContents(parsed.block_size, parsed.kv_bytes_per_token, self.card.model_hash)
        self._scheduler: Scheduler[Job] = Scheduler(
            self._pool, parsed.timing(), block_size=parsed.block_size, max_batch=parsed.max_batch, max_batch_tokens=parsed.max_batch_tokens
        )
        self.rates = StepRates()
        self._driver = Driver(self._scheduler, self._contents, clock, self._take_step, self._fail, self._report_blocks)
        self._jobs: dict[str, Job] = {}
        self._listener: BlockListener | None = None

    def start(self) -> None:
        """Called once, on the running event loop, before anything else."""
        self._driver.start()

    async def close(self) -> None:
        """Stop all work at once. Sinks are called no more."""
        self._driver.stop()
        self._listener = None
        for request_id in list(self._jobs):
            self.cancel(request_id)

    def check(self, request: GenerateRequest) -> None:
        """Raises InvalidRequest, ContextLengthExceeded or, for a schema that cannot be kept to, Unsupported."""
        sampling = request.sampling
        if not request.tokens:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if sampling.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, not {sampling.max_tokens}", param="max_tokens")
        if not 0 <= request.num_generated < min(sampling.max_tokens, len(request.tokens)):
            raise InvalidRequest(f"num_generated is {request.num_generated} with max_tokens {sampling.max_tokens}", param="num_generated")
        check_sampling(sampling, self._vocab_size, self._speech)
        if sampling.prompt_logprobs >= 0:
            check_prompt_logprobs(request, self._vocab_size)
        self._check_length(len(request.tokens) - request.num_generated, sampling.max_tokens)

    def num_cached_tokens(self, tokens: "array[int]") -> int:
        """Tokens in cached whole blocks at the prompt's start; at least the last token is always left to compute."""
        hashes = self._hashes(tokens[:-1])
        return len(self._pool.lookup(hashes)) * self.card.block_size

    def reserve(self, tokens: "array[int]") -> DummyReservation:
        """Set blocks aside for a prompt's KV. Raises PoolFull, and then holds nothing, if there is no room, or others wait for it already.

        InvalidRequest for an empty prompt.
        """
        if not tokens:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if self._scheduler.is_waiting_for_room:
            raise PoolFull("others wait for room already")
        reservation = DummyReservation(tokens, self._hashes(tokens), self._pool, self._contents, self._release)
        self._driver.kick()  # what was evicted for it must be reported
        return reservation

    def generate(self, request: GenerateRequest, sink: GenerationSink, reservation: Reservation | None = None) -> None:
        """Queue a sequence. Raises what :meth:`check` raises, PoolFull if it could never fit, BlockRefused for an unfit reservation."""
        self.check(request)
        self._check_is_new(request.request_id)
        if reservation is None:
            self._add(self._job_of(request, self._hashes(request.tokens), sink), None)
            return
        if not isinstance(reservation, DummyReservation) or not reservation.is_open or reservation.tokens != request.tokens:
            raise BlockRefused("the reservation is not for this request, or has ended")
        if reservation.missing():
            raise BlockRefused(f"{len(reservation.missing())} blocks of the reservation were never written")
        job = self._job_of(request, reservation.hashes, sink)
        job.num_cached = reservation.num_cached_tokens
        self._add(job, reservation.blocks)
        reservation.is_open = False

    def _job_of(self, request: GenerateRequest, hashes: list[int], sink: GenerationSink) -> GenerationJob:
        chooser = chooser_for(request, self._speech)
        is_rated = request.sampling.prompt_logprobs >= 0 and not request.num_generated
        return (RatedJob if is_rated else GenerationJob)(request, hashes, sink, chooser, self._speech)

    def prefill(self, request_id: str, tokens: "array[int]", first_block: int, sink: PrefillSink) -> None:
        """Compute the KV of all these tokens and give out the blocks from `first_block` on. Raises as :meth:`generate` does."""
        if not tokens:
            raise InvalidRequest("the prompt is empty", param="prompt")
        self._check_length(len(tokens), 0)
        self._check_is_new(request_id)
        self._add(PrefillJob(request_id, tokens, self._hashes(tokens), first_block, sink), None)

    def cancel(self, request_id: str) -> None:
        """End a generation or a prefill and release its blocks; unknown ids are ignored."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._end(job)
            self._driver.kick()  # what it held may be what another waits for

    def admission(self, request_id: str) -> Admission | None:
        """None for unknown ids, and before its first step."""
        job = self._jobs.get(request_id)
        if job is None or job.started_at is None:
            return None
        return Admission(job.num_cached or 0, (job.started_at - job.added_at) * 1000)

    def overdue_s(self, request_id: str) -> float | None:
        """How far the engine is behind its own schedule; None for unknown ids."""
        return self._driver.overdue_s() if request_id in self._jobs else None

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
            scheduler.max_batch,
        )

    def watch_blocks(self, listener: BlockListener | None) -> list[int]:
        """Report stored and evicted full prompt blocks from now on, at most once a turn; returns the hashes of those there are."""
        self._listener = listener
        self._pool.record_changes(listener is not None)
        return self._pool.hashes()

    def _hashes(self, tokens: "array[int]") -> list[int]:
        return block_hashes(tokens, self.card.block_size, self.card.model_hash)

    def _check_length(self, num_prompt: int, num_output: int) -> None:
        if num_prompt + num_output > self.card.context_length:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.card.context_length} tokens. However, you requested "
                f"{num_prompt + num_output} tokens ({num_prompt} in the prompt, {num_output} in the completion). "
                "Please reduce the length of either.",
                param="prompt" if num_prompt >= self.card.context_length else "max_tokens",
            )

    def _check_is_new(self, request_id: str) -> None:
        if request_id in self._jobs:
            raise InvalidRequest(f"the engine works on a request {request_id} already", param="request_id")

    def _add(self, job: Job, blocks: list[int] | None) -> None:
        self._scheduler.add(job, self._clock(), blocks)
        self._jobs[job.request_id] = job
        self._driver.kick()

    def _end(self, job: Job) -> None:
        job.is_live = False
        del self._jobs[job.request_id]
        self._scheduler.end(job)

    def _release(self, reservation: DummyReservation) -> None:
        self._pool.release(reservation.blocks)
        self._driver.kick()

    def _take_step(self, step: Step[Job], began: float, now: float) -> None:
        num_prompt_tokens = sum([num_tokens for _, num_tokens in step.prefills])
        self.rates.observe(num_prompt_tokens, len(step.decodes), self._pool.num_used, now - began)
        outcome = self._scheduler.complete(step, now)
        for job in outcome.prefilled + outcome.producing:
            if job.is_live:  # else cancelled meanwhile, perhaps by the sink that was called before
                try:
                    reason = job.give_out()
                    if reason and job.is_live:
                        self._finish(job, reason, now)
                except Exception as exc:
                    self._fail(job, exc)

    def _finish(self, job: Job, reason: str, now: float) -> None:
        self._end(job)
        if job.max_new_tokens:
            self.rates.finished(job.num_generated)
        job.finish(reason, now)

    def _fail(self, job: Job, exc: Exception) -> None:
        """A sink raised: its sequence ends, the others go on."""
        if job.is_live:
            self._end(job)
            job.fail(EngineFailed(f"the output could not be given out: {exc}"))

    def _report_blocks(self) -> None:
        if self._listener is not None:
            stored, evicted = self._pool.take_changes()
            if stored or evicted:
                self._listener(stored, evicted)
