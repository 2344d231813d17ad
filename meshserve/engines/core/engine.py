"""The engine protocol over stepper, scheduler and a model runner: all that engines have in common."""

import contextlib
import time
from array import array
from collections.abc import Callable, Mapping

from meshserve.engines.core.limits import check_length, check_request
from meshserve.engines.core.request import Generation, Prefill
from meshserve.engines.core.reservation import BlockReservation
from meshserve.engines.core.runner import ModelRunner
from meshserve.engines.core.stepper import Stepper
from meshserve.engines.protocol import Admission, BlockListener, EngineLoad, GenerationSink, PrefillSink, Reservation
from meshserve.errors import BlockRefused, EngineFailed, InvalidRequest, MeshserveError, PoolFull, Unsupported
from meshserve.kv.hashes import block_hashes
from meshserve.wire.card import KVLayout, ModelCard
from meshserve.wire.generation import GenerateRequest


class CoreEngine:
    """Checks and queues requests, and sets blocks aside; the stepper runs them, the model runner computes.

    `clock` gives monotonic seconds. `max_tokens` and `min_tokens` count all output of a sequence, what earlier workers generated
    (`num_generated`) included.
    """

    description = ""
    """For people, in one line: what the engine takes of its host, if that is much. Complete once :meth:`start` has returned."""

    def __init__(self, runner: ModelRunner, clock: Callable[[], float] = time.monotonic) -> None:
        self.runner, self._pool = runner, runner.pool
        self.card: ModelCard = runner.card
        self.files: Mapping[str, bytes] = runner.files
        self.on_failure: Callable[[MeshserveError], None] = lambda error: None
        """Called once the engine as a whole can compute no more, after its requests have ended; :meth:`start` may try again."""
        self._stepper = Stepper(runner, clock, self._fail)
        self.rates = self._stepper.rates
        self._reservations: dict[BlockReservation, None] = {}

    @property
    def kv_layout(self) -> KVLayout:
        """How KV is kept; complete once the engine has started."""
        return self.runner.kv_layout

    async def start(self) -> None:
        """Get ready to compute. Raises StartupFailed; after a failure, or :meth:`close`, it may be called again."""
        await self.runner.start(self._stepper.finished, self._fail)
        self._stepper.start()

    async def close(self) -> None:
        """Stop all work at once. Sinks are called no more."""
        self._stepper.listener = None
        self._end_all()
        await self.runner.close()

    def check(self, request: GenerateRequest) -> None:
        """Raises InvalidRequest, ContextLengthExceeded, Unsupported for what this model cannot do, EngineFailed while it is down."""
        self._check_is_up()
        check_request(request, self.runner.vocab_size)
        check_length(len(request.tokens) - request.num_generated, request.sampling.max_tokens, self.card.context_length)
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
        if self._stepper.scheduler.is_waiting_for_room:
            raise PoolFull("others wait for room already")
        hashes, size = self._hashes(request), self.kv_layout.block_size
        reservation = BlockReservation(request, hashes, self._pool, size, self.runner.write_block, self._release)
        self._reservations[reservation] = None
        try:
            self.runner.share_prefix(reservation)
        except PoolFull:
            reservation.release()
            raise
        self._stepper.kick()  # what was evicted for it must be reported
        return reservation

    def generate(self, request: GenerateRequest, sink: GenerationSink, reservation: Reservation | None = None) -> None:
        """Queue a sequence. Raises what :meth:`check` raises, PoolFull if it could never fit, BlockRefused for an unfit reservation."""
        self.check(request)
        generation = Generation(request, self._hashes(request), sink)
        self.runner.prepare(generation, request.tokens[len(request.tokens) - request.num_generated :])
        if reservation is None:
            self._stepper.add(generation)
            return
        if not isinstance(reservation, BlockReservation) or not reservation.is_open or reservation.tokens != request.tokens:
            raise BlockRefused("the reservation is not for this request, or has ended")
        if not reservation.is_complete:
            raise BlockRefused(f"{len(reservation.unwritten)} blocks of the reservation were never written")
        generation.num_cached = reservation.num_cached_tokens
        self._stepper.add(generation, reservation.blocks)
        self.runner.take_over(reservation, generation)
        reservation.is_open = False
        del self._reservations[reservation]

    def prefill(self, request_id: str, tokens: "array[int]", first_block: int, sink: PrefillSink) -> None:
        """Compute these tokens and give out the blocks from `first_block` on. Raises as :meth:`generate`, Unsupported without handoff."""
        self._check_handoff(tokens)
        if first_block < 0:
            raise InvalidRequest(f"there is no block {first_block}", param="first_block")
        check_length(len(tokens), 0, self.card.context_length)
        self.runner.check_tokens(tokens)
        size, salt = self.kv_layout.block_size, self.card.model_hash
        hashes = block_hashes(tokens, size, salt) if self.runner.shares_prefixes else []
        self._stepper.add(Prefill(request_id, tokens, hashes, first_block, sink))

    def cancel(self, request_id: str) -> None:
        """End a generation or a prefill and release its blocks; unknown ids are ignored."""
        request = self._stepper.requests.get(request_id)
        if request is not None:
            self._stepper.end(request)
            self._stepper.kick()  # what it held may be what another waits for

    def admission(self, request_id: str) -> Admission | None:
        """None for unknown ids, and before its first step."""
        request = self._stepper.requests.get(request_id)
        if request is None or request.started_at is None:
            return None
        return Admission(request.num_cached or 0, (request.started_at - request.added_at) * 1000)

    def overdue_s(self, request_id: str) -> float | None:
        """How far the engine is behind its own expectation; None for unknown ids."""
        return self._stepper.overdue_s() if request_id in self._stepper.requests else None

    def load(self) -> EngineLoad:
        """A snapshot, cheap enough for every step."""
        scheduler, pool = self._stepper.scheduler, self._pool
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
        self._stepper.listener = listener
        self._pool.record_changes(listener is not None)
        return self._pool.hashes()

    def _hashes(self, request: GenerateRequest) -> list[int]:
        """Computed once for each request: whether to hand over, reserving and generating all ask for them. None where no KV is found
        by them."""
        if not self.runner.shares_prefixes:
            return []
        size, salt, known = self.kv_layout.block_size, self.card.model_hash, vars(request).get("block_hashes")
        if known is None or known[:2] != (size, salt):
            known = vars(request)["block_hashes"] = size, salt, block_hashes(request.tokens, size, salt)
        return known[2]

    def _check_is_up(self) -> None:
        if not self._stepper.is_up:
            raise EngineFailed("this worker's engine is down")

    def _check_handoff(self, tokens: "array[int]") -> None:
        self._check_is_up()
        if not self.kv_layout.can_hand_over:
            raise Unsupported(f"this worker does not hand over KV: {self.kv_layout.refusal}")
        if not tokens:
            raise InvalidRequest("the prompt is empty", param="prompt")

    def _release(self, reservation: BlockReservation) -> None:
        del self._reservations[reservation]
        self._pool.release(reservation.blocks)
        reservation.blocks = []
        self._stepper.kick()

    def _fail(self, error: MeshserveError) -> None:
        """The model runner can compute no more: all requests end in its error, and the cache is empty."""
        if self._stepper.is_up:
            told = self._end_all()
            self._stepper.report_blocks()
            for tell in told:
                with contextlib.suppress(Exception):  # whatever one of them makes of it, the others and the owner are told
                    tell(error)
            self.on_failure(error)

    def _end_all(self) -> list[Callable[[MeshserveError], None]]:
        """What runs ends, and what is cached is forgotten, as the memory is not there any more. Returns what tells those concerned."""
        requests, reservations = self._stepper.stop(), list(self._reservations)
        for reservation in reservations:
            reservation.release()
        self._pool.evict_idle()
        return [*(reservation.fail for reservation in reservations), *(request.sink.on_error for request in requests)]
