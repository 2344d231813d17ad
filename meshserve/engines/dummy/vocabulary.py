"""How the dummy model writes in another vocabulary than its own: token for token, so that its layers need not know of any other.

Its own tokens (bytes, the end of sequence, words) stand for those of the other vocabulary that have the same bytes; a word that is no
token there is replaced by one that is. All other tokens have a number after those, so that every token can be meant, and biased.
"""

import re
from array import array
from collections.abc import Mapping

from meshserve.engines.tokenizers import EOS_TOKEN, WORD_RANGES, ByteTokenizer, Vocabulary

_OWN = ByteTokenizer()
_CAPITALISED, _PLAIN = re.compile(rb" [A-Z][a-z]+"), re.compile(rb" [a-z]{2,}")


class VocabularyMap:
    """The translation, a function of the vocabulary: all peers that have read the same files translate alike."""

    def __init__(self, vocabulary: Vocabulary, meanings: Mapping[int, int]) -> None:
        """`meanings` are the vocabulary's tokens for the model's own ones, the bytes that are no tokens there left out."""
        self.can_write_ascii = all(value in meanings for value in range(0x20, 0x7F))
        """Whether any ASCII text can be put together from single bytes."""
        known = [meanings.get(own, vocabulary.eos_token) for own in range(_OWN.vocab_size)]
        used = {*known}
        self.from_own = known + [token for token in range(vocabulary.vocab_size) if token not in used]
        """The vocabulary's token for each of the model's own. A byte that is no token there is the end of sequence."""
        self.vocab_size = vocabulary.vocab_size
        self.own_size = len(self.from_own)
        """Of the model's own tokens: those of its own vocabulary, and after them one for each token that none of those means."""
        self._to_own = array("I", bytes(4 * vocabulary.vocab_size))
        for own, token in enumerate(self.from_own):
            self._to_own[token] = own
        self._to_own[vocabulary.eos_token] = EOS_TOKEN
        self._bytes = {meanings[value]: value for value in range(256) if value in meanings}
        self.pieces = [vocabulary.token_bytes(token) for token in known]
        """The bytes that each token of the model's own vocabulary is written with."""

    def to_own(self, token: int) -> int:
        """The one that means it; of a word and a byte that mean the same, the word. Ids that are unknown stay so."""
        return self._to_own[token] if 0 <= token < self.vocab_size else max(token, self.own_size)

    def to_byte(self, token: int) -> int:
        """The byte that it is, where documents are written byte by byte; else as :meth:`to_own`."""
        return self._bytes.get(token, self.to_own(token))


def map_vocabulary(vocabulary: Vocabulary) -> VocabularyMap:
    """The same bytes for the same bytes; for words that are no tokens others that are, and where those run out anything readable."""
    by_bytes: dict[bytes, int] = {}
    for token in range(vocabulary.vocab_size):
        by_bytes.setdefault(vocabulary.token_bytes(token), token)
    by_bytes.pop(b"", None)
    pieces = map(_OWN.token_bytes, range(_OWN.vocab_size))
    meanings = {own: by_bytes[piece] for own, piece in enumerate(pieces) if piece in by_bytes} | {EOS_TOKEN: vocabulary.eos_token}
    used = {*meanings.values(), *vocabulary.eos_tokens}
    spare = [(data, token) for data, token in by_bytes.items() if token not in used]
    readable = [token for data, token in spare if data.decode("utf-8", "replace").isprintable()] or [vocabulary.eos_token]
    capitalised = iter([token for data, token in spare if _CAPITALISED.fullmatch(data)])
    plain = iter([token for data, token in spare if _PLAIN.fullmatch(data)])
    for part, own in [(part, own) for part, found in WORD_RANGES.items() for own in found if own not in meanings]:
        found = next(capitalised if part == "start" else plain, None)
        meanings[own] = readable[own % len(readable)] if found is None else found
    return VocabularyMap(vocabulary, meanings)


OWN_VOCABULARY = VocabularyMap(_OWN, {token: token for token in range(_OWN.vocab_size)})
"""Every token is itself."""
