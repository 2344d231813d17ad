"""A vocabulary as a table: what it takes to turn tokens into text, small enough to be sent from one process to another."""

import sys
from array import array
from itertools import accumulate
from struct import Struct

from meshserve.engines.tokenizers.protocol import Vocabulary
from meshserve.errors import TokenizerFailed

_head = Struct("<III")


class TokenTable:
    """The bytes of all tokens, one after the other, and where each begins: one object for 128,000 of them, not as many."""

    __slots__ = ("_blob", "_known", "_offsets", "eos_token", "eos_tokens", "vocab_size")

    def __init__(self, blob: bytes, offsets: "array[int]", eos_tokens: tuple[int, ...]) -> None:
        self._blob, self._offsets, self.eos_tokens = blob, offsets, eos_tokens
        self.eos_token, self.vocab_size = eos_tokens[0], len(offsets) - 1
        self._known: dict[int, bytes] = {}  # those that were asked for: texts repeat few of them, three times faster from here

    def token_bytes(self, token: int) -> bytes:
        """Empty for special and unknown ids."""
        found = self._known.get(token)
        if found is None and 0 <= token < self.vocab_size:
            found = self._known[token] = self._blob[self._offsets[token] : self._offsets[token + 1]]
        return found or b""

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> "TokenTable":
        """The table of any vocabulary."""
        pieces = [vocabulary.token_bytes(token) for token in range(vocabulary.vocab_size)]
        return cls(b"".join(pieces), array("I", accumulate(map(len, pieces), initial=0)), vocabulary.eos_tokens)

    def to_bytes(self) -> bytes:
        """For :meth:`from_bytes`."""
        numbers = array("I", (*self.eos_tokens,)) + self._offsets
        if sys.byteorder == "big":
            numbers.byteswap()
        return _head.pack(len(self.eos_tokens), len(self._offsets), len(self._blob)) + numbers.tobytes() + self._blob

    @classmethod
    def from_bytes(cls, data: bytes) -> "TokenTable":
        """Raises TokenizerFailed for what is no table."""
        if len(data) < _head.size:
            raise TokenizerFailed("a vocabulary's table was cut short")
        num_eos, num_offsets, num_bytes = _head.unpack_from(data)
        end = _head.size + 4 * (num_eos + num_offsets)
        if not num_eos or num_offsets < 2 or len(data) != end + num_bytes:
            raise TokenizerFailed("a vocabulary's table was cut short")
        numbers = array("I", data[_head.size : end])
        if sys.byteorder == "big":
            numbers.byteswap()
        return cls(data[end:], numbers[num_eos:], tuple(numbers[:num_eos]))
