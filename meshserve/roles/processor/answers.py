"""An answer as a model writes it, read as text, reasoning and calls of tools while it comes. Pure.

What looks like a call and is none is text: JSON that is malformed, a function that nobody offered, a tag that is never closed. So a call
is held back until it is complete; text and reasoning go through as they come. What is read does not depend on how the text was split.
White space right after a tag belongs to the tag. In one place before a call, in its head or after it there are at most
`MAX_SPACE_CHARACTERS` of white space, and as many before `<think>`: with more, it is text.
"""

from collections.abc import Collection

from meshserve.roles.processor.call_formats import (
    ALL_FORMATS,
    MAX_SPACE_CHARACTERS,
    Accepts,
    Call,
    CallFormat,
    CallReader,
    Event,
)

THINK, THINK_END = "<think>", "</think>"
MAX_FAILED_CALLS = 64
"""Markers in one answer that no call followed; with more of them, the rest is text. Each may have the rest of the answer read again."""


class AnswerParser:
    """Reads one answer, in modes: each is a method that reads from the text held back.

    `<think>` counts where the answer begins, or if the prompt ended with it (`is_thinking`).
    With `accepts` a call must be accepted; one that is not is text.
    """

    __slots__ = (
        "_accepts",
        "_bare",
        "_held",
        "_is_cut",
        "_is_thought",
        "_marked",
        "_mode",
        "_names",
        "_num_failed",
        "_reader",
        "_skips_space",
        "num_calls",
    )

    def __init__(
        self,
        names: Collection[str] = (),
        formats: tuple[CallFormat, ...] = ALL_FORMATS,
        *,
        is_thinking: bool = False,
        accepts: Accepts | None = None,
    ) -> None:
        self._names, self._accepts = frozenset(names), accepts
        self._marked = {found.opener: found for found in formats if found.opener and names}
        self._bare = next((found for found in formats if not found.opener and names), None)
        self._mode = self._think if is_thinking else self._begin
        self._is_thought = self._skips_space = is_thinking
        self._held, self._is_cut = "", False
        self._reader: CallReader | None = None
        self._num_failed = self.num_calls = 0

    def feed(self, text: str) -> list[Event]:
        """More of the answer, and what it comes to."""
        self._held += text
        return self._read(is_end=False)

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        """The answer is over: what was held back.

        Of an answer that `is_cut` off, a call that has begun is neither call nor text, and so is a marker that has.
        """
        self._is_cut = is_cut
        reader = self._reader if is_cut and self._mode == self._call else None
        calls = reader.cut_short(self._held) if reader is not None else None
        if calls is not None:
            self._held = ""
            return self._called(calls)
        return self._read(is_end=True)

    def _read(self, is_end: bool) -> list[Event]:
        events: list[Event] = []
        while self._held:
            if self._skips_space:
                self._held = self._held.lstrip()
                self._skips_space = not self._held
            elif not self._mode(events, is_end):
                break
        return events

    # --- modes: each reads from what is held, and says whether there is more to do without more text

    def _begin(self, events: list[Event], is_end: bool) -> bool:
        """Nothing was read yet, or reasoning only."""
        text = self._held.lstrip()
        # a tag counts once, and where nothing but a little white space came before it
        is_first = not self._is_thought and len(self._held) - len(text) <= MAX_SPACE_CHARACTERS
        if is_first and text.startswith(THINK):
            self._held, self._mode = text[len(THINK) :], self._think
            self._is_thought = self._skips_space = True
        elif is_first and not is_end and THINK.startswith(text):
            return False
        else:
            self._open(self._bare)
        return True

    def _think(self, events: list[Event], is_end: bool) -> bool:
        thought, tag, rest = self._held.partition(THINK_END)
        if not tag:
            self._give(events, "reasoning", is_end, (THINK_END,))
            return False
        if thought:
            events.append(Event("reasoning", thought))
        self._held, self._mode, self._skips_space = rest, self._begin, True
        return True

    def _text(self, events: list[Event], is_end: bool) -> bool:
        held = self._held
        places = [(place, opener) for opener in self._marked if (place := held.find(opener)) >= 0]
        if not places:
            self._give(events, "text", is_end, self._marked)
            return False
        place, opener = min(places)
        if place:
            events.append(Event("text", held[:place]))
        self._held = held[place:]
        self._open(self._marked[opener])
        return True

    def _call(self, events: list[Event], is_end: bool) -> bool:
        reader = self._reader
        assert reader is not None
        found = reader.read(self._held, is_end)
        if found is None:
            return False
        calls, end = found
        self._open(None)
        if not calls:
            self._fail(events, len(reader.opener))
            return True
        events += self._called(calls)
        self._held, self._skips_space = self._held[end:], True
        return True

    def _called(self, calls: list[Call]) -> list[Event]:
        self.num_calls += len(calls)
        pairs = [(Event("call", call.name), Event("arguments", call.arguments), Event("end", "")) for call in calls]
        return [event for events in pairs for event in events]

    # --- steps

    def _open(self, form: CallFormat | None) -> None:
        """Calls of this form begin; None: text does."""
        self._reader = None if form is None else CallReader(form, self._names, self._accepts)
        self._mode = self._text if form is None else self._call

    def _fail(self, events: list[Event], num_characters: int) -> None:
        """It was no call: its marker is text, and there may be calls in what follows."""
        if num_characters:
            events.append(Event("text", self._held[:num_characters]))
            self._held = self._held[num_characters:]
            self._num_failed += 1
            if self._num_failed == MAX_FAILED_CALLS:
                self._marked.clear()

    def _give(self, events: list[Event], kind: str, is_end: bool, tags: Collection[str]) -> None:
        """All that is held, but for what one of these tags may begin with."""
        is_whole = is_end and not (self._is_cut and kind == "text")
        given = self._held[: len(self._held) - (0 if is_whole else _num_begun(self._held, tags))]
        if given:
            events.append(Event(kind, given))
            self._held = self._held[len(given) :]


def _num_begun(text: str, tags: Collection[str]) -> int:
    """The longest end of the text that is the beginning of a tag."""
    longest = 0
    for tag in tags:
        start = text.find(tag[0], max(0, len(text) - len(tag) + 1))
        while start >= 0 and not tag.startswith(text[start:]):
            start = text.find(tag[0], start + 1)
        if start >= 0:
            longest = max(longest, len(text) - start)
    return longest
