"""Steps of load, and where the knee is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from meshserve.cli.bench.tally import Tally
from meshserve.errors import UsageError

RULE = "the step of greatest power, requests/s over mean end-to-end latency (Kleinrock, 1979)"
GOOD_SHARE = 0.99


def parse_sweep(text: str) -> tuple[str, tuple[float, ...]]:
    """What is raised, and its steps: `concurrency=1,2,4` or `rate=10,20,40`, rising. Raises UsageError."""
    name, _, rest = text.partition("=")
    try:
        steps = tuple(float(part) for part in rest.split(","))
    except ValueError:
        steps = ()
    is_whole = name != "concurrency" or all(step == int(step) for step in steps if math.isfinite(step))
    is_rising = all(0 < step < 1e6 for step in steps) and list(steps) == sorted(set(steps))
    if name not in ("concurrency", "rate") or len(steps) < 2 or not is_rising or not is_whole:
        raise UsageError(f"--sweep {text!r} is not concurrency=N,N,... or rate=R,R,..., rising")
    return name, steps


def power(tally: Tally) -> float:
    """Requests per second for each second of latency; 0 where nothing was answered."""
    mean_ms = tally.times["e2e"].mean_ms
    return tally.requests_per_s / mean_ms * 1000 if mean_ms > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Knee:
    """Where more load begins to cost more latency than it brings throughput."""

    index: int
    is_inside: bool
    """False: it is the last step, and the knee may lie beyond."""
    good_index: int | None
    """The highest step up to which 99 % of requests met the goal; None if none did, or there is no goal."""


def find_knee(tallies: Sequence[Tally]) -> Knee:
    """By :data:`RULE`. Pure."""
    powers = [power(tally) for tally in tallies]
    index = powers.index(max(powers))
    good_index = None
    for number, tally in enumerate(tallies):
        if not tally.goal.is_set or tally.good_share < GOOD_SHARE:
            break
        good_index = number
    return Knee(index, index < len(powers) - 1, good_index)
