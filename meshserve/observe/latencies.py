"""How long clients of each worker wait, for the first token and between tokens, from what processors count. Pure."""

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any

from meshserve.telemetry import BUCKETS_S, Histogram

WINDOW_S = 30
"""Of percentiles: a few requests make none."""
NAMES = ("ttft", "itl")

Counts = dict[str, list[int]]
"""By one of `NAMES`: the counts between the bounds of `BUCKETS_S`."""


def counts_by_worker(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Counts]:
    """Of a processor's histograms, by worker, only what latencies are made of."""
    return {worker: {name: part[name][1] for name in NAMES if name in part} for worker, part in parts.items()}


def median_and_high_ms(found: Histogram, before: Histogram | None) -> tuple[float, float] | None:
    """Median and 99th percentile of what came since it was `before`; of all, if nothing came, or if some of it is not counted any more."""
    if before is not None:
        changes = {bucket: found.counts.get(bucket, 0) - before.counts.get(bucket, 0) for bucket in {*found.counts, *before.counts}}
        if any(changes.values()) and min(changes.values()) >= 0:
            found = Histogram.of_row((0.0, [changes.get(bucket, 0) for bucket in range(len(BUCKETS_S) + 1)]))
    return (found.quantile_ms(0.5), found.quantile_ms(0.99)) if found.counts else None


class WorkerLatencies:
    """Of all workers, lately. To be looked at once a second."""

    def __init__(self) -> None:
        self._counted: dict[str, dict[str, Counts]] = {}
        """By processor, by worker."""
        self._earlier: deque[Mapping[str, Mapping[str, Histogram]]] = deque(maxlen=WINDOW_S)

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


def _added_up(counted: Iterable[dict[str, Counts]]) -> Mapping[str, Mapping[str, Histogram]]:
    total: defaultdict[str, defaultdict[str, Histogram]] = defaultdict(lambda: defaultdict(Histogram))
    for of_workers in counted:
        for worker, of_names in of_workers.items():
            for name, counts in of_names.items():
                total[worker][name].add(Histogram.of_row((0.0, counts)))
    return total


def _percentiles(now: Mapping[str, Histogram], before: Mapping[str, Histogram]) -> dict[str, list[float]]:
    found = {name: median_and_high_ms(histogram, before.get(name)) for name, histogram in now.items()}
    return {f"{name}_ms": [round(value, 3) for value in pair] for name, pair in found.items() if pair is not None}
