"""How long a busy machine keeps somebody waiting for a core: what a bound of time may be exceeded by.

A bound such as "noticed within 0.2 s" is about meshserve, not about the other work of the machine. The kernel adds up
the time in which any task waits for a core (pressure stall information); a chain of events loses that much at most.
On a quiet machine the sum is next to nothing, so a bound is as sharp there as the test writes it.
"""

import bisect
import threading
import time
from collections import deque

from tests.harness.waiting import stalled_s

_SAMPLE_S = 0.05
_NUM_SAMPLES = 40_000
_samples: deque[tuple[float, float]] = deque(maxlen=_NUM_SAMPLES)
"""(monotonic time, seconds stalled until then), oldest first."""


def watch() -> None:
    """Records the stalls from now on, for as long as this process lives."""
    _samples.append((time.monotonic(), stalled_s()))
    threading.Thread(target=_sample, name="pressure", daemon=True).start()


def allowance_s(start_s: float, end_s: float | None = None) -> float:
    """Seconds of stalls between two readings of the monotonic clock (by default until now), each widened to a sample."""
    _samples.append((time.monotonic(), stalled_s()))
    samples = list(_samples)
    first = max(0, bisect.bisect_right(samples, start_s, key=_time) - 1)
    last = len(samples) - 1 if end_s is None else min(len(samples) - 1, bisect.bisect_left(samples, end_s, key=_time))
    return max(0.0, samples[last][1] - samples[first][1])


def _time(sample: tuple[float, float]) -> float:
    return sample[0]


def _sample() -> None:
    while True:
        threading.Event().wait(_SAMPLE_S)
        _samples.append((time.monotonic(), stalled_s()))
