"""Counts of events that repeat, and when to log them again. Pure, with bounded memory."""

_MAX_KEYS = 512
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 60.0, 3600.0


class Repeats:
    """Counts each kind of event. The first is logged, then a count after a minute, then at pauses that grow to an hour."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float, float]] = {}
        """By kind, the latest last: how many times, when to say so next, and the pause after that."""

    def again(self, kind: str, now_s: float) -> int:
        """Count an event. Returns the number so far if it should be logged now, else 0."""
        num_times, say_next_s, pause_s = self._seen.pop(kind, (0, now_s, _FIRST_PAUSE_S))
        is_due = now_s >= say_next_s
        if is_due:
            say_next_s, pause_s = now_s + pause_s, min(_LONGEST_PAUSE_S, pause_s * 10)
        self._seen[kind] = num_times + 1, say_next_s, pause_s
        if len(self._seen) > _MAX_KEYS:
            del self._seen[next(iter(self._seen))]
        return num_times + 1 if is_due else 0

    def forget(self, kind: str) -> None:
        """The next event of this kind counts as the first."""
        self._seen.pop(kind, None)
