"""How the dummy model speaks another vocabulary than its own: word for word, so that its layers need not know of any other.

Its own tokens (bytes, the end of sequence, words) stand for those of the other vocabulary that have the same bytes; a word that is no
token there is replaced by one that is. All other tokens have a number after those, so that every token can be meant, and biased.
"""

import re
from array import array
from collections.abc import Iterator

from meshserve.engines.tokenizers import EOS_TOKEN, WORD_RANGES, ByteTokenizer, Vocabulary
from meshserve.wire.generation import TokenLogprobs

_OWN = ByteTokenizer()
_CAPITALISED, _PLAIN = re.compile(rb" [A-Z][a-z]+"), re.compile(rb" [a-z]{2,}")


class Speech:
    """The translation, a function of the vocabulary: all peers that have read the same files speak alike."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        by_bytes: dict[bytes, int] = {}
        for token in range(vocabulary.vocab_size):
            by_bytes.setdefault(vocabulary.token_bytes(token), token)
        by_bytes.pop(b"", None)
        meanings = {EOS_TOKEN: vocabulary.eos_token, **dict(_same(by_bytes))}
        self.can_spell = all(value in meanings for value in range(0x20, 0x7F))
        """Whether any ASCII text can be put together from single bytes."""
        _add_words(meanings, by_bytes, vocabulary)
        used = {*meanings.values()}
        others = [token for token in range(vocabulary.vocab_size) if token not in used]
        known = [meanings.get(own, vocabulary.eos_token) for own in range(_OWN.vocab_size)]
        self._from_own = array("I", known + others)
        self.vocab_size = len(self._from_own)
        """Of the model's own tokens: those of its own vocabulary, and after them one for each token that none of those means."""
        self._to_own = array("I", bytes(4 * vocabulary.vocab_size))
        for own, token in enumerate(self._from_own):
            self._to_own[token] = own
        self._to_own[vocabulary.eos_token] = EOS_TOKEN
        self._bytes = {meanings[value]: value for value in range(256) if value in meanings}
        self.pieces = [vocabulary.token_bytes(token) for token in known]
        """The bytes with which each of the model's own tokens is spoken."""
        self.spoken_size = vocabulary.vocab_size
        """Of the vocabulary that is spoken."""

    def from_own(self, token: int) -> int:
        """The vocabulary's token for one of the model's own. A byte that is no token there is the end of sequence."""
        return self._from_own[token]

    def to_own(self, token: int) -> int:
        """The one that means it; of a word and a byte that mean the same, the word. Ids that are unknown stay so."""
        return self._to_own[token] if 0 <= token < len(self._to_own) else max(token, self.vocab_size)

    def to_byte(self, token: int) -> int:
        """The byte that it is, where documents are written byte by byte; else as :meth:`to_own`."""
        return self._bytes.get(token, self.to_own(token))

    def spoken(self, logprobs: TokenLogprobs) -> TokenLogprobs:
        """Log probabilities of the model's own tokens, as those of the vocabulary."""
        logprob, listed = logprobs
        return logprob, tuple([(self.from_own(token), value) for token, value in listed])


def _same(by_bytes: dict[bytes, int]) -> Iterator[tuple[int, int]]:
    for own in range(_OWN.vocab_size):
        token = by_bytes.get(_OWN.token_bytes(own))
        if token is not None:
            yield own, token


def _add_words(meanings: dict[int, int], by_bytes: dict[bytes, int], vocabulary: Vocabulary) -> None:
    """For words that are no tokens others that are, and where there are too few of those, anything that can be read."""
    used = {*meanings.values(), *vocabulary.eos_tokens}
    spare = [(data, token) for data, token in by_bytes.items() if token not in used]
    readable = [token for data, token in spare if data.decode("utf-8", "replace").isprintable()] or [vocabulary.eos_token]
    capitalised = iter([token for data, token in spare if _CAPITALISED.fullmatch(data)])
    plain = iter([token for data, token in spare if _PLAIN.fullmatch(data)])
    for part, own in [(part, own) for part, found in WORD_RANGES.items() for own in found if own not in meanings]:
        found = next(capitalised if part == "start" else plain, None)
        meanings[own] = readable[own % len(readable)] if found is None else found
