"""What a request may ask of the dummy engine's last layer, and who chooses its tokens."""

from dataclasses import replace

from meshserve.engines.dummy.choosing import Chooser
from meshserve.engines.dummy.documents import WrittenDocument, read_schema
from meshserve.engines.dummy.speech import Speech
from meshserve.errors import InvalidRequest, Unsupported
from meshserve.wire.generation import GenerateRequest, Sampling

_MOST_LOGPROBS = 20
_MOST_PENALTY = 2.0
_MOST_BIAS = 100.0
_MOST_PROMPT_LOGPROBS = 32_768
"""Of all tokens of a prompt together, alternatives included: they travel as one message, and to read that takes 10 ms."""


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Raises InvalidRequest that names the field of the API that is out of range, Unsupported for a schema that cannot be kept to."""
    if not sampling.temperature >= 0:
        raise InvalidRequest(f"temperature must not be negative, as {sampling.temperature} is", param="temperature")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest(f"top_p must be above 0 and at most 1, not {sampling.top_p}", param="top_p")
    if not 0 <= sampling.min_p <= 1:
        raise InvalidRequest(f"min_p must be from 0 to 1, not {sampling.min_p}", param="min_p")
    if not sampling.repetition_penalty > 0:
        raise InvalidRequest(f"repetition_penalty must be above 0, not {sampling.repetition_penalty}", param="repetition_penalty")
    if not 0 <= sampling.choice < 2**32:
        raise InvalidRequest(f"there is no choice {sampling.choice}", param="n")
    for name, value in (("presence_penalty", sampling.presence_penalty), ("frequency_penalty", sampling.frequency_penalty)):
        if not -_MOST_PENALTY <= value <= _MOST_PENALTY:
            raise InvalidRequest(f"{name} must be from -2 to 2, not {value}", param=name)
    if not -1 <= sampling.logprobs <= _MOST_LOGPROBS:
        raise InvalidRequest(f"logprobs must be from 0 to {_MOST_LOGPROBS}, not {sampling.logprobs}", param="logprobs")
    for token, bias in sampling.logit_bias:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(f"logit_bias names the token {token}; there are 0 to {vocab_size - 1}", param="logit_bias")
        if not -_MOST_BIAS <= bias <= _MOST_BIAS:
            raise InvalidRequest(f"logit_bias must be from -100 to 100, not {bias} as for the token {token}", param="logit_bias")
    if sampling.regex or sampling.choices:
        raise Unsupported("this model cannot keep to an expression or to choices", param="regex" if sampling.regex else "choices")
    if sampling.json_schema:
        read_schema(sampling.json_schema)


def check_prompt_logprobs(request: GenerateRequest, vocab_size: int) -> None:
    """Raises InvalidRequest if a prompt that is to be rated cannot be."""
    num_alternatives, tokens = request.sampling.prompt_logprobs, request.tokens
    if num_alternatives > _MOST_LOGPROBS:
        raise InvalidRequest(f"logprobs must be from 0 to {_MOST_LOGPROBS}, not {num_alternatives}", param="logprobs")
    if len(tokens) * (1 + num_alternatives) > _MOST_PROMPT_LOGPROBS:
        most = _MOST_PROMPT_LOGPROBS // (1 + num_alternatives)
        raise InvalidRequest(
            f"log probabilities of a prompt are given for at most {most} tokens with {num_alternatives} alternatives each, and not "
            f"for {len(tokens)}",
            param="logprobs",
        )
    if max(tokens) >= vocab_size:
        raise InvalidRequest(f"the prompt has the token {max(tokens)}; there are 0 to {vocab_size - 1}", param="prompt")


def chooser_for(request: GenerateRequest, speech: Speech | None) -> Chooser | None:
    """None for a plain request, whose tokens `next_token` gives. It chooses among the model's own tokens, whatever it speaks."""
    sampling = request.sampling
    is_bent = sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
    if sampling.logprobs < 0 and not is_bent and not sampling.json_schema:
        return None
    num_prompt = len(request.tokens) - request.num_generated
    prompt, output = request.tokens[:num_prompt], request.tokens[num_prompt:]
    document = WrittenDocument(read_schema(sampling.json_schema)) if sampling.json_schema else None
    if speech is None:
        return Chooser(sampling, output, document, prompt=prompt)
    bias = tuple((speech.to_own(token), value) for token, value in sampling.logit_bias)
    heard = map(speech.to_byte if document is not None else speech.to_own, output)
    return Chooser(replace(sampling, logit_bias=bias), heard, document, speech.vocab_size, prompt=map(speech.to_own, prompt))
