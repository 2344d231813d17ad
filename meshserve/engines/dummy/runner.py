"""The dummy model: KV bytes and tokens computed on the event loop, in slices so short that nobody else on the loop waits for them."""

import asyncio
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from meshserve.engines.core.engine import CoreEngine
from meshserve.engines.core.request import END, EngineRequest, Generation, Prefill
from meshserve.engines.core.reservation import BlockReservation, WriteDone
from meshserve.engines.core.runner import StepResult
from meshserve.engines.core.scheduler import Stage, Step, StepLimits
from meshserve.engines.dummy.constrained import constrained_output
from meshserve.engines.dummy.model import Cursor, KVContents, next_token
from meshserve.engines.dummy.options import DummyOptions, Timing, parse_options
from meshserve.engines.dummy.sampler import Sampler, sampler_for
from meshserve.engines.protocol import EngineOptions
from meshserve.engines.tokenizers import EOS_TOKEN
from meshserve.errors import BlockRefused, MeshserveError
from meshserve.kv.pool import BlockPool
from meshserve.wire.card import KVLayout
from meshserve.wire.generation import Sampling, TokenLogprobs

_SLICE_TOKENS = 64
_SLICE_BYTES = 1 << 18
"""A slice is the smaller of both."""
_TURN_SLICES = 8
_TURN_S = 0.0005
"""After so many slices or so long the turn ends: 64 tokens take 50 us in memory that was used before, and 500 us have been measured
where the system had to find the pages first."""


class _Slice(NamedTuple):
    request: EngineRequest
    end: int
    due: float


