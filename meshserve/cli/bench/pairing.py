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
    count = len(ratios)
    reach = math.ceil(0.98 * math.sqrt(count))  # half the width of the binomial interval of the median's rank
    middle = (count - 1) / 2
    low, high = max(0, math.floor(middle - reach)), min(count - 1, math.ceil(middle + reach))
    return Ratio(statistics.median(ratios), ratios[low], ratios[high], count)
