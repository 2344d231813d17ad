"""The dummy model's last layer: a few candidates that follow from the KV cache's contents, and a choice among them.

Its logits: the words of one part of speech, ranked from a place that the digest names, have 0, -0.4, -0.8 and so on; where a text
ends, the end of sequence has 0 and they have 6 less. Every other token of the vocabulary has -50. Tokens more than 30 below the
best one are never drawn, at any temperature: so bytes and words that do not fit come up only where a bias or a penalty says so.
"""

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from math import exp, log
from struct import Struct

import xxhash

from meshserve.engines.tokenizers import EOS_TOKEN, WORD_RANGES
from meshserve.wire.generation import Sampling

_PATTERN = (
    "start adjective noun verb determiner noun place determiner adjective noun stop "
    "start noun verb determiner adjective noun comma link determiner noun verb determiner noun stop"
)
_SLOTS = tuple((WORD_RANGES[part].start, len(WORD_RANGES[part]), part == "start") for part in _PATTERN.split())
_PERIOD = len(_SLOTS)
_EOS_WINS_BELOW, _EOS_OUT_OF = 3, 14
"""A text may end where a sentence begins, every 12.5 tokens, and does so 3 times in 14: 58 tokens in the mean."""

_LOGIT_STEP = 0.4
"""Between a candidate and the next."""
_EOS_LEAD = 6.0
"""How far the end of sequence leads when it wins; else it is one of the others."""
OTHER_LOGIT = -50.0
"""Of all that is no candidate: a bias of 100 lifts it above every candidate, one of -100 sinks a candidate below it."""
_NEVER_DRAWN_BELOW = 30.0
_pack_draw = Struct("<QQ").pack
_MASK = 2**64 - 1


def next_token(context: int, sampling: Sampling, position: int) -> int:
    """The token that follows KV contents whose digest is `context` (64 bits), as the sequence's output number `position` (from 0).

    For plain requests: penalties, bias and schema are the Chooser's. The part of speech follows from the position, so that the text
    reads; its words are the candidates, ranked from a place that the digest names. Temperature 0 takes the first; else the choice
    depends on nothing but (seed, choice, position), so that another worker continues identically. The end of sequence is a
    candidate where sentences begin.
    """
    first, size, is_start = _SLOTS[position % _PERIOD]
    wins_eos = is_start and may_end(sampling, position) and _is_end(context, position)
    if sampling.temperature <= 0:
        return EOS_TOKEN if wins_eos else first + context % size
    rank = draw_rank(sampling, position, size, wins_eos)
    if wins_eos:
        if not rank:
            return EOS_TOKEN
        rank -= 1
    return first + (context + rank) % size


def candidates(context: int, position: int, can_end: bool) -> tuple[list[int], bool]:
    """The same candidates as a list, best first, and whether the end of sequence leads them; `can_end` False keeps it out."""
    first, size, is_start = _SLOTS[position % _PERIOD]
    best = first + context % size
    words = [*range(best, first + size), *range(first, best)]
    wins_eos = can_end and is_start and _is_end(context, position)
    return ([EOS_TOKEN, *words] if wins_eos else words), wins_eos


def may_end(sampling: Sampling, position: int) -> bool:
    """Whether the end of sequence may be output number `position`."""
    return not sampling.ignore_eos and position >= sampling.min_tokens


def _is_end(context: int, position: int) -> bool:
    return (context >> 40) % _EOS_OUT_OF < _EOS_WINS_BELOW and position > 0


def draw_rank(sampling: Sampling, position: int, size: int, wins_eos: bool) -> int:
    """Which of so many candidates is drawn, best first, the end of sequence among them or not."""
    cumulative = _cumulative(size, wins_eos, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return _draw(sampling, position, cumulative)


def draw_logit(sampling: Sampling, position: int, logits: list[float]) -> int:
    """Which of these logits, best first, is drawn: the same law for any logits."""
    best, temperature = logits[0], sampling.temperature
    weights = [exp((logit - best) / temperature) for logit in logits if best - logit <= _NEVER_DRAWN_BELOW]
    return _draw(sampling, position, _nucleus(weights, sampling.top_k, sampling.top_p, sampling.min_p))


def _draw(sampling: Sampling, position: int, cumulative: tuple[float, ...]) -> int:
    # the choice is the hash's seed: 0, the only one of most requests, costs nothing
    fraction = xxhash.xxh3_64_intdigest(_pack_draw(sampling.seed & _MASK, position), sampling.choice) / 2**64
    return min(bisect_right(cumulative, fraction * cumulative[-1]), len(cumulative) - 1)


@lru_cache(maxsize=1024)
def gaps(size: int, wins_eos: bool) -> tuple[float, ...]:
    """How far each of `size` candidates, best first, is below 0; with `wins_eos` the end of sequence stands before them."""
    ranked = [rank * _LOGIT_STEP for rank in range(size)]
    return tuple([0.0] + [gap + _EOS_LEAD for gap in ranked] if wins_eos else ranked)


@lru_cache(maxsize=1024)
def log_total(size: int, wins_eos: bool) -> float:
    """Logarithm of the sum over the vocabulary of exp(logit). All that is no candidate adds less than a double can hold."""
    return log(sum(exp(-gap) for gap in gaps(size, wins_eos)))


@lru_cache(maxsize=256)
def _cumulative(size: int, wins_eos: bool, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[float, ...]:
    """Running sums of the weights that are left after min-p, top-k and top-p, best candidate first. Logits depend on the rank alone."""
    return _nucleus([exp(-gap / temperature) for gap in gaps(size, wins_eos)], top_k, top_p, min_p)


def _nucleus(weights: list[float], top_k: int, top_p: float, min_p: float) -> tuple[float, ...]:
    """Of weights in descending order, the first of which is 1."""
    if min_p > 0:
        weights = [weight for weight in weights if weight >= min_p]
    if top_k > 0:
        weights = weights[:top_k]
    total = sum(weights)
    sums = list(accumulate(weights))
    num_kept = next((index + 1 for index, reached in enumerate(sums) if reached >= top_p * total), len(sums))
    return tuple(sums[:num_kept])
