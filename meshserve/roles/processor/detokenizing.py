"""Tokens to text, as they come: only whole characters are given out. Pure."""

import codecs
from collections.abc import Callable, Mapping, Sequence

from meshserve.engines.tokenizers import Vocabulary

_Decoder = codecs.getincrementaldecoder("utf-8")

_MAX_TEXTS = 65_536
"""Tokens whose text is remembered, 0.1 kB each. More than most models use of their vocabularies."""


class TokenTexts:
    """What a model's tokens stand for, as its sequences share it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocab_size, self.token_bytes = vocabulary.vocab_size, vocabulary.token_bytes
        self.texts: Mapping[int, str | None] = _Texts(vocabulary)
        """Those that are whole characters wherever they stand, which is known of ASCII; None for any other token."""


class _Texts(dict[int, str | None]):
    """Filled as tokens come: looking up the tokens of a step is then one pass that runs no code of ours."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def __missing__(self, token: int) -> str | None:
        data = self._vocabulary.token_bytes(token)
        text = data.decode("ascii") if data.isascii() else None
        if 0 <= token < self._vocabulary.vocab_size and len(self) < _MAX_TEXTS:
            self[token] = text
        return text


class Detokenizer:
    """One sequence's. Whatever the split into calls, the texts joined are the bytes joined and decoded, malformed ones replaced."""

    __slots__ = ("_decoder", "_token_bytes", "is_between")

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder: codecs.IncrementalDecoder | None = None
        """Made for the first character that is not ASCII."""
        self.is_between = True
        """No character is unfinished."""

    def feed(self, tokens: Sequence[int]) -> str:
        """The characters that these tokens complete; may be empty."""
        data = self._token_bytes(tokens[0]) if len(tokens) == 1 else b"".join(map(self._token_bytes, tokens))
        if self.is_between and data.isascii():
            return data.decode("ascii")
        if self._decoder is None:
            self._decoder = _Decoder("replace")
        text = self._decoder.decode(data)
        self.is_between = not self._decoder.getstate()[0]
        return text

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What :meth:`feed` gives for each of them, one after the other."""
        return [self.feed((token,)) for token in tokens]

    def finish(self) -> str:
        """What an unfinished character leaves."""
        return self._decoder.decode(b"", final=True) if self._decoder is not None else ""
