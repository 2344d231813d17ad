"""The dummy model's last layer: a few candidates that follow from the KV cache's contents, and a choice among them."""

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from math import exp
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
"""How far the end of sequence leads when it wins; else it is no candidate."""
_pack_draw = Struct("<QQ").pack
_MASK = 2**64 - 1


def next_token(context: int, sampling: Sampling, position: int) -> int:
    """The token that follows KV contents whose digest is `context` (64 bits), as the sequence's output number `position` (from 0).

    The part of speech follows from the position, so that the text reads; its words are the candidates, ranked from a place that
    the digest names. Temperature 0 takes the first; else the choice depends on nothing but (seed, position), so that another
    worker continues identically. The end of sequence is a candidate where sentences begin.
    """
    first, size, is_start = _SLOTS[position % _PERIOD]
    wins_eos = (
        is_start
        and (context >> 40) % _EOS_OUT_OF < _EOS_WINS_BELOW
        and position > 0
        and not sampling.ignore_eos
        and position >= sampling.min_tokens
    )
    if sampling.temperature <= 0:
        return EOS_TOKEN if wins_eos else first + context % size
    rank = _draw(sampling, position, size, wins_eos)
    if wins_eos:
        if not rank:
            return EOS_TOKEN
        rank -= 1
    return first + (context + rank) % size


def _draw(sampling: Sampling, position: int, size: int, wins_eos: bool) -> int:
    cumulative = _cumulative(size, wins_eos, sampling.temperature, sampling.top_k, sampling.top_p)
    fraction = xxhash.xxh3_64_intdigest(_pack_draw(sampling.seed & _MASK, position)) / 2**64
    return min(bisect_right(cumulative, fraction * cumulative[-1]), len(cumulative) - 1)


@lru_cache(maxsize=256)
def _cumulative(size: int, wins_eos: bool, temperature: float, top_k: int, top_p: float) -> tuple[float, ...]:
    """Running sums of the weights that are left after top-k and top-p, best candidate first. Logits depend on the rank alone."""
    gaps = [rank * _LOGIT_STEP for rank in range(size)]
    if wins_eos:
        gaps = [0.0] + [gap + _EOS_LEAD for gap in gaps]
    weights = [exp(-gap / temperature) for gap in gaps]
    if top_k > 0:
        weights = weights[:top_k]
    total = sum(weights)
    sums = list(accumulate(weights))
    num_kept = next((index + 1 for index, reached in enumerate(sums) if reached >= top_p * total), len(sums))
    return tuple(sums[:num_kept])
