"""One step, made on the event loop and computed in the engine's thread."""

import time
from dataclasses import dataclass, field

from meshserve.engines.core.request import END, EngineRequest, Generation, Prefill
from meshserve.engines.core.runner import StepResult
from meshserve.engines.core.sampling import Sampler
from meshserve.engines.llama.blocks import cut
from meshserve.engines.llama.context import LlamaContext
from meshserve.engines.llama.slots import Operation
from meshserve.errors import BlockRefused, EngineFailed

Failure = tuple[EngineRequest, Exception]


@dataclass(slots=True)
class LlamaStep:
    """What comes before the step, its rows as llama.cpp sees them, and what is sampled and exported after it."""

    failed: list[Failure]
    """Requests that it leaves out."""
    operations: list[Operation] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    wants_logits: list[bool] = field(default_factory=list)
    samples: list[tuple[EngineRequest, Sampler, int, int] | None] = field(default_factory=list)
    """Of each request of the step, in order: its sampler, its row, the token's position in the output. None: no token follows."""
    exports: list[tuple[Prefill, int, int, int, int]] = field(default_factory=list)
    """Of each block that is complete with the step: prompt, index, number of tokens, sequence, first position."""
    states: list[tuple[Prefill, list[tuple[int, int]], int, int]] = field(default_factory=list)
    """Of each state that is complete with it: prompt, its blocks (index, number of tokens), how many it is cut into, sequence."""

    def add(self, request: EngineRequest, num_tokens: int, is_sampled: bool) -> None:
        """The request's next tokens, perhaps none; logits are wanted after the last one, or after none."""
        if num_tokens:
            first = request.num_computed
            self.tokens += request.tokens[first : first + num_tokens]
            self.positions += range(first, first + num_tokens)
            self.sequences += [request.state.number] * num_tokens
            self.wants_logits += [False] * (num_tokens - 1) + [is_sampled]
        if is_sampled:
            assert isinstance(request, Generation), "only generations are sampled"
            self.samples.append((request, request.sampler, len(self.tokens) - 1, request.position))
        else:
            self.samples.append(None)

    def export(self, prefill: Prefill, num_computed: int, block_size: int) -> None:
        """Blocks that are complete once so many tokens are computed."""
        for index, num_tokens in prefill.completed_blocks(num_computed, block_size):
            self.exports.append((prefill, index, num_tokens, prefill.state.number, index * block_size))

    def export_state(self, prefill: Prefill, num_computed: int, block_size: int) -> None:
        """The state, once all of the prompt is computed, in the places of all blocks."""
        if num_computed == prefill.num_tokens:
            num_pieces = -(-prefill.num_tokens // block_size)
            self.states.append((prefill, list(prefill.completed_blocks(num_computed, block_size)), num_pieces, prefill.state.number))

    def compute(self, context: LlamaContext) -> StepResult:
        """In the engine's thread. Raises EngineFailed."""
        began_s = time.monotonic()
        context.operate(self.operations)
        if self.tokens and not context.decode(self.tokens, self.positions, self.sequences, self.wants_logits):
            raise EngineFailed("the KV cache is full though blocks were free: accounting of cells is broken")
        result = StepResult([], failed=self.failed)
        for sample in self.samples:
            result.tokens.append(END if sample is None else _sample(context, result, *sample))
        for prefill, index, num_tokens, sequence, first_position in self.exports:
            try:
                result.blocks.append((prefill, index, num_tokens, context.export_block(sequence, first_position, num_tokens)))
            except BlockRefused as error:
                result.failed.append((prefill, error))
        for prefill, blocks, num_pieces, sequence in self.states:
            pieces = cut(context.export_block(sequence, 0, prefill.num_tokens), num_pieces)
            result.blocks += [(prefill, index, num_tokens, pieces[index]) for index, num_tokens in blocks]
        result.duration_s = time.monotonic() - began_s
        return result


def _sample(context: LlamaContext, result: StepResult, request: EngineRequest, sampler: Sampler, row: int, position: int) -> int:
    """A sampler that raises fails its own request, and nobody else's."""
    try:
        token, logprobs = sampler.sample(context.logits(row), position)
    except Exception as exc:
        result.failed.append((request, exc))
        return END
    if logprobs is not None:
        result.logprobs[request] = logprobs
    return token
