"""Stop strings, also across token borders. Pure."""


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
