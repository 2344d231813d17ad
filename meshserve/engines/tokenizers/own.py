"""The dummy model's own vocabulary."""

import sys
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate

from meshserve.engines import words

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

CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
"""The dummy model's, for chats where its files have none."""

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
    eos_tokens: tuple[int, ...] = (EOS_TOKEN,)
    vocab_size = _OFFSETS[-1]

    def __init__(self) -> None:
        spoken = [word.encode() for found in WORD_LISTS.values() for word in found]
        self._bytes = [bytes([value]) for value in range(256)] + [b""] + spoken

    def encode(self, text: str, add_special_tokens: bool = True) -> "array[int]":
        """The UTF-8 bytes of `text`, one token each; a lone surrogate becomes a question mark. It has no special tokens to add."""
        data = text.encode("utf-8", "replace")
        ids = bytearray(len(data) * 4)
        ids[0 if sys.byteorder == "little" else 3 :: 4] = data  # widened in one go: an iterator takes 20 ns a byte
        return array("I", bytes(ids))

    def token_bytes(self, token: int) -> bytes:
        """Empty for the end of sequence and for unknown ids."""
        return self._bytes[token] if 0 <= token < self.vocab_size else b""

    def decode(self, tokens: Sequence[int]) -> str:
        """The bytes of all tokens, malformed ones replaced."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")


def byte_tokenizer(files: Mapping[str, bytes]) -> ByteTokenizer:
    """The dummy model's own, whatever the files."""
    return ByteTokenizer()
