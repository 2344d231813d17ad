"""The sampler of requests that ask for more than plain sampling: penalties, bias, log probabilities, constraints.

The repetition penalty scales the model's logits, bias and the other penalties are added; the filters then leave some of the tokens, in
the order of :class:`~meshserve.wire.generation.Sampling`. Log probabilities are those of the logits before temperature and filters, over
all tokens that may come at their place: so they sum to 1 over the vocabulary, and say how likely a token was to the model, not to the
sampler.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import itemgetter

from meshserve.engines.core.request import Generation
from meshserve.engines.dummy.constrained import ConstrainedOutput, constrained_output
from meshserve.engines.dummy.model import NEVER_DRAWN_BELOW, OTHER_LOGIT, Logits, candidates, may_end, ranked
from meshserve.engines.dummy.script import Script, ScriptedOutput
from meshserve.engines.dummy.vocabulary import OWN_VOCABULARY, VocabularyMap
from meshserve.engines.tokenizers import EOS_TOKEN
from meshserve.wire.generation import Sampling, TokenLogprobs
from meshserve.wire.structs import replace

_OTHERS_COUNT_BELOW = -8.0
_LIFTED_ABOVE = OTHER_LOGIT + 10.0
"""With a best logit of at least the one, tokens that are no candidates and that bias and penalties lift to at most the other are never
drawn, and all of them together are less than 1e-11 of the probability: they are left out unless they have to be listed."""

_REPETITION_LEAD = 10.0
"""To a repetition penalty, which asks whether logits are above 0, the best candidate's is this much: it changes greedy choices too."""

_Entry = tuple[float, int]
"""A logit and its token."""
_logit = itemgetter(0)


