"""Text to token ids and back, as a model's card asks for it."""

import sys
from array import array
from itertools import accumulate
from typing import Protocol

from meshserve.engines import words
from meshserve.errors import StartupFailed
from meshserve.wire.card import ModelCard


class Tokenizer(Protocol):
    """A model's vocabulary."""

    eos_token: int
    """Ends a sequence; stands for no bytes."""
    vocab_size: int
    """Ids run from 0 to `vocab_size` - 1."""

    def encode(self, text: str) -> "array[int]":
        """Token ids of `text`, typecode "I"."""

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for, possibly part of a character; empty for special and unknown ids."""


WORD_LISTS: dict[str, tuple[str, ...]] = {
    "start": tuple(" " + word for word in words.STARTS),
    "determiner": tuple(" " + word for word in words.DETERMINERS),
    "adjective": tuple(" " + word for word in words.ADJECTIVES),
    "noun": tuple(" " + word for word in words.NOUNS),
    "verb": tuple(" " + word for word in words.VERBS),
    "place": tuple(" " + word for word in words.PLACES),
    "link": tuple(" " + word for word in words.LINKS),
    "stop": words.STOPS,
    "comma": words.COMMAS,
}
"""What each word token stands for, by part of speech, in the order of the ids."""

EOS_TOKEN = 256
_FIRST_WORD = 257
_OFFSETS = list(accumulate((len(found) for found in WORD_LISTS.values()), initial=_FIRST_WORD))
WORD_RANGES: dict[str, range] = {
    name: range(first, first + len(WORD_LISTS[name])) for name, first in zip(WORD_LISTS, _OFFSETS, strict=False)
}
"""Token ids of each part of speech."""


class ByteTokenizer:
    """The dummy model's own, without files: ids 0 to 255 are bytes, 256 ends a sequence, the rest are whole words.

    Only generation produces words: a prompt is always as many tokens as it has bytes, so that lengths are easy to reason about.
    """

    eos_token = EOS_TOKEN
    vocab_size = _OFFSETS[-1]

    def __init__(self) -> None:
        spoken = [word.encode() for found in WORD_LISTS.values() for word in found]
        self._bytes = [bytes([value]) for value in range(256)] + [b""] + spoken

    def encode(self, text: str) -> "array[int]":
        """The UTF-8 bytes of `text`, one token each; a lone surrogate becomes a question mark."""
        data = text.encode("utf-8", "replace")
        ids = bytearray(len(data) * 4)
        ids[0 if sys.byteorder == "little" else 3 :: 4] = data  # widened in one go: an iterator takes 20 ns a byte
        return array("I", bytes(ids))

    def token_bytes(self, token: int) -> bytes:
        """Empty for the end of sequence and for unknown ids."""
        return self._bytes[token] if 0 <= token < self.vocab_size else b""


def load_tokenizer(card: ModelCard) -> Tokenizer:
    """The tokenizer that the card names. Raises StartupFailed if this peer cannot load it."""
    if card.tokenizer == "bytes":
        return ByteTokenizer()
    raise StartupFailed(f"model {card.model} needs the tokenizer {card.tokenizer!r}, but only 'bytes' can be loaded here")
