"""One answer of nothing but text, as most are: what it takes to look for stop strings, calls or the like is not even made. Pure."""

from collections.abc import Callable, Sequence
from typing import Any

from meshserve.roles.processor.detokenizing import Detokenizer, TokenTexts
from meshserve.wire.completion import EndItem, TextItem
from meshserve.wire.generation import TokenLogprobs


class PlainChoice:
    """Text of one sequence: each token is an item. `send` and `send_all` take items as they go over the wire."""

    __slots__ = ("_detokenizer", "_index", "_is_bare", "_send", "_send_all", "_token_texts", "num_tokens")

    def __init__(
        self, send: Callable[[Any], None], send_all: Callable[[list[Any]], None], token_texts: TokenTexts, index: int, is_bare: bool
    ) -> None:
        self._send, self._send_all, self._token_texts, self._index, self._is_bare = send, send_all, token_texts, index, is_bare
        self._detokenizer: Detokenizer | None = None
        """Made for the first token that is not whole characters of its own."""
        self.num_tokens = 0

    def echo(self, text: str) -> None:
        """The text begins with this."""
        self._give(text)

    def echo_logprobs(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> None:
        """Raises ValueError: nobody asked a worker for any."""
        raise ValueError("nobody asked for them")

    def feed(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None) -> bool:
        """Tokens of one step; never true, as nothing stops it."""
        self.num_tokens += len(tokens)
        detokenizer = self._detokenizer
        texts: list[Any] = [None]
        if detokenizer is None or detokenizer.is_between:
            texts = list(map(self._token_texts.texts.__getitem__, tokens))
        if None in texts:
            if detokenizer is None:
                detokenizer = self._detokenizer = Detokenizer(self._token_texts.token_bytes)
            texts = detokenizer.pieces(tokens)
        self._send_all(texts if self._is_bare else [TextItem(self._index, text) for text in texts])
        return False

    def finish(self, reason: str) -> EndItem:
        """The sequence came to its end."""
        if self._detokenizer is not None:
            self._give(self._detokenizer.finish())
        return EndItem(self._index, reason, None)

    def _give(self, text: str) -> None:
        if text:
            self._send(text if self._is_bare else TextItem(self._index, text))
