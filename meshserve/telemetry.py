"""What every floor may report to: counters and stopwatches. It knows nobody, and costs next to nothing."""

import time
from collections import defaultdict
from collections.abc import Mapping


class Counters:
    """Named counts since the process started. One instance a peer; cheap enough for every message."""

    def __init__(self) -> None:
        self._values: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` more of `name`, e.g. `frames_malformed`."""
        self._values[name] += amount

    def snapshot(self) -> Mapping[str, int]:
        """All counts that are not zero."""
        return dict(self._values)


class Phases:
    """The phases of one request on this peer's monotonic clock: each ends where the next begins, so that they partition the time."""

    __slots__ = ("_began_s", "_last_s", "durations_ms")

    def __init__(self) -> None:
        self._began_s = self._last_s = time.monotonic()
        self.durations_ms: dict[str, float] = {}

    def end(self, phase: str) -> float:
        """Everything since the last call was `phase`; returns its milliseconds. Phases that repeat add up."""
        now_s = time.monotonic()
        elapsed_ms = (now_s - self._last_s) * 1000
        self._last_s = now_s
        self.durations_ms[phase] = self.durations_ms.get(phase, 0.0) + elapsed_ms
        return elapsed_ms

    def total_ms(self) -> float:
        """Since the request came."""
        return (time.monotonic() - self._began_s) * 1000
