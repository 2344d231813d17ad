"""A model of llama.cpp behind the frame that all engines share: steps, samples and blocks go to a thread that owns the context."""

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from weakref import WeakKeyDictionary

from meshserve.engines.claims import Claim, Share
from meshserve.engines.constraints.constraint import Constraint, ConstraintCompiler
from meshserve.engines.core.engine import CoreEngine
from meshserve.engines.core.request import EngineRequest, Generation, Prefill
from meshserve.engines.core.reservation import BlockReservation, WriteDone
from meshserve.engines.core.runner import StepResult
from meshserve.engines.core.sampling import Sampler
from meshserve.engines.core.scheduler import Step
from meshserve.engines.llama.blocks import MAX_PIECE_BYTES, BlockFormat, StatePieces
from meshserve.engines.llama.context import LlamaContext, probe
from meshserve.engines.llama.model import LlamaModel
from meshserve.engines.llama.options import LlamaOptions, describe, parse_options
from meshserve.engines.llama.slots import Slot, Slots
from meshserve.engines.llama.step import Failure, LlamaStep
from meshserve.engines.protocol import EngineOptions
from meshserve.engines.thread import EngineThread
from meshserve.errors import BlockRefused, InvalidRequest, MeshserveError, PoolFull, StartupFailed, Unsupported
from meshserve.kv.pool import BlockPool
from meshserve.wire.card import KVLayout
from meshserve.wire.generation import Sampling
from meshserve.wire.structs import replace

_CLOSE_TIMEOUT_S = 5.0
_MIXED_STEP_S = 0.1
_FEWEST_MIXED_TOKENS = 32
"""Beside running sequences a step computes as many prompt tokens as this time allows, at least as many as this number."""
_RATE_WEIGHT, _LOAD_TOKENS = 0.05, 16
"""Of a new step in the time that a token takes; as many tokens as the start takes time for, before the first step."""
_PATIENCE = 4.0
"""A step is overdue once it takes so many times as long as its tokens took so far."""
_LEAST_PATIENCE_S = 1.0
_MOST_OPERATIONS = 1024
"""Of slots, before they are sent to the engine's thread by themselves: as many as reservations of a large pool that come to nothing."""


