"""What a request may ask of any engine: sampling parameters and lengths within their bounds. What one model cannot do, its runner says."""

from meshserve.errors import ContextLengthExceeded, InvalidRequest
from meshserve.wire.generation import GenerateRequest, Sampling

_MOST_LOGPROBS = 20
_MOST_PENALTY, _MOST_BIAS = 2.0, 100.0
_LEAST_REPETITION, _MOST_REPETITION = 0.01, 1e6
_MOST_PROMPT_LOGPROBS = 32_768
"""Of all tokens of a prompt together, alternatives included: they travel as one message, and to read that takes 10 ms."""


def check_request(request: GenerateRequest, vocab_size: int) -> None:
    """Raises InvalidRequest that names the field of the API that is out of range."""
    sampling = request.sampling
    if not request.tokens:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, not {sampling.max_tokens}", param="max_tokens")
    if not 0 <= request.num_generated < min(sampling.max_tokens, len(request.tokens)):
        raise InvalidRequest(f"num_generated is {request.num_generated} with max_tokens {sampling.max_tokens}", param="num_generated")
    _check_sampling(sampling, vocab_size)
    if sampling.prompt_logprobs >= 0:
        _check_prompt_logprobs(request, vocab_size)


def check_length(num_prompt: int, num_output: int, context_length: int) -> None:
    """Raises ContextLengthExceeded if the tokens of a prompt and its output are more than the model can take."""
    if num_prompt + num_output > context_length:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context_length} tokens. However, you requested {num_prompt + num_output} tokens "
            f"({num_prompt} in the prompt, {num_output} in the completion). Please reduce the length of either.",
            param="prompt" if num_prompt >= context_length else "max_tokens",
        )


def _check_sampling(sampling: Sampling, vocab_size: int) -> None:
    if not sampling.temperature >= 0:
        raise InvalidRequest(f"temperature must not be negative, as {sampling.temperature} is", param="temperature")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest(f"top_p must be above 0 and at most 1, not {sampling.top_p}", param="top_p")
    if not 0 <= sampling.min_p <= 1:
        raise InvalidRequest(f"min_p must be from 0 to 1, not {sampling.min_p}", param="min_p")
    if not _LEAST_REPETITION <= sampling.repetition_penalty <= _MOST_REPETITION:
        raise InvalidRequest(f"repetition_penalty must be at least 0.01, not {sampling.repetition_penalty}", param="repetition_penalty")
    if not 0 <= sampling.choice < 2**32:
        raise InvalidRequest(f"there is no choice {sampling.choice}", param="n")
    for name, value in (("presence_penalty", sampling.presence_penalty), ("frequency_penalty", sampling.frequency_penalty)):
        if not -_MOST_PENALTY <= value <= _MOST_PENALTY:
            raise InvalidRequest(f"{name} must be from -2 to 2, not {value}", param=name)
    for wanted in (sampling.logprobs, sampling.prompt_logprobs):
        if not -1 <= wanted <= _MOST_LOGPROBS:
            raise InvalidRequest(f"logprobs must be from 0 to {_MOST_LOGPROBS}, not {wanted}", param="logprobs")
    for token, bias in sampling.logit_bias:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(f"logit_bias names the token {token}; there are 0 to {vocab_size - 1}", param="logit_bias")
        if not -_MOST_BIAS <= bias <= _MOST_BIAS:
            raise InvalidRequest(f"logit_bias must be from -100 to 100, not {bias} as for the token {token}", param="logit_bias")


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
