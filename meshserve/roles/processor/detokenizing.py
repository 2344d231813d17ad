"""Tokens to text, as they come: whole characters only, up to a stop string, each with the tokens it is made of. Pure."""

import codecs
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meshserve.engines.tokenizers import Vocabulary
from meshserve.errors import ProtocolError
from meshserve.wire.completion import WireLogprob
from meshserve.wire.generation import TokenLogprobs

TokenBytes = Callable[[int], bytes]

_Decoder = codecs.getincrementaldecoder("utf-8")

_MAX_TEXTS = 65_536
"""Tokens whose text is remembered, 0.1 kB each. More than most models use of their vocabularies."""
_MOST_LOGPROB = 0.01


class TokenTexts:
    """What a model's tokens stand for, as its sequences share it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocab_size, self.token_bytes = vocabulary.vocab_size, vocabulary.token_bytes
        self.texts: Mapping[int, str | None] = _Texts(vocabulary)
        """Those that are whole characters wherever they stand, which is known of ASCII; None for any other token. A lookup
        raises ProtocolError for what is no token of the vocabulary."""


class _Texts(dict[int, str | None]):
    """Filled as tokens come: looking up the tokens of a step is then one pass that runs no code of ours."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def __missing__(self, token: int) -> str | None:
        check_tokens((token,), self._vocabulary.vocab_size)
        data = self._vocabulary.token_bytes(token)
        text = data.decode("ascii") if data.isascii() else None
        if len(self) < _MAX_TEXTS:
            self[token] = text
        return text


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raises ProtocolError for what is no token of a vocabulary of this size: a worker must not say it."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise ProtocolError(f"a token that is not from 0 to {vocab_size - 1}")


class Detokenizer:
    """One sequence's. Whatever the split into calls, the texts joined are the bytes joined and decoded, malformed ones replaced."""

    __slots__ = ("_decoder", "_token_bytes", "is_between")

    def __init__(self, token_bytes: TokenBytes) -> None:
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

    def finish(self) -> str:
        """What an unfinished character leaves."""
        return self._decoder.decode(b"", final=True) if self._decoder is not None else ""


class StopChecker:
    """Gives out text up to the first place at which a stop string is complete, and never a part of one that may still become complete.

    Of several stop strings the one whose *end* comes first counts, and of those the longest: what a reader would do who looks at one
    character after the other. So the outcome does not depend on how the text was split.
    """

    __slots__ = ("_held", "_longest", "_stops", "found")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(sorted(stops, key=len, reverse=True)) if stops else ()
        self._longest = len(self._stops[0]) if stops else 0
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    @property
    def num_held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def feed(self, text: str, may_stop: bool = True) -> tuple[str, bool]:
        """The text that may be given out, and whether a stop string ended it: then nothing more must be fed.

        A stop string that becomes complete while it may not stop is text like any other.
        """
        if not self._stops:
            return text, False
        num_old, text = len(self._held), self._held + text
        end, stop = self._first_end(text, num_old) if may_stop else (0, None)
        if stop is not None:
            self._held, self.found = "", stop
            return text[: end - len(stop)], True
        num_held = self._num_undecided(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def _first_end(self, text: str, num_old: int) -> tuple[int, str | None]:
        """Where the first stop string ends that ends in what is new."""
        ends = [
            (start + len(stop), -len(stop), stop)
            for stop in self._stops
            if (start := text.find(stop, max(0, num_old - len(stop) + 1))) >= 0
        ]
        end, _, stop = min(ends, default=(0, 0, None))
        return end, stop

    def _num_undecided(self, text: str) -> int:
        """The longest end of the text that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0

    def finish(self) -> str:
        """The sequence ended without a stop string: what was held back."""
        held, self._held = self._held, ""
        return held


class Trail:
    """Log probabilities are given out with their text, never before it: tokens in order, each with its place
    in the text, counted in characters from `offset`.
    """

    __slots__ = ("_end", "_given", "_open", "_settled")

    def __init__(self, offset: int = 0) -> None:
        self._end = self._given = offset
        self._open: list[tuple[int, WireLogprob]] = []
        """Tokens that share a character that is not complete: start, entry."""
        self._settled: deque[tuple[int, int, WireLogprob]] = deque()
        """Start, end, entry."""

    def add(self, entry: WireLogprob, num_characters: int, is_whole: bool) -> None:
        """One token, which made so many characters complete; not whole if it left a part of another one."""
        self._open.append((self._end, entry))
        self._end += num_characters
        if is_whole:
            self.settle(0)

    def settle(self, num_characters: int) -> None:
        """What the last tokens left came to so many characters."""
        self._end += num_characters
        self._settled.extend((start, self._end, entry) for start, entry in self._open)
        self._open.clear()

    def give(self, num_characters: int) -> None:
        """So much more of the text may be given out."""
        self._given += num_characters

    def take(self, is_cut: bool = False) -> tuple[list[WireLogprob], list[int]]:
        """Tokens whose text was given out whole, with their starts; at the end of a text that was cut, also the one that is cut."""
        entries, starts = [], []
        while self._settled:
            start, end, entry = self._settled[0]
            if end > self._given and not (is_cut and start < self._given):
                break
            self._settled.popleft()
            entries.append(entry)
            starts.append(start)
        return entries, starts


def to_wire(token_bytes: TokenBytes, token: int, logprobs: TokenLogprobs | None) -> WireLogprob:
    """A token's log probability as clients are told it: by the token's bytes. Raises ValueError or TypeError for what is none."""
    if logprobs is None:
        return token_bytes(token), None, []
    own, top = logprobs
    return token_bytes(token), _logarithm(own), [[token_bytes(other), _logarithm(value)] for other, value in top]


def _logarithm(value: float) -> float:
    """Of a probability, which rounding may have left a little above 1. Raises ValueError or TypeError."""
    if not value <= _MOST_LOGPROB:  # NaN too
        raise ValueError(f"{value} is no log probability")
    return float(value)


def of_prompt(token_bytes: TokenBytes, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> list[tuple[str, Any, int]]:
    """A prompt's text in pieces, one a token: text, entry, start. Raises ValueError if there are not as many entries as tokens."""
    detokenizer, pieces, end = Detokenizer(token_bytes), [], 0
    for token, entry in zip(tokens, logprobs, strict=True):
        text = detokenizer.feed((token,))
        pieces.append((text, to_wire(token_bytes, token, entry), end))
        end += len(text)
    if rest := detokenizer.finish():
        text, wired, start = pieces[-1]
        pieces[-1] = (text + rest, wired, start)
    return pieces
