"""One answer in the making: tokens in, items of the request's stream out. Pure.

What is given out depends on the tokens alone, never on how they were split into steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from meshserve.errors import ProtocolError
from meshserve.roles.processor.answers import AnswerParser, Event
from meshserve.roles.processor.call_formats import CallParser
from meshserve.roles.processor.detokenizing import (
    Detokenizer,
    StopChecker,
    TokenBytes,
    TokenTexts,
    Trail,
    of_prompt,
)
from meshserve.wire.completion import CallItem, EndItem, PartItem, TextItem
from meshserve.wire.generation import TokenLogprobs

_PROMPT_TOKENS_PER_ITEM = 512
"""With log probabilities, so that no message grows beyond bounds."""


@dataclass(slots=True, eq=False)
class PlainChoice:
    """An answer of nothing but text, as most are: each token is an item, and what it takes to look for
    stop strings, calls or log probabilities is not even made.
    """

    send: Callable[[Any], None]
    send_all: Callable[[list[Any]], None]
    token_texts: TokenTexts
    index: int
    is_bare: bool
    """Items are strings: the request has no other choice."""
    num_tokens: int = 0
    _detokenizer: Detokenizer | None = None
    """Made for the first token that is not whole characters of its own."""

    def echo(self, text: str) -> None:
        """The text begins with this."""
        if text:
            self.send(text if self.is_bare else TextItem(self.index, text))

    def echo_logprobs(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> None:
        """Raises ValueError: nobody asked a worker for any."""
        raise ValueError("nobody asked for them")

    def feed(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None) -> bool:
        """Tokens of one step; never true, as nothing stops the text."""
        self.num_tokens += len(tokens)
        detokenizer, texts = self._detokenizer, list[str | None]((None,))
        if detokenizer is None or detokenizer.is_between:
            texts = list(map(self.token_texts.texts.__getitem__, tokens))
        if None in texts:  # a token of part of a character, or one that follows such a token
            if detokenizer is None:
                detokenizer = self._detokenizer = Detokenizer(self.token_texts.token_bytes)
            texts = [detokenizer.feed((token,)) for token in tokens]
        if not self.is_bare:
            self.send_all([TextItem(self.index, text or "") for text in texts])
        elif len(texts) == 1:
            self.send(texts[0])
        else:
            self.send_all(texts)
        return False

    def finish(self, reason: str) -> EndItem:
        """The sequence came to its end."""
        if self._detokenizer is not None:
            self.echo(self._detokenizer.finish())
        return EndItem(self.index, reason, None)


class Choice:
    """Text, stop strings, log probabilities and calls of one sequence. `send` takes items as they go over the wire."""

    __slots__ = (
        "_detokenizer",
        "_index",
        "_is_bare",
        "_min_tokens",
        "_parser",
        "_send",
        "_stops",
        "_token_bytes",
        "_trail",
        "num_tokens",
    )

    def __init__(
        self,
        send: Callable[[Any], None],
        token_bytes: TokenBytes,
        index: int = 0,
        *,
        is_bare: bool = False,
        stops: tuple[str, ...] = (),
        min_tokens: int = 0,
        wants_logprobs: bool = False,
        is_call: bool = False,
    ) -> None:
        self._send, self._token_bytes, self._index, self._is_bare = send, token_bytes, index, is_bare
        self._detokenizer = Detokenizer(token_bytes)
        self._stops, self._min_tokens = StopChecker(stops), min_tokens
        self._trail = Trail(token_bytes) if wants_logprobs else None
        self._parser = CallParser() if is_call else None
        self.num_tokens = 0
        """Up to the one that made a stop string complete, that one included."""

    # --- the prompt, for those who want it repeated

    def echo(self, text: str) -> None:
        """The text begins with this."""
        self._give_text(text, [], [])

    def echo_logprobs(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> None:
        """The text begins with these tokens. Raises ValueError or TypeError for what a worker must not say."""
        pieces = of_prompt(self._token_bytes, tokens, logprobs)
        for first in range(0, len(pieces), _PROMPT_TOKENS_PER_ITEM):
            part = pieces[first : first + _PROMPT_TOKENS_PER_ITEM]
            texts, entries, starts = map(list, zip(*part, strict=True))
            self._give_text("".join(texts), entries, starts)
        text, _, start = pieces[-1]
        self._trail = Trail(self._token_bytes, start + len(text))

    # --- the output

    def feed(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None) -> bool:
        """Tokens of one step; true if a stop string ended the text. Raises ProtocolError if log probabilities are missing."""
        if self._trail is not None and (logprobs is None or len(logprobs) != len(tokens)):
            raise ProtocolError("a worker left out the log probabilities")
        return any(self._feed_one(token, logprobs[place] if logprobs else None) for place, token in enumerate(tokens))

    def _feed_one(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        self.num_tokens += 1
        text = self._detokenizer.feed((token,))
        if self._trail is not None:
            if logprobs is None:
                raise ProtocolError("a worker left out a log probability")
            self._trail.add(token, logprobs, len(text), self._detokenizer.is_between)
        given, is_stopped = self._stops.feed(text, self.num_tokens >= self._min_tokens)
        self._give(given, is_stopped)
        return is_stopped

    def finish(self, reason: str) -> EndItem:
        """The sequence came to its end, by itself or by a stop string: what was held back, and how the choice ends."""
        if self._stops.found is None:
            rest = self._detokenizer.finish()
            if self._trail is not None:
                self._trail.settle(len(rest))
            given, is_stopped = self._stops.feed(rest, self.num_tokens >= self._min_tokens)
            self._give(given if is_stopped else given + self._stops.finish(), is_stopped)
        is_called = self._close()
        if self._stops.found is not None:
            return EndItem(self._index, "stop", self._stops.found)
        return EndItem(self._index, "tool_calls" if is_called and reason == "stop" else reason, None)

    # --- items

    def _give(self, text: str, is_cut: bool) -> None:
        if self._trail is not None:
            self._trail.give(len(text))
        is_named_before = self._parser is None or self._parser.name is not None
        if self._parser is not None:
            text = self._parser.feed(text)
            if self._parser.name is None:
                return
            if not is_named_before:
                self._send(CallItem(self._index, self._parser.name))
        self._give_text(text, *(self._trail.take(is_cut) if self._trail is not None else ([], [])))

    def _close(self) -> bool:
        """What was held back of a call; whether there is one."""
        parser = self._parser
        if parser is None:
            return False
        text, is_call = parser.finish()
        if is_call and parser.name is not None:
            self._send(CallItem(self._index, parser.name))
        self._give_text(text, *(self._trail.take(is_cut=True) if self._trail is not None else ([], [])))
        return parser.name is not None

    def _give_text(self, text: str, entries: list[Any], starts: list[int]) -> None:
        if entries:
            self._send(TextItem(self._index, text, entries, starts))
        elif text:
            self._send(text if self._is_bare else TextItem(self._index, text))


class EchoOnly(Choice):
    """Of a request for nothing but its prompt: what a worker generates, because it must, is not given out."""

    __slots__ = ()

    def feed(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None) -> bool:
        return False

    def finish(self, reason: str) -> EndItem:
        return EndItem(self._index, "length", None)


class ParsedChoice(Choice):
    """An answer of a model that writes reasoning and calls of tools as text.

    Stop strings count in what the model wrote, tags included. With `is_single` the answer ends after its
    first call.
    """

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
