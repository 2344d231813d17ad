"""Requests: sequences with what the scheduler does not know of them (tokens, and the sinks of the
output), and the bounds of what a request may ask of any engine. What one model cannot do, its runner says.
"""

from array import array
from dataclasses import dataclass
from typing import Any

from meshserve.engines.core.scheduler import Sequence
from meshserve.engines.protocol import GenerationSink, GenerationStats, PrefillSink
from meshserve.errors import ContextLengthExceeded, InvalidRequest, MeshserveError
from meshserve.wire.generation import MAX_BIAS, MAX_LOGPROBS, GenerateRequest, Sampling, TokenLogprobs, check_bounds

END = -1
"""In place of a token: the model ended the sequence. Its end-of-sequence token is not given out."""

_MOST_PROMPT_LOGPROBS = 32_768
"""Of all tokens of a prompt together, alternatives included: they travel as one message, and to read that takes 10 ms."""


@dataclass(slots=True, eq=False, kw_only=True)
class EngineRequest(Sequence):
    """A sequence with tokens."""

    request_id: str
    tokens: "array[int]"
    """The prompt; the output is appended, so that a preempted sequence is recomputed with it."""
    sink: Any
    is_live: bool = True
    """Until it ended or was cancelled: only then may its sink be called."""
    state: Any = None
    """The model runner's own, from the step that admits the request on."""

    def fail(self, error: MeshserveError) -> None:
        """Tell the sink that the sequence ended without all of its output."""
        raise NotImplementedError


class Generation(EngineRequest):
    """A sequence to be continued, perhaps from where an earlier worker left it."""

    __slots__ = ("first_position", "prompt_logprobs", "sampler", "sampling")
    sink: GenerationSink

    def __init__(self, request: GenerateRequest, hashes: list[int], sink: GenerationSink) -> None:
        sampling, tokens = request.sampling, request.tokens[:]  # a copy, since the output is appended to it
        max_new_tokens = sampling.max_tokens - request.num_generated
        super().__init__(len(tokens), hashes, max_new_tokens, request_id=request.request_id, tokens=tokens, sink=sink)
        self.sampling = sampling
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

    def fail(self, error: MeshserveError) -> None:
        """Tell the sink."""
        self.sink.on_error(error)

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
        super().__init__(len(tokens), hashes, 0, request_id=request_id, tokens=tokens, sink=sink)
        self.next_block = first_block

    def fail(self, error: MeshserveError) -> None:
        """Tell the sink."""
        self.sink.on_prefill_failed(error)

    def completed_blocks(self, num_computed: int, block_size: int) -> list[tuple[int, int]]:
        """The blocks to be given out once `num_computed` tokens are computed, as (index, number of tokens), a partial last one among them.

        Each is returned once: the model runner reads it then, and the step's result brings it.
        """
        blocks = []
        while (start := self.next_block * block_size) < num_computed:
            num_tokens = min(block_size, self.num_tokens - start)
            if start + num_tokens > num_computed:
                break
            blocks.append((self.next_block, num_tokens))
            self.next_block += 1
        return blocks


def check_request(request: GenerateRequest, vocab_size: int, context_length: int) -> None:
    """Raises InvalidRequest that names the field of the API that is out of range, ContextLengthExceeded."""
    sampling = request.sampling
    if not request.tokens:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, not {sampling.max_tokens}", param="max_tokens")
    if not 0 <= request.num_generated < min(sampling.max_tokens, len(request.tokens)):
        raise InvalidRequest(f"num_generated is {request.num_generated} with max_tokens {sampling.max_tokens}", param="num_generated")
    _check_sampling(sampling, vocab_size)
    if sampling.prompt_logprobs >= 0 and not request.num_generated:
        _check_prompt_logprobs(request, vocab_size)
    num_prompt = len(request.tokens) - request.num_generated
    if num_prompt + sampling.max_tokens > context_length:
        raise too_long(num_prompt, sampling.max_tokens, context_length)


def too_long(num_prompt: int, num_output: int, context_length: int) -> ContextLengthExceeded:
    """The error for a prompt and its output that have more tokens than the model can take."""
    return ContextLengthExceeded.of(num_prompt, num_output, context_length, "prompt")


def _check_sampling(sampling: Sampling, vocab_size: int) -> None:
    if not 0 <= sampling.choice < 2**32:
        raise InvalidRequest(f"there is no choice {sampling.choice}", param="n")
    for wanted in (sampling.logprobs, sampling.prompt_logprobs):
        if not -1 <= wanted <= MAX_LOGPROBS:
            raise InvalidRequest(f"logprobs must be from 0 to {MAX_LOGPROBS}, not {wanted}", param="logprobs")
    check_bounds(sampling)
    for token, bias in sampling.logit_bias:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(f"logit_bias names the token {token}; there are 0 to {vocab_size - 1}", param="logit_bias")
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            words = f"logit_bias must be from -{MAX_BIAS} to {MAX_BIAS}, not {bias} as for the token {token}"
            raise InvalidRequest(words, param="logit_bias")


def _check_prompt_logprobs(request: GenerateRequest, vocab_size: int) -> None:
    num_alternatives, tokens = request.sampling.prompt_logprobs, request.tokens
    if len(tokens) * (1 + num_alternatives) > _MOST_PROMPT_LOGPROBS:
        most = _MOST_PROMPT_LOGPROBS // (1 + num_alternatives)
        raise InvalidRequest(
            f"log probabilities of a prompt are given for at most {most} tokens with {num_alternatives} alternatives each, and not "
            f"for {len(tokens)}",
            param="logprobs",
        )
    if max(tokens) >= vocab_size:
        raise InvalidRequest(f"the prompt has the token {max(tokens)}; there are 0 to {vocab_size - 1}", param="prompt")
