"""One answer of a model that writes reasoning and calls of tools as text: the same as any other, read by a parser of answers. Pure."""

from collections.abc import Callable, Sequence
from typing import Any

from meshserve.roles.processor.answers import AnswerParser, Event
from meshserve.roles.processor.choices import Choice
from meshserve.roles.processor.trail import TokenBytes
from meshserve.wire.completion import CallItem, PartItem
from meshserve.wire.generation import TokenLogprobs


class ParsedChoice(Choice):
    """Stop strings count in what the model wrote, tags included. With `is_single` the answer ends after its first call."""

    __slots__ = ("_answer", "_is_over", "_is_single", "_kind", "_num_calls")

    def __init__(
        self, send: Callable[[Any], None], token_bytes: TokenBytes, index: int, answer: AnswerParser, *, is_single: bool, **options: Any
    ) -> None:
        super().__init__(send, token_bytes, index, **options)
        self._answer, self._is_single = answer, is_single
        self._kind = "text"
        self._is_over = False
        """The only call is complete."""
        self._num_calls = 0

    def _feed_one(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        return super()._feed_one(token, logprobs) or self._is_over

    def _give(self, text: str, is_cut: bool) -> None:
        if self._trail is not None:
            self._trail.give(len(text))
        self._tell(self._answer.feed(text), is_cut)

    def _close(self) -> bool:
        self._tell(self._answer.finish(), is_cut=True)
        if self._trail is not None:
            self._give_text("", *self._trail.take(is_cut=True))
        return self._num_calls > 0

    def _tell(self, events: Sequence[Event], is_cut: bool) -> None:
        """Log probabilities go with the first text that comes of their tokens, or after it: tags have none of their own."""
        for event in events:
            if self._is_over:
                return
            if event.kind == "call":
                self._num_calls += 1
                self._send(CallItem(self._index, event.text))
            elif event.kind == "end":
                self._is_over = self._is_single
            else:
                self._turn_to(event.kind)
                self._give_text(event.text, *(self._trail.take(is_cut) if self._trail is not None else ([], [])))

    def _turn_to(self, kind: str) -> None:
        if kind not in (self._kind, "arguments"):
            self._send(PartItem(self._index, kind))
        self._kind = kind
