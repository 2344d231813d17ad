"""Paired comparison: two things measured in turn, so that whatever else the machine does happens to both. Pure."""

import math
import statistics
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of one thing to another over many alternations, with its 95 % confidence interval."""

    median: float
    low: float
    high: float
    num_pairs: int

    def to_dict(self) -> dict[str, float]:
        """For `--json`."""
        return {key: round(value, 4) for key, value in asdict(self).items()}

    @property
    def is_different(self) -> bool:
        """Whether the whole interval lies on one side of 1: else the two cannot be told apart."""
        return self.high < 1 or self.low > 1


def ratio_of(subjects: list[float], floors: list[float]) -> Ratio:
    """Of the pairs' ratios: the median, and the interval from order statistics, which assumes nothing about their distribution."""
    ratios = sorted(subject / floor for subject, floor in zip(subjects, floors, strict=True))
    rank = interval_rank(len(ratios))
    return Ratio(statistics.median(ratios), ratios[rank], ratios[-1 - rank], len(ratios))


def interval_rank(count: int) -> int:
    """How many values lie outside on each side of a 95 % interval of the median; 0 for fewer than six, of which all are too few.

    The median lies below the (r+1)-th of n values as often as n coins show at most r heads.
    """
    rank, share = 0, 2 / 2**count  # of both tails
    while (share := share + 2 * math.comb(count, rank + 1) / 2**count) <= 0.05:
        rank += 1
    return rank