class Sampler:
    """Chooses the tokens of one sequence, in order, all of them the model's own; knows its output, also what an earlier worker
    generated (`output`). Log probabilities name the tokens of `vocabulary`.

    Raises InvalidRequest if that output could not have come from this request.
    """

    def __init__(
        self,
        sampling: Sampling,
        output: Iterable[int] = (),
        constrained: ConstrainedOutput | ScriptedOutput | None = None,
        *,
        prompt: Iterable[int] = (),
        vocabulary: VocabularyMap = OWN_VOCABULARY,
    ) -> None:
        self._sampling, self._constrained, self._vocabulary = sampling, constrained, vocabulary
        self._seen: set[int] = set()
        self._repeated: set[int] = set()
        """Tokens of the prompt and the output, if repeating them changes their logits."""
        self._added = dict(sampling.logit_bias)
        """To the logits of all tokens that are not as the model has them."""
        self._lifted: dict[int, None] = {}
        """Those of them that matter where they are no candidates."""
        for token in self._added:
            self._lift(token)
        if sampling.repetition_penalty != 1:
            for token in set(prompt):
                self._repeat(token)
        for token in output:
            self._take(token)

    def sample(self, context: int, position: int) -> tuple[int, TokenLogprobs | None]:
        """The next token, as :func:`~meshserve.engines.dummy.model.next_token` would choose it, and its log probabilities if wanted."""
        tokens, logits = self._ranked(context, position)
        rank = logits.draw(self._sampling, position)
        token = tokens[rank]
        logprobs = None if self._sampling.logprobs < 0 else self._logprobs(context, position, tokens, logits, logits.values[rank])
        if token != EOS_TOKEN:
            self._take(token)
        return token, logprobs

    def rate(self, context: int, position: int, token: int) -> TokenLogprobs:
        """The log probabilities of a token that stands at this place already."""
        tokens, logits = self._ranked(context, position)
        own = logits.values[tokens.index(token)] if token in tokens else OTHER_LOGIT
        return self._logprobs(context, position, tokens, logits, own)

    def _logprobs(self, context: int, position: int, tokens: Sequence[int], logits: Logits, own: float) -> TokenLogprobs:
        total, from_own, num_listed = logits.log_total, self._vocabulary.from_own, self._sampling.logprobs
        listed = [(from_own[token], value - total) for token, value in zip(tokens[:num_listed], logits.values, strict=False)]
        if len(listed) < num_listed and self._constrained is None:
            rest = islice(self._rest(context, self._excluded(tokens, position)), num_listed - len(listed))
            listed += [(from_own[token], OTHER_LOGIT - total) for token in rest]
        return own - total, tuple(listed)

    # --- what bias and penalties change

    def _take(self, token: int) -> None:
        sampling = self._sampling
        if self._constrained is not None:
            self._constrained.take(token)
        if sampling.repetition_penalty != 1:
            self._repeat(token)
        if sampling.presence_penalty or sampling.frequency_penalty:
            change = sampling.frequency_penalty + (0.0 if token in self._seen else sampling.presence_penalty)
            self._seen.add(token)
            self._added[token] = self._added.get(token, 0.0) - change
            self._lift(token)

    def _repeat(self, token: int) -> None:
        self._repeated.add(token)
        self._added.setdefault(token, 0.0)
        self._lift(token)

    def _lift(self, token: int) -> None:
        """Note whether the token matters where it is no candidate."""
        if self._bent(token, OTHER_LOGIT) > _LIFTED_ABOVE:
            self._lifted[token] = None
        elif self._lifted:
            self._lifted.pop(token, None)

    def _bent(self, token: int, logit: float) -> float:
        """A token's logit with repetition, bias and penalties."""
        if token in self._repeated:
            lead, penalty = logit + _REPETITION_LEAD, self._sampling.repetition_penalty
            logit = (lead / penalty if lead > 0 else lead * penalty) - _REPETITION_LEAD
        return logit + self._added.get(token, 0.0)

    # --- logits

    def _ranked(self, context: int, position: int) -> tuple[Sequence[int], Logits]:
        """All tokens whose logits matter, best first; those of equal logits in the order in which they are preferred."""
        sampling, added, bent = self._sampling, self._added, self._bent
        if self._constrained is not None:
            tokens = self._constrained.candidates(context, may_end(sampling, position))
            logits = ranked(len(tokens))
        else:
            tokens, logits = candidates(context, position, may_end(sampling, position))
        if not added:
            return tokens, logits
        entries = [(bent(token, value) if token in added else value, token) for token, value in zip(tokens, logits.values, strict=True)]
        if self._constrained is None:
            self._add_others(entries, context, self._excluded(tokens, position))
        if sampling.temperature <= 0 and sampling.logprobs < 0:
            entries = [max(entries, key=_logit)]
        entries.sort(key=_logit, reverse=True)
        return [token for _, token in entries], Logits([value for value, _ in entries], NEVER_DRAWN_BELOW)

    def _add_others(self, entries: list[_Entry], context: int, known: set[int]) -> None:
        """Those of the rest of the vocabulary that matter."""
        lifted = [token for token in self._lifted if token not in known]
        entries += [(self._bent(token, OTHER_LOGIT), token) for token in lifted]
        num_wanted = self._num_others(entries)
        if num_wanted:
            known.update(lifted)
            changed = [token for token in self._added if token not in known]
            known.update(changed)
            others = (*changed, *islice(self._rest(context, known), num_wanted))
            entries += [(self._bent(token, OTHER_LOGIT), token) for token in others]

    def _excluded(self, tokens: Sequence[int], position: int) -> set[int]:
        """What is no other token: the candidates, and the end of sequence where it must not come."""
        return {*tokens} if may_end(self._sampling, position) else {*tokens, EOS_TOKEN}

    def _rest(self, context: int, known: set[int]) -> Iterator[int]:
        """The rest of the vocabulary, from a place that the digest names."""
        vocab_size = self._vocabulary.own_size
        start = context % vocab_size
        return (token for token in chain(range(start, vocab_size), range(start)) if token not in known)

    def _num_others(self, entries: list[_Entry]) -> int:
        """How many tokens matter that have the logit of the rest."""
        num_listed = self._sampling.logprobs
        if max(entries, key=_logit)[0] < _OTHERS_COUNT_BELOW:
            return self._vocabulary.own_size
        if num_listed > 0 and sum([logit > _LIFTED_ABOVE for logit, _ in entries]) < num_listed:
            return num_listed
        return 0


def sampler_for(
    generation: Generation,
    output: Sequence[int],
    vocabulary: VocabularyMap,
    script: Script | None = None,
) -> Sampler:
    """The sampler of a request that is written in `vocabulary`. `output` is what an earlier worker
    generated. Raises InvalidRequest if it could not have come from this request, or the script does not fit it.
    """
    sampling, num_prompt_tokens = generation.sampling, generation.num_tokens - len(output)
    asked = constrained_output(sampling, vocabulary)
    constrained: ConstrainedOutput | ScriptedOutput | None = asked
    if script is not None:
        constrained = script.output(generation.tokens[:num_prompt_tokens], asked) or asked
    to_own = vocabulary.to_own
    bias = tuple([(to_own(token), value) for token, value in sampling.logit_bias])
    own_output = map(vocabulary.to_byte if constrained is not None else to_own, output)
    own_prompt = map(to_own, generation.tokens[:num_prompt_tokens])
    return Sampler(replace(sampling, logit_bias=bias), own_output, constrained, prompt=own_prompt, vocabulary=vocabulary)
