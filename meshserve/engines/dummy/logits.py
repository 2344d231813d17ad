"""The dummy model's last layer: a few candidates that follow from the KV cache's contents, their logits, and a draw among them.

The words of one part of speech, ranked from a place that the digest names, have the logits 0, -0.4, -0.8 and so on; where a text
ends, the end of sequence has 0 and they have 6 less. Every other token of the vocabulary has -50. Tokens more than 30 below the
best one are never drawn, at any temperature: so bytes and words that do not fit come up only where a bias or a penalty says so.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import exp, inf, log
from struct import Struct

import xxhash

from meshserve.engines.tokenizers import EOS_TOKEN, WORD_RANGES
from meshserve.wire.generation import Sampling

_PATTERN = (
    "start adjective noun verb determiner noun place determiner adjective noun stop "
    "start noun verb determiner adjective noun comma link determiner noun verb determiner noun stop"
)
_EOS_WINS_BELOW, _EOS_OUT_OF = 3, 14
"""A text may end where a sentence begins, every 12.5 tokens, and does so 3 times in 14: 58 tokens in the mean."""

_LOGIT_STEP = 0.4
"""Between a candidate and the next."""
_EOS_LEAD = 6.0
"""How far the end of sequence leads when it wins; else it is one of the others."""
OTHER_LOGIT = -50.0
"""Of all that is no candidate: a bias of 100 lifts it above every candidate, one of -100 sinks a candidate below it."""
NEVER_DRAWN_BELOW = 30.0
_MOST_KEPT = 64
_pack_draw = Struct("<QQ").pack
_MASK = 2**64 - 1


class Logits:
    """Logits of candidates, best first, and what follows from them. Those more than `most_below` below the best one are never drawn."""

    def __init__(self, values: Sequence[float], most_below: float = inf) -> None:
        self.values, self._most_below = values, most_below
        self._log_total: float | None = None
        self._cumulative: dict[tuple[float, int, float, float], list[float]] = {}

    @property
    def log_total(self) -> float:
        """Logarithm of the sum over the vocabulary of exp(logit). All that is no candidate adds less than a double can hold."""
        if self._log_total is None:
            best = self.values[0]
            self._log_total = best + log(sum([exp(value - best) for value in self.values]))
        return self._log_total

    def draw(self, sampling: Sampling, position: int) -> int:
        """Which candidate is output number `position`: of nothing but (seed, choice, position) and these logits."""
        if sampling.temperature <= 0:
            return 0
        law = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        cumulative = self._cumulative.get(law)
        if cumulative is None:
            if len(self._cumulative) == _MOST_KEPT:
                self._cumulative.clear()
            cumulative = self._cumulative[law] = self._weigh(*law)
        # the choice is the hash's seed: 0, the only one of most requests, costs nothing
        fraction = xxhash.xxh3_64_intdigest(_pack_draw(sampling.seed & _MASK, position), sampling.choice) / 2**64
        return min(bisect_right(cumulative, fraction * cumulative[-1]), len(cumulative) - 1)

    def _weigh(self, temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
        """Running sums of the weights that are left after min-p, top-k and top-p, best candidate first."""
        best, most_below = self.values[0], self._most_below
        weights = [exp((value - best) / temperature) for value in self.values if best - value <= most_below]
        if min_p > 0:
            weights = [weight for weight in weights if weight >= min_p]
        if top_k > 0:
            weights = weights[:top_k]
        total, sums = sum(weights), list(accumulate(weights))
        num_kept = next((index + 1 for index, reached in enumerate(sums) if reached >= top_p * total), len(sums))
        return sums[:num_kept]


@lru_cache(maxsize=1024)
def ranked(size: int) -> Logits:
    """Those of so many candidates, none of which is the end of sequence in the lead."""
    return Logits([-rank * _LOGIT_STEP for rank in range(size)])


def _ending(size: int) -> Logits:
    """Those of the end of sequence and so many words behind it."""
    return Logits([0.0] + [value - _EOS_LEAD for value in ranked(size).values])


_SLOTS = tuple(
    (found.start, len(found), ranked(len(found)), _ending(len(found)) if part == "start" else None)
    for part, found in [(part, WORD_RANGES[part]) for part in _PATTERN.split()]
)
"""By the position in a text: the first of the words that may come, how many, and their logits, also where the text may end."""
_PERIOD = len(_SLOTS)


def next_token(context: int, sampling: Sampling, position: int) -> int:
    """The token that follows KV contents whose digest is `context` (64 bits), as the sequence's output number `position` (from 0).

    For plain requests: penalties, bias and constraints are the Sampler's. The part of speech follows from the position, so that the
    text reads; its words are the candidates, ranked from a place that the digest names. Temperature 0 takes the first. The end of
    sequence is a candidate where sentences begin.
    """
    first, size, logits, ending = _SLOTS[position % _PERIOD]
    if ending is not None and may_end(sampling, position) and _is_end(context, position):
        rank = ending.draw(sampling, position) - 1
        if rank < 0:
            return EOS_TOKEN
    elif sampling.temperature <= 0:
        return first + context % size
    else:
        rank = logits.draw(sampling, position)
    return first + (context + rank) % size


def candidates(context: int, position: int, can_end: bool) -> tuple[list[int], Logits]:
    """The same candidates as a list, best first, with their logits; `can_end` False keeps the end of sequence out."""
    first, size, logits, ending = _SLOTS[position % _PERIOD]
    best = first + context % size
    words = [*range(best, first + size), *range(first, best)]
    if can_end and ending is not None and _is_end(context, position):
        return [EOS_TOKEN, *words], ending
    return words, logits


def may_end(sampling: Sampling, position: int) -> bool:
    """Whether the end of sequence may be output number `position`."""
    return not sampling.ignore_eos and position >= sampling.min_tokens


def _is_end(context: int, position: int) -> bool:
    return (context >> 40) % _EOS_OUT_OF < _EOS_WINS_BELOW and position > 0