class LlamaRunner:
    """Continuous batching over one unified KV pool; blocks are `block_size` tokens."""

    def __init__(self, options: LlamaOptions) -> None:
        self._options = options
        self.card, self.files, self.vocab_size = options.card, options.files, options.vocab_size
        self.limits = options.limits
        self.pool = BlockPool(options.num_blocks)
        self.shares_prefixes = True
        fingerprint = f"llama/{options.card.model_hash}"
        self.kv_layout = KVLayout(fingerprint, options.block_size, options.kv_bytes_per_token, "the model is not loaded yet")
        self._thread: EngineThread[LlamaContext] | None = None
        self._block_format: BlockFormat | None = None
        """What blocks from elsewhere are checked with; None: none are taken."""
        self._has_state = False
        """Whether KV is handed over as whole states, in the places of blocks."""
        self._pieces: WeakKeyDictionary[BlockReservation, StatePieces] = WeakKeyDictionary()
        self._slots = Slots(options.num_slots, self.pool, options.block_size)
        self._end_tokens: list[int] = []
        self._compiler: ConstraintCompiler | None = None
        self._on_result: Callable[[StepResult], None] = lambda result: None
        self._on_failure: Callable[[MeshserveError], None] = lambda error: None
        self._in_flight: Step[EngineRequest] | None = None
        self._began_s = self._expected_s = 0.0
        self._s_per_token = 0.0

    async def start(self, on_result: Callable[[StepResult], None], on_failure: Callable[[MeshserveError], None]) -> None:
        """Load the model in its thread, and try whether its KV can be handed over. Raises StartupFailed."""
        await self.close()
        self._on_result, self._on_failure = on_result, on_failure
        self._slots = Slots(self._options.num_slots, self.pool, self._options.block_size)
        thread = self._thread = EngineThread(self._load, self._on_failure)
        await thread.start()
        if self._thread is not thread:
            raise StartupFailed("the engine was closed while it started")

    @contextmanager
    def _load(self) -> Iterator[LlamaContext]:
        """In the engine's thread."""
        options = self._options
        with closing(LlamaModel(options.path)) as model:
            began_s = time.monotonic()
            context = LlamaContext(
                model,
                num_cells=options.num_cells,
                num_sequences=options.num_slots + 1,
                max_batch=self.limits.max_step_tokens,
                max_outputs=self.limits.max_running,
                num_threads=options.num_threads,
                kv_type=options.kv_type,
            )
            with closing(context):
                self._learn(context)
                self._s_per_token = max(self._s_per_token, (time.monotonic() - began_s) / _LOAD_TOKENS)
                yield context

    def _learn(self, context: LlamaContext) -> None:
        """What only the loaded model tells."""
        options, model, layout = self._options, context.model, self.kv_layout
        refusal = probe(context, options.block_size)
        # cells behind a window are reused while their sequence lives: a prefix of it may lack what its next token sees
        is_cut_anywhere = not 0 < model.sliding_window < options.card.context_length
        self.shares_prefixes, self._has_state = is_cut_anywhere and not model.has_state, model.has_state
        self._slots.can_move, self._slots.moves_whole = context.keeps_removed, model.has_state
        self._end_tokens = model.end_tokens()
        pieces = model.text_pieces()  # 0.3 s in which, at the first constraint, the event loop would stand still
        self._compiler = ConstraintCompiler(lambda: pieces, self._end_tokens, model.tokenize)
        self._block_format = form = context.block_format
        if form is not None:
            shared = (options.card.model_hash, model.library.build, options.kv_type, str(options.block_size))
            layout = replace(layout, fingerprint=form.fingerprint(*shared))
        self.kv_layout = replace(layout, refusal=refusal, numerics=model.library.processor_class)

    async def close(self) -> None:
        """End the thread, and free the context and the model."""
        thread, self._thread, self._in_flight, self._compiler = self._thread, None, None, None
        if thread is not None:
            await thread.close(_CLOSE_TIMEOUT_S)

    def check(self, tokens: "array[int]", sampling: Sampling | None) -> None:
        """Raises Unsupported for what is not done with a real model, InvalidRequest for a malformed
        constraint, and for a token beyond the vocabulary: llama.cpp would refuse the whole step.
        """
        if (largest := max(tokens)) >= self.vocab_size:
            raise InvalidRequest(f"the prompt has the token {largest}; there are 0 to {self.vocab_size - 1}", param="prompt")
        if sampling is not None:
            if sampling.prompt_logprobs >= 0:
                raise Unsupported("log probabilities of the prompt are not supported by this engine", param="logprobs")
            self._constraint_of(sampling)

    def _constraint_of(self, sampling: Sampling) -> Constraint | None:
        if not sampling.json_schema and not sampling.regex and not sampling.choices:
            return None
        assert self._compiler is not None, "requests come after the start"
        return self._compiler.compile(json_schema=sampling.json_schema, regex=sampling.regex, choices=sampling.choices)

    def prepare(self, generation: Generation, output: Sequence[int]) -> None:
        """Set its sampler. Raises InvalidRequest if the output could not have come from this request."""
        prompt = generation.tokens[: generation.num_tokens - len(output)]
        generation.sampler = Sampler(generation.sampling, prompt, output, self._end_tokens, self._constraint_of(generation.sampling))

    def take_over(self, reservation: BlockReservation, generation: Generation) -> None:
        """The generation goes on in the reservation's slot."""
        generation.state = reservation.state
        generation.state.owner = generation

    def overdue_s(self) -> float:
        """How much longer the step takes than its tokens took so far."""
        return max(0.0, time.monotonic() - self._began_s - self._expected_s) if self._in_flight is not None else 0.0

    # --- steps

    def submit(self, step: Step[EngineRequest]) -> None:
        """Send it to the engine's thread."""
        assert self._thread is not None, "steps come after the start"
        self._slots.release_removed()
        work = LlamaStep(self._open_all(step.admitted))
        for request in step.decodes:
            self._slots.extend(request.state, request.blocks)
            work.add(request, 1, True)
        for request, num_tokens in step.prefills:
            if request.state is None:  # no slot was left
                work.add(request, 0, False)
                continue
            self._slots.extend(request.state, request.blocks)
            work.add(request, num_tokens, request.max_new_tokens > 0 and num_tokens == request.num_pending)
            if isinstance(request, Prefill):
                export = work.export_state if self._has_state else work.export
                export(request, request.num_computed + num_tokens, self._options.block_size)
        work.operations = self._slots.take_operations()
        self._in_flight, self._began_s = step, time.monotonic()
        self._expected_s = _LEAST_PATIENCE_S + _PATIENCE * self._s_per_token * len(work.tokens)
        self._thread.submit(work.compute, lambda result: self._finished(step, result))

    def _open_all(self, requests: Sequence[EngineRequest]) -> list[Failure]:
        """A sequence may need the slot that holds what another one goes on from: it is opened after that one."""
        failed: list[Failure] = []
        while requests:
            failed = [failure for request in requests if (failure := self._open(request)) is not None]
            if len(failed) == len(requests):
                return failed
            requests = [request for request, _ in failed]
        return failed

    def _open(self, request: EngineRequest) -> Failure | None:
        """A slot for a sequence that is admitted; one whose KV came from elsewhere has it already."""
        slot = request.state
        if isinstance(slot, Slot) and slot.owner is request and list(slot.blocks.values()) == request.blocks:
            return None
        try:
            request.state = self._slots.open(request, request.num_computed // self._options.block_size)
        except PoolFull as error:
            request.state = None
            return request, error
        return None

    def _finished(self, step: Step[EngineRequest], result: StepResult) -> None:
        if self._in_flight is step:  # else given up meanwhile
            self._in_flight = None
            self._learn_rate(step, result.duration_s)
            self._on_result(result)

    def _learn_rate(self, step: Step[EngineRequest], duration_s: float) -> None:
        num_tokens = step.num_prompt_tokens + len(step.decodes)
        if not num_tokens:
            return
        found = duration_s / num_tokens
        self._s_per_token = max(found, self._s_per_token + (found - self._s_per_token) * _RATE_WEIGHT)
        if step.num_prompt_tokens >= _FEWEST_MIXED_TOKENS and not step.decodes:
            most = self.limits.max_prompt_tokens
            self.limits.max_mixed_tokens = max(_FEWEST_MIXED_TOKENS, min(most, int(_MIXED_STEP_S / found)))

    # --- blocks

    def share_prefix(self, reservation: BlockReservation) -> None:
        """A slot for what comes from elsewhere. Raises PoolFull if running sequences need those that are left, or if its state is too
        long for a prompt as short: it is computed here then."""
        if self._slots.num_available <= self.limits.max_running:
            raise PoolFull("all sequences of the KV cache are in use")
        if self._has_state and self._block_format is not None:
            size_bytes, num_pieces = self._block_format.size_bytes(reservation.num_tokens), len(reservation.missing())
            if 0 < num_pieces * MAX_PIECE_BYTES < size_bytes:
                raise PoolFull(f"a state of {size_bytes} bytes is not handed over for a prompt of {reservation.num_tokens} tokens")
            self._pieces[reservation] = StatePieces(size_bytes, num_pieces)
        reservation.state = self._slots.open(reservation, reservation.num_cached_tokens // self._options.block_size)
        if self._slots.num_operations > _MOST_OPERATIONS and self._thread is not None:  # neither a step nor a block took them along
            operations = self._slots.take_operations()
            self._thread.submit(lambda context: context.operate(operations), lambda done: None)

    def write_blocks(
        self, reservation: BlockReservation, blocks: list[tuple[int, bytes]], on_done: WriteDone
    ) -> None:
        """Check blocks now, and have the engine's thread import them. Raises BlockRefused before llama.cpp sees anything of them."""
        if self._thread is None or self._block_format is None:
            raise BlockRefused("this engine takes no blocks")
        pieces = self._pieces.get(reservation)
        if pieces is not None:
            if pieces.add(blocks):
                whole = pieces
                self._import(reservation, [(0, reservation.num_tokens)], lambda: [whole.joined()], on_done)
            else:
                on_done(None)
            return
        ranges = [(index * self._options.block_size, reservation.tokens_in(index)) for index, _ in blocks]
        payloads = [payload for _, payload in blocks]
        for payload, (first, num_tokens) in zip(payloads, ranges, strict=True):
            self._block_format.check(payload, first, num_tokens)
        self._import(reservation, ranges, lambda: payloads, on_done)

    def _import(
        self,
        reservation: BlockReservation,
        ranges: list[tuple[int, int]],
        read: Callable[[], list[bytes]],
        on_done: WriteDone,
    ) -> None:
        """Have the engine's thread write payloads to these places, given as first position and number of tokens."""
        assert self._thread is not None, "blocks are checked first"
        slot: Slot = reservation.state
        operations, sequence = self._slots.take_operations(), slot.number
        for first, num_tokens in ranges:
            slot.num_written = first + num_tokens if slot.num_written == first else None

        def write(context: LlamaContext) -> MeshserveError | None:
            context.operate(operations)
            written: list[tuple[int, int]] = []
            try:
                for (first, num_tokens), payload in zip(ranges, read(), strict=True):
                    context.import_block(sequence, first, num_tokens, payload)
                    written.append((first, num_tokens))
            except MeshserveError as error:
                # all or none: what is written again must not have its cells twice
                for first, num_tokens in written:
                    context.remove(sequence, first, first + num_tokens)
                return error if isinstance(error, BlockRefused) else BlockRefused(error.message)
            return None

        self._thread.submit(write, on_done)


class LlamaEngine(CoreEngine):
    """A GGUF file, computed by llama.cpp in this process. Raises UsageError for options, StartupFailed for a file that will not do."""

    def __init__(self, options: EngineOptions) -> None:
        self._claim = Claim()
        self._options = parse_options(options, self._claim)
        super().__init__(LlamaRunner(self._options))

    async def start(self) -> None:
        """As :class:`CoreEngine`. What was claimed is claimed again, as after a failure or :meth:`close` nothing is held."""
        options = self._options
        pending = Share(options.kv_cache_bytes, options.num_threads)
        self._claim.update(pending)
        await super().start()
        self._claim.update(pending._replace(pending_bytes=0))
        self.description = describe(options, self.card.model, self.kv_layout.refusal)

    async def close(self) -> None:
        """As :class:`CoreEngine`; what was claimed is left to others."""
        await super().close()
        self._claim.update(None)
