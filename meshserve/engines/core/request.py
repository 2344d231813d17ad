"""Sequences with what the scheduler does not know of them: tokens, and the sinks of the output. What a model runner adds is `state`."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from typing import Any

from meshserve.engines.core.scheduler import Sequence, Stage
from meshserve.engines.protocol import GenerationSink, GenerationStats, PrefillSink
from meshserve.errors import MeshserveError
from meshserve.wire.generation import GenerateRequest, TokenLogprobs

END = -1
"""In place of a token: the model ended the sequence. Its end-of-sequence token is not given out."""

_ENDED = Stage.ENDED  # as in the scheduler


class EngineRequest(Sequence, ABC):
    """A sequence with tokens. `is_live` until it ended or was cancelled: only then may its sink be called."""

    __slots__ = ("is_live", "request_id", "state", "tokens")

    def __init__(self, request_id: str, tokens: "array[int]", hashes: list[int], max_new_tokens: int) -> None:
        super().__init__(len(tokens), hashes, max_new_tokens)
        self.request_id = request_id
        self.tokens = tokens
        """The prompt; the output is appended, so that a preempted sequence is recomputed with it."""
        self.is_live = True
        self.state: Any = None
        """The model runner's own, from the step that admits the request on."""

    @abstractmethod
    def give_out(self, token: int, logprobs: TokenLogprobs | None) -> str:
        """Tell the sink the next token, unless it is the end of sequence. If that was the end, why; else nothing."""

    @abstractmethod
    def finish(self, reason: str, now: float) -> None:
        """Tell the sink that this is all."""

    @abstractmethod
    def fail(self, error: MeshserveError) -> None:
        """Tell the sink that no more will come."""


class Generation(EngineRequest):
    """A sequence to be continued, perhaps from where an earlier worker left it."""

    __slots__ = ("_sink", "first_position", "prompt_logprobs", "sampler", "sampling")

    def __init__(self, request: GenerateRequest, hashes: list[int], sink: GenerationSink) -> None:
        # a copy, since the output is appended to it
        super().__init__(request.request_id, request.tokens[:], hashes, request.sampling.max_tokens - request.num_generated)
        self.sampling = request.sampling
        self.first_position = request.num_generated
        """Of the first token that is generated here, counted in the whole output."""
        self.sampler: Any = None
        """The model runner's own: what chooses the tokens, where the sampling parameters alone do not say it."""
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        """Of the prompt's first tokens, as far as the model runner has rated them; None: nobody asked. Outlives a preemption."""
        if request.sampling.prompt_logprobs >= 0 and not request.num_generated:
            self.prompt_logprobs = []
        self._sink = sink

    @property
    def position(self) -> int:
        """Of the next token in the whole output, while the step that produces it runs."""
        return self.first_position + self.num_generated

    def give_out(self, token: int, logprobs: TokenLogprobs | None) -> str:
        """The next token, after the prompt's log probabilities if they were asked for."""
        if self.prompt_logprobs is not None:
            found, self.prompt_logprobs = self.prompt_logprobs, None
            self._sink.on_prompt_logprobs(found)
            if not self.is_live:  # the sink cancelled it
                return ""
        if token == END:
            return "stop"
        self.tokens.append(token)
        self._sink.on_tokens([token], None if logprobs is None else [logprobs])
        return "length" if self.stage is _ENDED else ""

    def finish(self, reason: str, now: float) -> None:
        """With what was measured, if the last token came at `now`."""
        started_at = now if self.started_at is None else self.started_at
        first_token_at = now if self.first_token_at is None else self.first_token_at
        stats = GenerationStats(
            self.num_tokens,
            self.num_cached or 0,
            (started_at - self.added_at) * 1000,
            (first_token_at - started_at) * 1000,
            (now - first_token_at) * 1000,
        )
        self._sink.on_finish(reason, stats)

    def fail(self, error: MeshserveError) -> None:
        """No more tokens."""
        self._sink.on_error(error)


class Prefill(EngineRequest):
    """A prompt whose blocks are given out as steps complete them. `next_block` outlives a preemption: no block is given out twice."""

    __slots__ = ("_sink", "next_block")

    def __init__(self, request_id: str, tokens: "array[int]", hashes: list[int], first_block: int, sink: PrefillSink) -> None:
        super().__init__(request_id, tokens, hashes, 0)
        self.next_block = first_block
        self._sink = sink

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

    def give_out_block(self, index: int, num_tokens: int, payload: bytes) -> None:
        """Tell the sink the next block."""
        self._sink.on_block(index, num_tokens, payload)

    def give_out(self, token: int, logprobs: TokenLogprobs | None) -> str:
        """Nothing: its blocks were given out as they were computed."""
        return ""

    def finish(self, reason: str, now: float) -> None:
        """With what was cached."""
        self._sink.on_finish(self.num_cached or 0)

    def fail(self, error: MeshserveError) -> None:
        """No more blocks."""
        self._sink.on_error(error)
