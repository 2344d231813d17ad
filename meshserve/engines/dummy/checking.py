"""What a request may ask of the dummy engine's last layer, and who chooses its tokens."""

import json
from dataclasses import replace
from functools import lru_cache

from meshserve.engines.core.constraint import Constraint, ConstraintCompiler
from meshserve.engines.core.schemas import property_names
from meshserve.engines.dummy.choosing import Chooser
from meshserve.engines.dummy.constrained import ConstrainedOutput
from meshserve.engines.dummy.speech import Speech
from meshserve.engines.tokenizers import EOS_TOKEN, ByteTokenizer
from meshserve.errors import InvalidRequest
from meshserve.wire.generation import GenerateRequest, Sampling

_MOST_LOGPROBS = 20
_MOST_PENALTY = 2.0
_MOST_BIAS = 100.0
_MOST_PROMPT_LOGPROBS = 32_768
"""Of all tokens of a prompt together, alternatives included: they travel as one message, and to read that takes 10 ms."""

_OWN = ByteTokenizer()
_PIECES = [_OWN.token_bytes(token) for token in range(_OWN.vocab_size)]


def check_sampling(sampling: Sampling, vocab_size: int, speech: Speech | None) -> None:
    """Raises InvalidRequest that names the field of the API that is out of range, Unsupported for a schema that cannot be kept to."""
    if not sampling.temperature >= 0:
        raise InvalidRequest(f"temperature must not be negative, as {sampling.temperature} is", param="temperature")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest(f"top_p must be above 0 and at most 1, not {sampling.top_p}", param="top_p")
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
    _constraint_of(sampling, speech)


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
    is_bent = sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty
    if sampling.logprobs < 0 and not is_bent and not sampling.json_schema:
        return None
    output = request.tokens[len(request.tokens) - request.num_generated :]
    constrained = _constrained(sampling, speech)
    if speech is None:
        return Chooser(sampling, output, constrained)
    bias = tuple((speech.to_own(token), value) for token, value in sampling.logit_bias)
    heard = map(speech.to_byte if constrained is not None else speech.to_own, output)
    return Chooser(replace(sampling, logit_bias=bias), heard, constrained, speech.vocab_size)


def _constrained(sampling: Sampling, speech: Speech | None) -> ConstrainedOutput | None:
    constraint = _constraint_of(sampling, speech)
    if constraint is None:
        return None
    pieces = _PIECES if speech is None else speech.pieces
    return ConstrainedOutput(constraint, pieces, _keys_of(sampling.json_schema) if sampling.json_schema else None)


def _constraint_of(sampling: Sampling, speech: Speech | None) -> Constraint | None:
    if not sampling.json_schema:
        return None
    return _compiler(speech).compile(json_schema=sampling.json_schema)


@lru_cache(maxsize=8)
def _compiler(speech: Speech | None) -> ConstraintCompiler:
    """Of the model's own tokens, with the bytes that they are spoken with."""
    pieces = _PIECES if speech is None else speech.pieces
    return ConstraintCompiler(lambda: pieces, (EOS_TOKEN,), str.encode)


@lru_cache(maxsize=32)
def _keys_of(schema: str) -> frozenset[bytes]:
    """The names of properties, as they stand in a document."""
    return frozenset(json.dumps(name, ensure_ascii=False)[1:-1].encode("utf-8", "replace") for name in property_names(json.loads(schema)))
