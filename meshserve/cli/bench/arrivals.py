"""When requests are due: arrivals at a rate that may change in time. Pure.

A Poisson process with a changing rate is one of rate 1 whose time runs differently (Lewis and Shedler, 1979): so both kinds of
arrivals count steps, even ones or exponential ones, and a level's integral says when that many steps have passed.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from meshserve.errors import UsageError

ARRIVALS = ("poisson", "constant")
_MOST = 1e6


@dataclass(frozen=True, slots=True)
class Level:
    """A rate per second, or a number of clients, that goes from `first` to `last` in `ramp_s` seconds, and stays there."""

    first: float
    last: float
    ramp_s: float = 0.0

    def at(self, seconds: float) -> float:
        """The level then."""
        if seconds >= self.ramp_s:
            return self.last
        return self.first + (self.last - self.first) * seconds / self.ramp_s

    def time_of(self, count: float) -> float:
        """Seconds until a rate of this level has brought `count` arrivals."""
        if count < 1e-9:  # of whose square root nothing would be left below
            return 0.0
        ramped = (self.first + self.last) / 2 * self.ramp_s
        if count >= ramped:
            return self.ramp_s + (count - ramped) / self.last
        slope = (self.last - self.first) / self.ramp_s
        # the root of first*t + slope*t*t/2 = count, in the form that stays exact where the slope is nearly 0
        return 2 * count / (self.first + math.sqrt(max(0.0, self.first**2 + 2 * slope * count)))


def constant_level(value: float) -> Level:
    """One that does not change."""
    return Level(value, value)


def parse_ramp(text: str) -> tuple[str, Level]:
    """`rate=FROM:TO:SECONDS` or `concurrency=FROM:TO:SECONDS`. Raises UsageError."""
    name, _, rest = text.partition("=")
    try:
        first, last, ramp_s = (float(part) for part in rest.split(":"))
    except ValueError:
        first = last = ramp_s = math.nan
    is_possible = 0 <= first <= _MOST and 0 < last <= _MOST and 0 < ramp_s <= _MOST
    if name not in ("rate", "concurrency") or not is_possible:
        raise UsageError(f"--ramp {text!r} is not rate=FROM:TO:SECONDS or concurrency=FROM:TO:SECONDS")
    return name, Level(first, last, ramp_s)


def due_times(level: Level, arrival: str, rng: random.Random) -> Iterator[float]:
    """Seconds from the start at which requests are due, rising, without end. The first constant one is due at once."""
    if arrival == "constant":
        steps: Iterator[float] = itertools.count(0)
    else:
        steps = itertools.accumulate(rng.expovariate(1.0) for _ in itertools.count())
    return (level.time_of(step) for step in steps)
