"""TTFT and ITL of each worker's requests, from the histograms of processors. Pure."""

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

from meshserve.telemetry import Histogram

WINDOW_S = 30
"""Of percentiles, which need many requests."""
_NAMES = ("ttft", "itl")
Counts = dict[str, dict[str, list[int]]]
"""Counts of the buckets of a processor's histograms, by worker and name."""


def latencies_by_worker(parts: Mapping[str, Mapping[str, Any]]) -> Counts:
    """Counts of a processor's histograms, by worker and name; empty on peers that are no processors."""
    return {worker: {name: part[name][1] for name in _NAMES if name in part} for worker, part in parts.items()}


class WorkerLatencies:
    """Percentiles of the last seconds, by worker; to be looked at once a second."""

    def __init__(self) -> None:
        self._counted: dict[str, Counts] = {}
        """By processor."""
        self._earlier: deque[Mapping[tuple[str, str], Histogram]] = deque(maxlen=WINDOW_S)

    def told(self, processor: str, counted: Counts) -> None:
        """All that this processor counts by now."""
        self._counted[processor] = counted

    def forget(self, processor: str) -> None:
        """It left, or began anew."""
        self._counted.pop(processor, None)

    def end_second(self) -> dict[str, Any]:
        """By worker: `ttft_ms` and `itl_ms`, each a median and a 99th percentile of the last seconds, as far as there are any."""
        now: defaultdict[tuple[str, str], Histogram] = defaultdict(Histogram)
        for by_worker in self._counted.values():
            for worker, counts in by_worker.items():
                for name in counts.keys() & _NAMES:
                    now[worker, name].add(Histogram.of_row((0.0, counts[name])))
        before = self._earlier[0] if self._earlier else {}
        self._earlier.append(now)
        found: dict[str, Any] = {worker: {} for by_worker in self._counted.values() for worker in by_worker}
        for (worker, name), histogram in now.items():
            recent = histogram.since(before.get((worker, name)))
            if recent.counts:
                found[worker][f"{name}_ms"] = [round(recent.quantile_ms(share), 3) for share in (0.5, 0.99)]
        return found
