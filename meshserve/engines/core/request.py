"""Sequences with what the scheduler does not know of them: tokens, and the sinks of the output. What a model runner adds is `state`."""

from array import array
from collections.abc import Iterator
from typing import Any

from meshserve.engines.core.scheduler import Sequence
from meshserve.engines.protocol import GenerationSink, GenerationStats, PrefillSink
from meshserve.wire.generation import GenerateRequest, TokenLogprobs

END = -1
"""In place of a token: the model ended the sequence. Its end-of-sequence token is not given out."""


class EngineRequest(Sequence):
    """A sequence with tokens. `is_live` until it ended or was cancelled: only then may its sink be called."""

    __slots__ = ("is_live", "request_id", "sink", "state", "tokens")

    def __init__(
        self, request_id: str, tokens: "array[int]", hashes: list[int], max_new_tokens: int, sink: GenerationSink | PrefillSink
    ) -> None:
        super().__init__(len(tokens), hashes, max_new_tokens)
        self.request_id, self.sink = request_id, sink
        self.tokens = tokens
        """The prompt; the output is appended, so that a preempted sequence is recomputed with it."""
        self.is_live = True
        self.state: Any = None
        """The model runner's own, from the step that admits the request on."""


class Generation(EngineRequest):
    """A sequence to be continued, perhaps from where an earlier worker left it."""

    __slots__ = ("first_position", "prompt_logprobs", "sampler", "sampling")
    sink: GenerationSink

    def __init__(self, request: GenerateRequest, hashes: list[int], sink: GenerationSink) -> None:
        sampling = self.sampling = request.sampling
        # a copy, since the output is appended to it
        super().__init__(request.request_id, request.tokens[:], hashes, sampling.max_tokens - request.num_generated, sink)
        self.first_position = request.num_generated
        """Of the first token that is generated here, counted in the whole output."""
        self.sampler: Any = None
        """The model runner's own: what chooses the tokens, where the sampling parameters alone do not say it."""
        is_rated = sampling.prompt_logprobs >= 0 and not request.num_generated
        self.prompt_logprobs: list[TokenLogprobs | None] | None = [] if is_rated else None
        """Of the prompt's first tokens, as far as the model runner has rated them; None: nobody asked. Outlives a preemption."""

    @property
    def position(self) -> int:
        """Of the next token in the whole output, while the step that produces it runs."""
        return self.first_position + self.num_generated

    def stats(self, now: float) -> GenerationStats:
        """What was measured, if the last token came at `now`."""
        assert self.started_at is not None and self.first_token_at is not None, "it has produced tokens"
        queue_s, prefill_s, decode_s = self.started_at - self.added_at, self.first_token_at - self.started_at, now - self.first_token_at
        return GenerationStats(self.num_tokens, self.num_cached or 0, queue_s * 1000, prefill_s * 1000, decode_s * 1000)


class Prefill(EngineRequest):
    """A prompt whose blocks are given out as steps complete them. `next_block` outlives a preemption: no block is given out twice."""

    __slots__ = ("next_block",)
    sink: PrefillSink

    def __init__(self, request_id: str, tokens: "array[int]", hashes: list[int], first_block: int, sink: PrefillSink) -> None:
        super().__init__(request_id, tokens, hashes, 0, sink)
        self.next_block = first_block

    def completed_blocks(self, num_computed: int, block_size: int) -> Iterator[tuple[int, int]]:
        """Takes the blocks to be given out once so many tokens are computed, as (index, number of tokens), a partial last one among them.

        Each is yielded once: the model runner reads it then, and the step's result brings it.
        """
        while (start := self.next_block * block_size) < num_computed:
            num_tokens = min(block_size, self.num_tokens - start)
            if start + num_tokens > num_computed:
                break
            self.next_block += 1
            yield self.next_block - 1, num_tokens
