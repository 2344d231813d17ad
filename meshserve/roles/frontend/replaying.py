"""Answers that are generated again, because their processor was lost after a part was written.
Pure.

A request that is started over with the same seeds gives the same answer again: its tokens are a
function of the request, and its items a function of the tokens, except for the order of choices. So
the items of the second answer are compared with the items of the first answer that the writer got,
and omitted as far as they are the same, also within an item if the items are cut differently. The
client gets the whole second answer: if it differs from the part that the client has, the request
ends in an error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from meshserve.errors import AnswerDiffers, MeshserveError
from meshserve.mesh.calls import Sink
from meshserve.wire.completion import (
    CallItem,
    EndItem,
    Item,
    PartItem,
    StartItem,
    TextItem,
    read_item,
)
from meshserve.wire.structs import replace

MAX_ITEMS = 256
"""Number of items that are kept as they came. Millions of lists, of a thousand streams, would slow
Python's garbage collector down."""
_TEXT = "text"
"""First element of a text item on the wire."""


@dataclass(slots=True)
class _Part:
    """Text of one kind, or the arguments of one call."""

    opening: CallItem | PartItem | None = None
    """The item that began the part; None for a choice's first text."""
    texts: list[str] = field(default_factory=list)
    num_logprobs: int = 0

    def join(self) -> str:
        """All text of the part; it is one string from then on."""
        self.texts = ["".join(self.texts)]
        return self.texts[0]


@dataclass(slots=True)
class _Choice:
    parts: list[_Part] = field(default_factory=lambda: [_Part()])
    end: EndItem | None = None


class Given:
    """The items of one answer that a writer got."""

    __slots__ = ("_choices", "has_start", "items")

    def __init__(self) -> None:
        self.items: list[Any] = []
        """The latest items, as they came. The caller that feeds the writer adds items, and calls
        `settle` beyond `MAX_ITEMS`."""
        self.has_start = False
        self._choices: dict[int, _Choice] = {}

    def settle(self) -> dict[int, _Choice]:
        """Join all items by choice, and return the choices. No single item is kept."""
        items, self.items = self.items, []
        for item in items:
            if type(item) is str:
                self._last_part(0).texts.append(item)
            elif (
                type(item) is list and item[0] == _TEXT
            ):  # checked before by the writer
                _, choice, text, logprobs, *_ = *item, None
                self._take_text(choice, text, logprobs)
            else:
                self._take(read_item(item))
        for choice in self._choices.values():
            choice.parts[-1].join()
        return self._choices

    def _take(self, item: Item) -> None:
        if isinstance(item, StartItem):
            self.has_start = True
        elif isinstance(item, TextItem):
            self._take_text(item.choice, item.text, item.logprobs)
        elif isinstance(item, EndItem):
            self._choices.setdefault(item.choice, _Choice()).end = item
        else:
            choice = self._choices.setdefault(item.choice, _Choice())
            choice.parts[-1].join()
            choice.parts.append(_Part(item))

    def _take_text(self, choice: int, text: str, logprobs: list[Any] | None) -> None:
        part = self._last_part(choice)
        part.texts.append(text)
        part.num_logprobs += len(logprobs or ())

    def _last_part(self, choice: int) -> _Part:
        found = self._choices.get(choice)
        if found is None:
            found = self._choices[choice] = _Choice()
        return found.parts[-1]


