"""What the mesh asks of a tokenizer."""

from array import array
from collections.abc import Sequence
from typing import Protocol


class Vocabulary(Protocol):
    """What tokens stand for."""

    eos_token: int
    """Ends a sequence; stands for no bytes."""
    eos_tokens: tuple[int, ...]
    """All that do; `eos_token` is the first of them."""
    vocab_size: int
    """Ids run from 0 to `vocab_size` - 1; some may be unused."""

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for after other text, possibly part of a character; empty for special and unknown ids."""


class Tokenizer(Vocabulary, Protocol):
    """A vocabulary, and the way from text to its tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> "array[int]":
        """Token ids of `text`, typecode "I"; lone surrogates become question marks.

        `add_special_tokens`: with what the model wants around a text, as its beginning of sequence. A rendered chat has that already.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """The text that these tokens are when nothing stands before them, without special ones; malformed bytes are replaced."""
