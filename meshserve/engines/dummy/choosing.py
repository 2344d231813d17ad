"""Choices that ask for more than plain sampling: penalties, bias, log probabilities, constraints.

The repetition penalty scales the model's logits (module `sampling`), bias and the other penalties are added; temperature, min-p, top-k
and top-p then choose among what they made of them. Log probabilities are those of these same logits, before temperature, min-p, top-k
and top-p, over all tokens that may come at their place: so they sum to 1 over the vocabulary, and say how likely a token was to the
model, not to the sampler.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from math import exp, log
from operator import itemgetter

from meshserve.engines.core.request import Generation
from meshserve.engines.dummy.constrained import ConstrainedOutput, constrained_output
from meshserve.engines.dummy.sampling import (
    OTHER_LOGIT,
    candidates,
    draw_logit,
    draw_rank,
    gaps,
    log_total,
    may_end,
    next_token,
)
from meshserve.engines.dummy.speech import Speech
from meshserve.engines.tokenizers import EOS_TOKEN, ByteTokenizer
from meshserve.wire.generation import Sampling, TokenLogprobs

OWN_VOCAB_SIZE = ByteTokenizer.vocab_size
_OTHERS_COUNT_BELOW = -8.0
_LIFTED_ABOVE = 10.0
"""With a best logit of at least the one, tokens that are no candidates and that bias and penalties lift by at most the other are never
drawn, and all of them together are less than 1e-11 of the probability: they are left out unless they have to be listed."""

_REPETITION_LEAD = 10.0
"""To a repetition penalty, which asks whether logits are above 0, the best candidate's is this much: it changes greedy choices too."""

_Entry = tuple[float, int]
"""A logit and its token."""
_logit = itemgetter(0)


class Chooser:
    """Chooses the tokens of one sequence, in order; knows its output, also what an earlier worker generated (`output`).

    Raises InvalidRequest if that output could not have come from this request.
    """

    __slots__ = (
        "_added",
        "_constrained",
        "_frequency",
        "_lifted",
        "_presence",
        "_repeated",
        "_repetition",
        "_sampling",
        "_seen",
        "_vocab_size",
    )

    def __init__(
        self,
        sampling: Sampling,
        output: Iterable[int],
        constrained: ConstrainedOutput | None,
        vocab_size: int = OWN_VOCAB_SIZE,
        *,
        prompt: Iterable[int] = (),
    ) -> None:
        self._sampling, self._vocab_size = sampling, vocab_size
        self._constrained = constrained
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        self._seen: set[int] = set()
        self._repetition = sampling.repetition_penalty
        self._repeated: set[int] = set()
        """Tokens of the prompt and the output, if repeating them changes their logits."""
        self._added = dict(sampling.logit_bias)
        self._lifted = {token: None for token, value in self._added.items() if value > _LIFTED_ABOVE}
        if self._repetition != 1:
            for token in set(prompt):
                self._repeat(token)
        for token in output:
            self._take(token)

    def choose(self, context: int, position: int) -> tuple[int, TokenLogprobs | None]:
        """The next token, as :func:`~meshserve.engines.dummy.sampling.next_token` would choose it, and its log probabilities if wanted."""
        found = self._choose_bent(context, position) if self._added else self._choose_plain(context, position)
        if found[0] != EOS_TOKEN:
            self._take(found[0])
        return found

    def _take(self, token: int) -> None:
        if self._constrained is not None:
            self._constrained.take(token)
        if self._repetition != 1:
            self._repeat(token)
        if not self._presence and not self._frequency:
            return
        change = self._frequency if token in self._seen else self._frequency + self._presence
        self._seen.add(token)
        self._added[token] = self._added.get(token, 0.0) - change
        self._lift(token)

    def _repeat(self, token: int) -> None:
        self._repeated.add(token)
        self._added.setdefault(token, 0.0)
        self._lift(token)

    def _lift(self, token: int) -> None:
        """Note whether the token matters where it is no candidate."""
        if self._bent(token, OTHER_LOGIT) > OTHER_LOGIT + _LIFTED_ABOVE:
            self._lifted[token] = None
        elif self._lifted:
            self._lifted.pop(token, None)

    def _bent(self, token: int, logit: float) -> float:
        """A token's logit with repetition, bias and penalties."""
        if token in self._repeated:
            lead = logit + _REPETITION_LEAD
            logit = (lead / self._repetition if lead > 0 else lead * self._repetition) - _REPETITION_LEAD
        return logit + self._added.get(token, 0.0)

    def _candidates(self, context: int, position: int) -> tuple[list[int], bool]:
        """The tokens that the model would choose among, best first, and whether the end of sequence leads."""
        can_end = may_end(self._sampling, position)
        if self._constrained is None:
            return candidates(context, position, can_end)
        return self._constrained.candidates(context, can_end), False

    # --- logits as they are

    def _choose_plain(self, context: int, position: int) -> tuple[int, TokenLogprobs | None]:
        sampling = self._sampling
        if self._constrained is None and sampling.logprobs < 0:
            return next_token(context, sampling, position), None
        tokens, wins_eos = self._candidates(context, position)
        rank = draw_rank(sampling, position, len(tokens) - wins_eos, wins_eos) if sampling.temperature > 0 else 0
        if sampling.logprobs < 0:
            return tokens[rank], None
        total = log_total(len(tokens) - wins_eos, wins_eos)
        listed = _listed(tokens, wins_eos, total, sampling.logprobs)
        if self._constrained is None and len(listed) < sampling.logprobs:
            others = _others(context, {*tokens}, may_end(sampling, position), self._vocab_size)
            listed += [(token, OTHER_LOGIT - total) for token in islice(others, sampling.logprobs - len(listed))]
        return tokens[rank], (-gaps(len(tokens) - wins_eos, wins_eos)[rank] - total, tuple(listed))

    # --- logits with bias and penalties

    def _choose_bent(self, context: int, position: int) -> tuple[int, TokenLogprobs | None]:
        sampling = self._sampling
        entries = self._entries(context, position)
        if sampling.logprobs < 0 and sampling.temperature <= 0:
            return max(entries, key=_logit)[1], None
        entries.sort(key=_logit, reverse=True)
        rank = draw_logit(sampling, position, [logit for logit, _ in entries]) if sampling.temperature > 0 else 0
        if sampling.logprobs < 0:
            return entries[rank][1], None
        best = entries[0][0]
        total = best + log(sum([exp(logit - best) for logit, _ in entries]))
        listed = tuple([(token, logit - total) for logit, token in entries[: sampling.logprobs]])
        return entries[rank][1], (entries[rank][0] - total, listed)

    def _entries(self, context: int, position: int) -> list[_Entry]:
        """All tokens whose logits matter, with them; those of equal logits in the order in which they are preferred."""
        tokens, wins_eos = self._candidates(context, position)
        bent = self._bent
        ranked = gaps(len(tokens) - wins_eos, wins_eos)
        entries = [(bent(token, -gap), token) for token, gap in zip(tokens, ranked, strict=True)]
        if self._constrained is not None:
            return entries
        can_end = may_end(self._sampling, position)
        if self._lifted:
            known = {*tokens}
            lifted = [token for token in self._lifted if token not in known and (can_end or token != EOS_TOKEN)]
            entries += [(bent(token, OTHER_LOGIT), token) for token in lifted]
        return self._with_others(entries, context, can_end)

    def _with_others(self, entries: list[_Entry], context: int, can_end: bool) -> list[_Entry]:
        """With those of the rest of the vocabulary that matter."""
        num_listed = self._sampling.logprobs
        if max(entries, key=_logit)[0] < _OTHERS_COUNT_BELOW:
            num_wanted = self._vocab_size
        elif num_listed > 0 and sum([logit > OTHER_LOGIT + _LIFTED_ABOVE for logit, _ in entries]) < num_listed:
            num_wanted = num_listed
        else:
            return entries
        added, known = self._added, {token for _, token in entries}
        bent = [token for token in added if token not in known and (can_end or token != EOS_TOKEN)]
        others = islice(_others(context, known.union(bent), can_end, self._vocab_size), num_wanted)
        return entries + [(self._bent(token, OTHER_LOGIT), token) for token in (*bent, *others)]


