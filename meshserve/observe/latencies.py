"""How long clients of each worker wait, for the first token and between tokens, from what processors count. Pure."""

from collections import deque
from collections.abc import Iterable, Mapping
from operator import add
from typing import Any

from meshserve.telemetry import BUCKETS_S

WINDOW_S = 30
"""Of percentiles: a few requests make none."""
NAMES = ("ttft", "itl")

Counts = dict[str, list[int]]
"""By one of `NAMES`: the counts between the bounds of `BUCKETS_S`."""


def counts_by_worker(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Counts]:
    """Of a processor's histograms, by worker, only what latencies are made of."""
    return {worker: {name: part[name][1] for name in NAMES if name in part} for worker, part in parts.items()}


def percentile_s(counts: list[int], share: float) -> float | None:
    """As if the durations in each bucket lay evenly in it; those above the last bound count as that bound. None if there are none."""
    num_left = sum(counts) * share
    if num_left <= 0:
        return None
    low_s = 0.0
    for count, bound_s in zip(counts, BUCKETS_S, strict=False):
        if count >= num_left:
            return min(bound_s, low_s + (bound_s - low_s) * num_left / count)  # rounding may exceed it
        num_left -= count
        low_s = bound_s
    return low_s


def median_and_high_ms(counts: list[int], before: list[int] | None) -> tuple[float, float] | None:
    """Median and 99th percentile of what came since it was `before`; of all, if nothing came, or if some of it is not counted any more."""
    lately = [now - then for now, then in zip(counts, before, strict=True)] if before is not None else counts
    counts = lately if sum(lately) > 0 and min(lately) >= 0 else counts
    median_s, high_s = percentile_s(counts, 0.5), percentile_s(counts, 0.99)
    return (median_s * 1000, high_s * 1000) if median_s is not None and high_s is not None else None


class WorkerLatencies:
    """Of all workers, lately. To be looked at once a second."""

    def __init__(self) -> None:
        self._counted: dict[str, dict[str, Counts]] = {}
        """By processor, by worker."""
        self._earlier: deque[dict[str, Counts]] = deque(maxlen=WINDOW_S)

    def told(self, processor: str, counted: dict[str, Counts]) -> None:
        """All that this processor counts by now."""
        self._counted[processor] = counted

    def forget(self, processor: str) -> None:
        """It left, or began anew."""
        self._counted.pop(processor, None)

    def end_second(self) -> dict[str, Any]:
        """By worker: `ttft_ms` and `itl_ms`, each a median and a 99th percentile, as far as there are any."""
        now = _added_up(self._counted.values())
        before = self._earlier[0] if self._earlier else {}
        self._earlier.append(now)
        return {worker: _percentiles(counts, before.get(worker, {})) for worker, counts in now.items()}


def _added_up(counted: Iterable[dict[str, Counts]]) -> dict[str, Counts]:
    total: dict[str, Counts] = {}
    for of_workers in counted:
        for worker, of_names in of_workers.items():
            known = total.setdefault(worker, {})
            for name, counts in of_names.items():
                known[name] = list(map(add, known[name], counts)) if name in known else counts
    return total


def _percentiles(counts: Counts, before: Counts) -> dict[str, list[float]]:
    found = {name: median_and_high_ms(counts[name], before.get(name)) for name in counts}
    return {f"{name}_ms": [round(value, 3) for value in pair] for name, pair in found.items() if pair is not None}
