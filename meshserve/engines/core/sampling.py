"""Chooses tokens from logits. Sampling is a function of (seed, choice, position) and the logits, nowhere stateful, so that another worker
continues identically: what penalties need to know is the output so far, which travels with the request.

The order of the filters is that of :class:`~meshserve.wire.generation.Sampling`. Bias comes before the repetition penalty, the other
penalties come after it. Log probabilities are those of the logits after bias, penalties and constraint, before temperature.
"""

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Any

import numpy as np
import xxhash

from meshserve.engines.constraints.constraint import Constraint
from meshserve.engines.core.request import END
from meshserve.wire.generation import Sampling, TokenLogprobs

_NEVER, _GREEDY_BELOW = -np.inf, 1e-6
_NEVER_DRAWN_BELOW = 30.0
"""Logits, after temperature, so far below the best one: together less than a millionth of a millionth for each, and left out."""
_pack_draw = Struct("<QQ").pack
_MASK = 2**64 - 1
Logits = np.ndarray[Any, np.dtype[np.float32]]


class Sampler:
    """Chooses the tokens of one sequence, in order. `output` is what an earlier worker generated; `end_tokens` end a sequence.

    Raises InvalidRequest if that output could not have come from this request.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        output: Sequence[int],
        end_tokens: Iterable[int],
        constraint: Constraint | None,
    ) -> None:
        self._sampling, self._constraint = sampling, constraint
        self._end_tokens = np.array(sorted(end_tokens), dtype=np.int64)
        self._bias = np.array([token for token, _ in sampling.logit_bias], dtype=np.int64)
        self._bias_values = np.array([value for _, value in sampling.logit_bias], dtype=np.float32)
        self._counts: dict[int, int] = {}
        self._has_penalties = bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1)
        self._repeated = np.unique(np.array(prompt, dtype=np.int64)) if sampling.repetition_penalty != 1 else None
        """The prompt's tokens: the repetition penalty counts them as well."""
        self._is_plain = not self._has_penalties and not sampling.logit_bias and constraint is None
        for token in output:
            self._take(token)

    def sample(self, logits: Any, position: int) -> tuple[int, TokenLogprobs | None]:
        """The next token, as output number `position`, or END; and its log probabilities if they were asked for.

        `logits` is a buffer of one 32-bit float per token of the vocabulary; it is not changed.
        """
        values: Logits = np.frombuffer(logits, dtype=np.float32)
        can_end = not self._sampling.ignore_eos and position >= self._sampling.min_tokens
        if not self._is_plain or not can_end:
            values = self._bent(values, can_end)
        token = int(values.argmax()) if self._sampling.temperature < _GREEDY_BELOW else self._draw(values, position)
        logprobs = _logprobs_of(values, token, self._sampling.logprobs) if self._sampling.logprobs >= 0 else None
        if can_end and token in self._end_tokens:
            return END, None
        self._take(token)
        return token, logprobs

    def _take(self, token: int) -> None:
        if self._has_penalties:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._constraint is not None:
            self._constraint.take(token)

    def _bent(self, logits: Logits, can_end: bool) -> Logits:
        values, sampling = logits.copy(), self._sampling
        if len(self._bias):
            values[self._bias] += self._bias_values
        tokens = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
        if self._repeated is not None:
            repeated, factor = np.union1d(tokens, self._repeated), np.float32(sampling.repetition_penalty)
            found = values[repeated]
            values[repeated] = np.where(found > 0, found / factor, found * factor)
        if self._counts:
            counts = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
            values[tokens] -= counts * np.float32(sampling.frequency_penalty) + np.float32(sampling.presence_penalty)
        if self._constraint is not None:
            mask = np.frombuffer(self._constraint.allowed_mask(), dtype=np.uint8)
            values[np.unpackbits(mask, count=len(values), bitorder="little") == 0] = _NEVER
        if not can_end and (self._constraint is None or not self._constraint.must_end):
            values[self._end_tokens] = _NEVER
        return values

    def _draw(self, logits: Logits, position: int) -> int:
        sampling = self._sampling
        scaled = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
        kept = np.flatnonzero(scaled >= -_NEVER_DRAWN_BELOW)
        kept = kept[_kept_by_rank(scaled[kept], sampling)]
        cumulative = np.cumsum(np.exp(scaled[kept]))
        # the choice is the hash's seed: 0, the only one of most requests, costs nothing
        fraction = xxhash.xxh3_64_intdigest(_pack_draw(sampling.seed & _MASK, position), sampling.choice) / 2**64
        place = int(np.searchsorted(cumulative, fraction * cumulative[-1], side="right"))
        return int(kept[min(place, len(kept) - 1)])


def _kept_by_rank(scaled: Any, sampling: Sampling) -> Any:
    """Which of these logits (after temperature, less the best) the filters leave, in the order of the token ids."""
    is_kept = np.ones(len(scaled), dtype=bool)
    if (least := sampling.least_weight(lambda: float(np.exp(scaled).sum()))) > 0:
        is_kept &= scaled >= np.log(least)
    if 0 < sampling.top_k < len(scaled):
        is_kept &= scaled >= np.partition(scaled, -sampling.top_k)[-sampling.top_k]
    if sampling.top_p < 1:
        ranked = np.sort(scaled[is_kept])[::-1]
        sums = np.cumsum(np.exp(ranked))
        is_kept &= scaled >= ranked[min(int(np.searchsorted(sums, sampling.top_p * sums[-1])), len(ranked) - 1)]
    return is_kept


def _logprobs_of(logits: Logits, token: int, num_alternatives: int) -> TokenLogprobs:
    """Natural logarithms, likeliest first; of equal ones the smaller token id first."""
    best = float(logits.max())
    total = best + float(np.log(np.exp(logits.astype(np.float64) - best).sum()))
    listed: list[tuple[int, float]] = []
    if num_alternatives:
        top = np.argpartition(logits, -num_alternatives)[-num_alternatives:]
        top = top[np.lexsort((top, -logits[top]))]
        listed = [(int(found), float(logits[found]) - total) for found in top]
    return float(logits[token]) - total, tuple(listed)