class _Cursor:
    """How far the second answer is in one choice of the first. Holds a copy of the choice from the
    start of the second answer, because the sink adds to the choice meanwhile."""

    __slots__ = (
        "_end",
        "_has_ended",
        "_num_characters",
        "_num_logprobs",
        "_part",
        "_parts",
        "_place",
        "_text",
    )

    def __init__(self, choice: _Choice) -> None:
        self._end, self._has_ended = choice.end, choice.end is None
        self._parts = [_Part(part.opening, [part.join()], part.num_logprobs) for part in choice.parts]
        self._go_to(0)

    def _go_to(self, place: int) -> None:
        self._place, self._part = place, self._parts[place]
        self._text = self._part.join()
        self._num_characters = self._num_logprobs = 0

    @property
    def is_at_end(self) -> bool:
        """Whether the whole choice came again."""
        return self._has_ended and self._place == len(self._parts) - 1 and self._is_part_over

    @property
    def _is_part_over(self) -> bool:
        return (
            self._num_characters == len(self._text)
            and self._num_logprobs == self._part.num_logprobs
        )

    def fresh(self, item: TextItem | CallItem | PartItem | EndItem) -> Item | None:
        """The new part of this item, or None. Raises AnswerDiffers."""
        if isinstance(item, TextItem):
            return self._fresh_text(item)
        if not self._is_part_over:
            raise AnswerDiffers()
        if isinstance(item, EndItem):
            return self._fresh_end(item)
        if self._place + 1 == len(self._parts):
            return item
        self._go_to(self._place + 1)
        if item != self._part.opening:
            raise AnswerDiffers()
        return None

    def _fresh_text(self, item: TextItem) -> Item | None:
        start, logprobs = self._num_characters, item.logprobs or []
        num_known = min(len(item.text), len(self._text) - start)
        if not self._text.startswith(item.text[:num_known], start):
            raise AnswerDiffers()
        num_known_logprobs = min(len(logprobs), self._part.num_logprobs - self._num_logprobs)
        self._num_characters += num_known
        self._num_logprobs += num_known_logprobs
        text, logprobs = item.text[num_known:], logprobs[num_known_logprobs:]
        if not text and not logprobs:
            return None
        # offsets count from the beginning of the choice's text: the omitted part changes none of
        # them
        offsets = item.offsets[num_known_logprobs:] if item.offsets is not None else None
        return replace(
            item,
            text=text,
            logprobs=logprobs if item.logprobs is not None else None,
            offsets=offsets,
        )

    def _fresh_end(self, item: EndItem) -> Item | None:
        if self._end is None:
            return item
        if item != self._end or self._place + 1 < len(self._parts):
            raise AnswerDiffers()
        self._has_ended = True
        return None


class Replayed(Sink, Protocol):
    """Receives the new items."""

    def on_items(self, items: list[Any]) -> None:
        """The next items."""

    def stop(self, error: MeshserveError) -> None:
        """The answer cannot continue: cancel its stream."""


class Replay:
    """The sink of the second answer's stream."""

    __slots__ = ("_cursors", "_has_start", "_on_fresh", "_sink")

    def __init__(self, given: Given, sink: Replayed, on_fresh: Callable[[], None]) -> None:
        """`on_fresh` is called once, before the sink gets the first new item."""
        self._cursors = {index: _Cursor(choice) for index, choice in given.settle().items()}
        self._has_start = given.has_start
        self._sink, self._on_fresh = sink, on_fresh

    def on_item(self, item: Any) -> None:
        """The next item of the second answer."""
        self.on_items([item])

    def on_items(self, items: Sequence[Any]) -> None:
        """The next items of the second answer."""
        try:
            fresh = [new for item in items if (new := self._fresh(read_item(item))) is not None]
        except MeshserveError as error:
            self._sink.stop(error)
            return
        if fresh:
            self._went_on()
            self._sink.on_items(fresh)

    def _fresh(self, item: Item) -> Item | None:
        if isinstance(item, StartItem):
            return None if self._has_start else item
        cursor = self._cursors.get(item.choice)
        return item if cursor is None else cursor.fresh(item)

    def _went_on(self) -> None:
        on_fresh, self._on_fresh = self._on_fresh, _nothing
        on_fresh()

    def on_end(self, value: Any) -> None:
        """The second answer is complete."""
        if all(cursor.is_at_end for cursor in self._cursors.values()):
            self._went_on()
            self._sink.on_end(value)
        else:
            self._sink.on_error(AnswerDiffers())

    def on_error(self, error: MeshserveError) -> None:
        """The second processor failed, or was lost too."""
        self._sink.on_error(error)


def _nothing() -> None:
    """`on_fresh` was called before."""
