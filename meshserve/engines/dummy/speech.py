"""How the dummy model speaks another vocabulary than its own: word for word, so that its layers need not know of any other.

Its own tokens (bytes, the end of sequence, words) stand for those of the other vocabulary that have the same bytes; a word that is no
token there is replaced by one that is. All tokens that are left stand for each other, so that every token can be meant, and biased.
"""

import re
from array import array
from collections.abc import Iterable, Iterator

from meshserve.engines.tokenizers import EOS_TOKEN, WORD_RANGES, ByteTokenizer, Vocabulary

_OWN = ByteTokenizer()
_CAPITALISED, _PLAIN = re.compile(rb" [A-Z][a-z]+"), re.compile(rb" [a-z]{2,}")


class Speech:
    """The translation, a function of the vocabulary: all peers that have read the same files speak alike."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocab_size = max(vocabulary.vocab_size, _OWN.vocab_size)
        """Of the model's own tokens, those included that have no meaning of their own."""
        by_bytes: dict[bytes, int] = {}
        for token in range(vocabulary.vocab_size):
            by_bytes.setdefault(vocabulary.token_bytes(token), token)
        by_bytes.pop(b"", None)
        meanings = {EOS_TOKEN: vocabulary.eos_token, **dict(_same(by_bytes))}
        self.can_spell = all(value in meanings for value in range(0x20, 0x7F))
        """Whether any ASCII text can be put together from single bytes."""
        self._fill(meanings, by_bytes, vocabulary)
        self._from_own = array("I", map(meanings.__getitem__, range(self.vocab_size)))
        self._to_own = array("I", bytes(4 * vocabulary.vocab_size))
        for own in reversed(range(self.vocab_size)):
            self._to_own[self._from_own[own]] = own

    def from_own(self, token: int) -> int:
        """The vocabulary's token for one of the model's own."""
        return self._from_own[token]

    def to_own(self, token: int) -> int:
        """The inverse; of a vocabulary smaller than the model's own, the first that stands for it. Unknown ids stay unknown."""
        return self._to_own[token] if 0 <= token < len(self._to_own) else token

    def _fill(self, meanings: dict[int, int], by_bytes: dict[bytes, int], vocabulary: Vocabulary) -> None:
        """Words that are no tokens first, so that they become words."""
        used = {*meanings.values(), *vocabulary.eos_tokens}
        words = [(data, token) for data, token in by_bytes.items() if token not in used]
        spares = {
            True: iter([token for data, token in words if _CAPITALISED.fullmatch(data)]),
            False: iter([token for data, token in words if _PLAIN.fullmatch(data)]),
        }
        for own in [own for part in WORD_RANGES.values() for own in part if own not in meanings]:
            spare = next(spares[own in WORD_RANGES["start"]], None)
            if spare is not None:
                meanings[own] = spare
                used.add(spare)
        readable = [token for data, token in words if data.decode("utf-8", "replace").isprintable()]
        rest = _rest(used, [*readable, *range(vocabulary.vocab_size)], readable or [vocabulary.eos_token])
        for own in (*(own for part in WORD_RANGES.values() for own in part), *range(self.vocab_size)):
            if own not in meanings:
                meanings[own] = next(rest)


def _same(by_bytes: dict[bytes, int]) -> Iterator[tuple[int, int]]:
    for own in range(_OWN.vocab_size):
        token = by_bytes.get(_OWN.token_bytes(own))
        if token is not None:
            yield own, token


def _rest(used: set[int], preferred: Iterable[int], at_last: list[int]) -> Iterator[int]:
    """Each once, then, in a vocabulary that is smaller than the model's own, the last ones over and over."""
    for token in preferred:
        if token not in used:
            used.add(token)
            yield token
    while True:
        yield from at_last