class DummyRunner:
    """Plays the timing of a profile. A step's prompt tokens are computed evenly over its duration, and all its output appears at its end.

    A step is due at its predecessor's due time plus its own duration, so that late wake-ups do not add up; a step that is later than its
    own duration starts afresh. `clock` gives monotonic seconds.
    """

    def __init__(self, options: DummyOptions, model: str, clock: Callable[[], float]) -> None:
        self._vocabulary, self._script = options.vocabulary, options.script
        self.vocab_size = self._vocabulary.vocab_size
        self.card = options.card(model)
        self.kv_layout = KVLayout(f"dummy/{self.card.model_hash}", options.block_size, options.kv_bytes_per_token)
        self.files: Mapping[str, bytes] = {described.sha256: options.files[described.name] for described in self.card.files}
        self.shares_prefixes = True
        self.limits = StepLimits(options.max_batch, options.max_batch_tokens)
        self.pool = BlockPool(options.num_blocks)
        self._contents = KVContents(options.block_size, options.kv_bytes_per_token, self.card.model_hash)
        self._timing, self._clock = options.timing(), clock
        self._is_instant = self._timing == Timing()
        self._slice_tokens = max(1, min(_SLICE_TOKENS, _SLICE_BYTES // options.kv_bytes_per_token))
        self._on_result: Callable[[StepResult], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.Handle | None = None
        self._step: Step[EngineRequest] | None = None
        self._result = StepResult([])
        self._slices: deque[_Slice] = deque()
        self._began = self._due = self._last_due = 0.0
        self._expected_at: float | None = None

    async def start(self, on_result: Callable[[StepResult], None], on_failure: Callable[[MeshserveError], None]) -> None:
        """Nothing to load, and nothing that fails."""
        self._on_result, self._loop = on_result, asyncio.get_running_loop()

    async def close(self) -> None:
        """Cancel what is scheduled."""
        if self._handle is not None:
            self._handle.cancel()
        self._loop = self._handle = self._step = self._expected_at = None
        self._slices.clear()

    def check(self, tokens: "array[int]", sampling: Sampling | None) -> None:
        """Raises InvalidRequest or Unsupported for a constraint that the output cannot keep to. Any number is a token."""
        if sampling is not None and (sampling.json_schema or sampling.regex or sampling.choices):
            constrained_output(sampling, self._vocabulary)

    def prepare(self, generation: Generation, output: Sequence[int]) -> None:
        """A plain request has no sampler of its own: its tokens are those of `next_token`."""
        asked = generation.sampling
        if (
            asked.logprobs >= 0
            or asked.logit_bias
            or (asked.presence_penalty or asked.frequency_penalty or asked.repetition_penalty != 1)
            or (asked.json_schema or asked.regex or asked.choices)
            or self._script is not None
        ):
            generation.sampler = sampler_for(generation, output, self._vocabulary, self._script)

    def overdue_s(self) -> float:
        """How long ago the next turn should have come."""
        return max(0.0, self._clock() - self._expected_at) if self._expected_at is not None else 0.0

    # --- steps

    def submit(self, step: Step[EngineRequest]) -> None:
        """Begin to compute it; an instant one without prompts is computed within the call."""
        now = self._clock()
        self._began = self._due = now
        if not self._is_instant:
            self._set_due(step, now)
        for request in step.admitted:
            request.state = Cursor(self._contents, request.blocks, request.num_computed)
        for request in step.decodes:
            request.state.append(request.tokens[-1])
        self._step, self._result = step, StepResult([])
        if step.prefills:
            self._cut(step)
        elif self._due <= now:
            self._finish(now)
            return
        self._advance(now)

    def _set_due(self, step: Step[EngineRequest], now: float) -> None:
        duration_s = self._timing.step_s(step.num_prompt_tokens, len(step.decodes), step.used_blocks / self.pool.num_blocks)
        if not step.is_first and now <= self._last_due + duration_s:
            self._began = self._last_due
        self._due = self._last_due = self._began + duration_s

    def _cut(self, step: Step[EngineRequest]) -> None:
        num_new, num_done = step.num_prompt_tokens, 0
        for request, num_tokens in step.prefills:
            start, end = request.num_computed, request.num_computed + num_tokens
            # cached tokens are visited too if they are still to be given out, or rated
            if isinstance(request, Prefill):
                start = min(start, request.next_block * self._contents.block_size)
            elif isinstance(request, Generation) and request.prompt_logprobs is not None:
                start = min(start, len(request.prompt_logprobs))
            while start < end:
                stop = min(start + self._slice_tokens, end)
                num_done += max(0, stop - max(start, request.num_computed))
                due = self._began + (self._due - self._began) * (num_done / num_new if num_new else 1.0)
                self._slices.append(_Slice(request, stop, due))
                start = stop

    def _turn(self) -> None:
        self._handle = self._expected_at = None
        if self._step is not None:
            self._advance(self._clock())

    def _advance(self, now: float) -> None:
        """Compute the slices that are due and fit into one turn. Then finish the step, or come back
        for the next slice, or at the end of the step's duration.
        """
        slices, ends_at = self._slices, now + _TURN_S
        delay_s = 0.0
        for _ in range(min(_TURN_SLICES, len(slices))):
            request, end, due = slices[0]
            if due > now:
                delay_s = due - now
                break
            slices.popleft()
            if request.stage is Stage.RUNNING:  # else cancelled meanwhile: its blocks may be somebody else's by now
                self._visit(request, end)
            if slices and self._clock() > ends_at:
                break
        if not slices:
            delay_s = max(0.0, self._due - now)
            if not delay_s:
                self._finish(now)
                return
        assert self._loop is not None, "steps come after the start"
        self._expected_at = now + delay_s
        self._handle = self._loop.call_later(delay_s, self._turn) if delay_s > 0 else self._loop.call_soon(self._turn)

    def _visit(self, request: EngineRequest, end: int) -> None:
        """Compute what is not computed yet of the tokens before `end`, read what is to be given out, rate what is to be rated."""
        cursor = request.state
        if end > cursor.num_tokens:
            cursor.extend(request.tokens[cursor.num_tokens : end])
        if isinstance(request, Prefill):
            completed = request.completed_blocks(end, self._contents.block_size)
            payloads = self._contents.read([(request.blocks[index], count) for index, count in completed])
            for (index, num_tokens), payload in zip(completed, payloads, strict=True):
                self._result.blocks.append((request, index, num_tokens, payload))
        elif isinstance(request, Generation) and request.prompt_logprobs is not None:
            self._rate(request, request.prompt_logprobs, min(end, request.num_tokens))

    def _rate(self, generation: Generation, rated: list[TokenLogprobs | None], end: int) -> None:
        """Log probabilities of the prompt's tokens, each at the place that it would have in a text without a prompt.

        So they are a function of what stands before the token, whatever follows it, and prompts that begin alike are rated alike.
        """
        sampler = Sampler(Sampling(logprobs=generation.sampling.prompt_logprobs), vocabulary=self._vocabulary)
        contexts = self._contents.contexts(generation.blocks, len(rated), end)
        for index, context in enumerate(contexts, len(rated)):
            rated.append(sampler.rate(context, index, self._vocabulary.to_own(generation.tokens[index])) if index else None)

    def _finish(self, now: float) -> None:
        """Sample the next token of each decode, and of each prompt that is complete. One that was
        cancelled meanwhile gets a token as well, which nobody looks at.
        """
        step, result = self._step, self._result
        assert step is not None and self._on_result is not None
        self._step, result.duration_s = None, now - self._began
        producing: list[Any] = step.decodes[:]
        for request, num_tokens in step.prefills:  # of a prompt that goes on, END stands for no token
            is_complete = request.max_new_tokens and num_tokens == request.num_pending
            producing.append(request if is_complete else None)
        keep, from_own = result.tokens.append, self._vocabulary.from_own
        for generation in producing:
            if generation is None:
                keep(END)
                continue
            try:
                if generation.sampler is None:
                    position = generation.first_position + generation.num_generated
                    token = next_token(generation.state.context, generation.sampling, position)
                else:
                    token, logprobs = generation.sampler.sample(
                        generation.state.context, generation.position
                    )
                    if logprobs is not None:
                        result.logprobs[generation] = logprobs
            except Exception as exc:
                result.failed.append((generation, exc))
                token = EOS_TOKEN
            keep(END if token == EOS_TOKEN else from_own[token])
        self._on_result(result)

    # --- blocks

    def share_prefix(self, reservation: BlockReservation) -> None:
        """Blocks are shared by their numbers: nothing to do but to note where digests go on."""
        reservation.state = reservation.num_cached_tokens // self._contents.block_size

    def take_over(self, reservation: BlockReservation, generation: Generation) -> None:
        """Blocks go over by their numbers."""

    def write_blocks(
        self, reservation: BlockReservation, blocks: list[tuple[int, bytes]], on_done: WriteDone
    ) -> None:
        """Taken in within the call. Raises BlockRefused for a wrong length."""
        size, row_bytes = self._contents.block_size, self._contents.kv_bytes_per_token
        for index, payload in blocks:
            expected_bytes = min(size, reservation.num_tokens - index * size) * row_bytes
            if len(payload) != expected_bytes:
                raise BlockRefused(f"block {index} has {len(payload)} bytes instead of {expected_bytes}")
        self._contents.write([(reservation.blocks[index], payload) for index, payload in blocks])
        self._digest_what_is_complete(reservation, dict(blocks))
        on_done(None)

    def _digest_what_is_complete(self, reservation: BlockReservation, written: dict[int, bytes]) -> None:
        """A digest needs that of the block before: what came ahead of its turn waits. A partial last block is digested by its reader."""
        first, num_full = reservation.state, reservation.num_tokens // self._contents.block_size
        missing = reservation.missing()
        end = min(missing[0], num_full) if missing else num_full
        if end > first:
            self._contents.digest(reservation.blocks, first, end, written)
            reservation.state = end


class DummyEngine(CoreEngine):
    """Real KV bytes, tokens that depend on their contents, the timing of a profile; no model.

    `clock` gives monotonic seconds. Raises UsageError for options that it does not know.
    """

    def __init__(self, options: EngineOptions, clock: Callable[[], float] = time.monotonic) -> None:
        runner = DummyRunner(parse_options(options), options.model or "dummy", clock)
        super().__init__(runner, clock)
        asked, most = runner.card.context_length, self.card.context_length
        if "context_length" in options.options and most < asked:
            more = "raise --kv-cache-tokens, or lower context_length"
            self.description = f"{self.card.model}: sequences end at {most:,} of {asked:,} tokens, since the KV cache holds no more: {more}"
