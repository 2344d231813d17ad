"""One answer in the making: tokens in, items of the request's stream out. Pure.

What is given out depends on the tokens alone, never on how they were split into steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from meshserve.errors import ProtocolError
from meshserve.roles.processor.answers import AnswerParser
from meshserve.roles.processor.call_formats import CallParser, Event
from meshserve.roles.processor.detokenizing import (
    Detokenizer,
    StopChecker,
    TokenBytes,
    TokenTexts,
    Trail,
    check_tokens,
    of_prompt,
    to_wire,
)
from meshserve.wire.completion import CallItem, EndItem, PartItem, TextItem, WireLogprob
from meshserve.wire.generation import TokenLogprobs

_MOST_TOKENS = 1 << 32
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
        """Tokens of one step; never true, as nothing stops the text. Raises ProtocolError for what is no token, and then
        takes none of them.
        """
        detokenizer = self._detokenizer
        texts: list[Any] = [None]
        if detokenizer is None or detokenizer.is_between:
            texts = list(map(self.token_texts.texts.__getitem__, tokens))
        if None in texts:  # a token of part of a character, or one that follows such a token
            check_tokens(tokens, self.token_texts.vocab_size)
            if detokenizer is None:
                detokenizer = self._detokenizer = Detokenizer(self.token_texts.token_bytes)
            texts = [detokenizer.feed((token,)) for token in tokens]
        self.num_tokens += len(tokens)
        if not self.is_bare:
            self.send_all([TextItem(self.index, text) for text in texts])
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
    """Text, stop strings, log probabilities, reasoning and calls of one sequence.

    `send` takes items as they go over the wire. The parser reads the text if that is more than text; stop
    strings act on text and reasoning, never on calls. With `is_single` the answer ends after its first call.
    A call that the limit of tokens cuts off before it can be told is not given out, as its words are no text.
    """

    __slots__ = (
        "_detokenizer",
        "_index",
        "_is_bare",
        "_is_over",
        "_is_single",
        "_kind",
        "_min_tokens",
        "_num_calls",
        "_num_due",
        "_parser",
        "_send",
        "_stops",
        "_token_bytes",
        "_trail",
        "_vocab_size",
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
        parser: AnswerParser | CallParser | None = None,
        is_single: bool = False,
        vocab_size: int = _MOST_TOKENS,
    ) -> None:
        self._send, self._token_bytes, self._index, self._is_bare = send, token_bytes, index, is_bare
        self._detokenizer = Detokenizer(token_bytes)
        self._stops, self._min_tokens = StopChecker(stops), min_tokens
        self._trail = Trail() if wants_logprobs else None
        self._parser, self._is_single, self._vocab_size = parser, is_single, vocab_size
        self._kind = "text"
        self._num_calls = 0
        self._num_due = 0
        """Characters that the model wrote and that log probabilities do not count as given out yet."""
        self._is_over = False
        """The only call is complete."""
        self.num_tokens = 0
        """Up to the one that made a stop string complete, that one included."""

    # --- the prompt, for those who want it repeated

    def echo(self, text: str) -> None:
        """The text begins with this."""
        self._send_text(text, [], [])

    def echo_logprobs(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> None:
        """The text begins with these tokens. Raises ValueError or TypeError for what a worker must not
        say.
        """
        pieces = of_prompt(self._token_bytes, tokens, logprobs)
        for first in range(0, len(pieces), _PROMPT_TOKENS_PER_ITEM):
            part = pieces[first : first + _PROMPT_TOKENS_PER_ITEM]
            texts, entries, starts = map(list, zip(*part, strict=True))
            self._send_text("".join(texts), entries, starts)
        text, _, start = pieces[-1]
        self._trail = Trail(start + len(text))

    # --- the output

    def feed(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None) -> bool:
        """Tokens of one step; true if a stop string or the only call ended the text.

        Raises ProtocolError, TypeError or ValueError for what is no token, and for log probabilities that are missing or none. Then
        it takes none of the tokens.
        """
        check_tokens(tokens, self._vocab_size)
        entries: Sequence[WireLogprob | None] = (None,) * len(tokens)
        if self._trail is not None:
            if logprobs is None or None in logprobs:
                raise ProtocolError("a worker left out log probabilities")
            rated = zip(tokens, logprobs, strict=True)
            entries = [to_wire(self._token_bytes, token, said) for token, said in rated]
        # one after the other, so that no token after the end is counted, whatever step it came in
        return any(map(self._feed_one, tokens, entries))

    def _feed_one(self, token: int, entry: WireLogprob | None) -> bool:
        self.num_tokens += 1
        text = self._detokenizer.feed((token,))
        if self._trail is not None and entry is not None:
            self._trail.add(entry, len(text), self._detokenizer.is_between)
        is_stopped = self._take(text)
        return is_stopped or self._is_over

    def finish(self, reason: str) -> EndItem:
        """The sequence came to its end, by itself or by a stop string: what was held back, and how the
        choice ends.
        """
        if self._stops.found is None:
            rest = self._detokenizer.finish()
            if self._trail is not None:
                self._trail.settle(len(rest))
            if not self._take(rest):
                self._finish_text(is_cut=reason == "length")
        if self._parser is not None:
            # what tags, calls that were cut off and other text that is not given out were made of
            self._give("", self._num_due if self._stops.found is None else 0, True)
        if self._stops.found is not None:
            return EndItem(self._index, "stop", self._stops.found)
        return EndItem(self._index, "tool_calls" if self._num_calls and reason == "stop" else reason, None)

    def _finish_text(self, *, is_cut: bool) -> None:
        """What the parser and the stop strings held back."""
        if self._parser is None or not self._tell(self._parser.finish(is_cut=is_cut)):
            held = self._stops.finish()
            self._give(held, len(held), False)

    def _take(self, text: str) -> bool:
        """More of what the model wrote; true if a stop string ended it."""
        self._num_due += len(text)
        if self._parser is not None:
            return self._tell(self._parser.feed(text))
        return self._check(text)

    # --- items

    def _tell(self, events: Sequence[Event]) -> bool:
        """Give out what the parser read; true if a stop string ended it."""
        for kind, text in events:
            if self._is_over:
                break
            if kind in ("text", "reasoning"):
                self._turn_to(kind)
                if self._check(text):
                    return True
            elif kind == "call":
                self._turn_to("arguments")
                self._num_calls += 1
                self._send(CallItem(self._index, text))
            elif kind == "end":
                self._is_over = self._is_single
            else:
                self._give(text, self._num_due, False)
        return False

    def _turn_to(self, kind: str) -> None:
        """What follows is of this kind. No stop string goes on from one kind into the next."""
        if kind == self._kind:
            return
        if held := self._stops.finish():
            self._give(held, len(held), False)
        if kind != "arguments":
            self._send(PartItem(self._index, kind))
        self._kind = kind

    def _check(self, text: str) -> bool:
        """Give out text up to a stop string; true if there is one."""
        num_new = self._stops.num_held + len(text)
        given, is_stopped = self._stops.feed(text, self.num_tokens >= self._min_tokens)
        num_kept_back = num_new - len(given) if is_stopped else self._stops.num_held
        self._give(given, self._num_due - num_kept_back, is_stopped)
        return is_stopped

    def _give(self, text: str, num_characters: int, is_cut: bool) -> None:
        """Text that no stop string can be part of any more, and of how much of what the model wrote it is the last.

        Log probabilities go with the first text that comes of their tokens, or after it: tags have none of their own.
        """
        if self._trail is not None:
            self._num_due -= num_characters
            self._trail.give(num_characters)
        self._give_out(text, is_cut)

    def _give_out(self, text: str, is_cut: bool) -> None:
        entries, starts = self._trail.take(is_cut) if self._trail is not None else ([], [])
        self._send_text(text, entries, starts)

    def _send_text(self, text: str, entries: list[Any], starts: list[int]) -> None:
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