def prompt_logprobs(context: int, index: int, token: int, num_alternatives: int, vocab_size: int = OWN_VOCAB_SIZE) -> TokenLogprobs:
    """Those of a prompt's token number `index`, whose place has the part of speech that it would have in a text without a prompt.

    So they are a function of what stands before the token, whatever follows it, and prompts that begin alike are rated alike.
    """
    tokens, wins_eos = candidates(context, index, True)
    size = len(tokens) - wins_eos
    total = log_total(size, wins_eos)
    listed = _listed(tokens, wins_eos, total, num_alternatives)
    if len(listed) < num_alternatives:
        others = _others(context, {*tokens}, True, vocab_size)
        listed += [(other, OTHER_LOGIT - total) for other in islice(others, num_alternatives - len(listed))]
    logit = -gaps(size, wins_eos)[tokens.index(token)] if token in tokens else OTHER_LOGIT
    return logit - total, tuple(listed)


def _listed(tokens: list[int], wins_eos: bool, total: float, num_alternatives: int) -> list[tuple[int, float]]:
    ranked = gaps(len(tokens) - wins_eos, wins_eos)
    return [(token, -gap - total) for token, gap in zip(tokens[:num_alternatives], ranked, strict=False)]


def _others(context: int, known: set[int], can_end: bool, vocab_size: int) -> Iterator[int]:
    """The rest of the vocabulary, from a place that the digest names."""
    start = context % vocab_size
    for token in chain(range(start, vocab_size), range(start)):
        if token not in known and (can_end or token != EOS_TOKEN):
            yield token


def chooser_for(generation: Generation, output: Sequence[int], speech: Speech | None) -> Chooser | None:
    """None for a plain request, whose tokens `next_token` gives. It chooses among the model's own tokens, whatever it speaks.

    `output` is what an earlier worker generated. Raises InvalidRequest if it could not have come from this request.
    """
    sampling = generation.sampling
    is_bent = sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
    constrained = constrained_output(sampling, speech)
    if sampling.logprobs < 0 and not is_bent and constrained is None:
        return None
    prompt = generation.tokens[: generation.num_tokens - len(output)]
    if speech is None:
        return Chooser(sampling, output, constrained, prompt=prompt)
    bias = tuple((speech.to_own(token), value) for token, value in sampling.logit_bias)
    heard = map(speech.to_byte if constrained is not None else speech.to_own, output)
    return Chooser(replace(sampling, logit_bias=bias), heard, constrained, speech.vocab_size, prompt=map(speech.to_own, prompt))
