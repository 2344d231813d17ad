"""Which tokens a piece of text is made of: log probabilities are given out with their text, never before it. Pure."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from meshserve.roles.processor.detokenizing import Detokenizer
from meshserve.wire.completion import WireLogprob
from meshserve.wire.generation import TokenLogprobs

TokenBytes = Callable[[int], bytes]


class Trail:
    """Tokens in order, each with its place in the text, counted in characters from `offset`."""

    __slots__ = ("_end", "_given", "_open", "_settled", "_token_bytes")

    def __init__(self, token_bytes: TokenBytes, offset: int = 0) -> None:
        self._token_bytes = token_bytes
        self._end = self._given = offset
        self._open: list[tuple[int, WireLogprob]] = []
        """Tokens that share a character that is not complete: start, entry."""
        self._settled: deque[tuple[int, int, WireLogprob]] = deque()
        """Start, end, entry."""

    def add(self, token: int, logprobs: TokenLogprobs, num_characters: int, is_whole: bool) -> None:
        """One token, which made so many characters complete; not whole if it left a part of another one."""
        self._open.append((self._end, to_wire(self._token_bytes, token, logprobs)))
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
    """A token's log probability as clients are told it: by the token's bytes."""
    if logprobs is None:
        return token_bytes(token), None, []
    own, top = logprobs
    return token_bytes(token), float(own), [[token_bytes(other), float(value)] for other, value in top]


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
