"""Paired comparison: two sides in turn, so that other load on the machine meets both. Pure."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from meshserve.cli.bench.tally import Tally


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


FIGURES: dict[str, Callable[[Tally], float]] = {
    "requests/s": lambda tally: tally.requests_per_s,
    "output tokens/s": lambda tally: tally.tokens_per_s,
    "goodput/s": lambda tally: tally.goodput if tally.goal.is_set else math.nan,
    "TTFT p50": lambda tally: tally.times["ttft"].quantile_ms(0.5),
    "TTFT p99": lambda tally: tally.times["ttft"].quantile_ms(0.99),
    "ITL mean": lambda tally: tally.times["itl"].mean_ms,
    "ITL p50": lambda tally: tally.times["itl"].quantile_ms(0.5),
    "ITL p99": lambda tally: tally.times["itl"].quantile_ms(0.99),
    "TPOT p50": lambda tally: tally.times["tpot"].quantile_ms(0.5),
    "end-to-end p50": lambda tally: tally.times["e2e"].quantile_ms(0.5),
    "end-to-end p99": lambda tally: tally.times["e2e"].quantile_ms(0.99),
}
"""What is compared: rates, and times in milliseconds."""
MIN_PAIRS = 6
"""With fewer there is no interval of 95 %."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of both."""

    name: str
    a: float
    b: float
    """Medians over the turns."""
    ratio: Ratio
    """B to A, pair by pair."""

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.ratio.is_different:
            return "cannot be told apart"
        return "B is higher" if self.ratio.median > 1 else "B is lower"


def compare_runs(pairs: Sequence[tuple[Tally, Tally]]) -> list[Compared]:
    """All figures that both sides have, in all pairs that have them, if they are enough. Pure."""
    found = []
    for name, figure in FIGURES.items():
        values = [(figure(a), figure(b)) for a, b in pairs]
        usable = [(a, b) for a, b in values if a > 0 and b > 0]  # False for NaN
        if len(usable) < MIN_PAIRS:
            continue
        ratio = ratio_of([b for _, b in usable], [a for a, _ in usable])
        found.append(Compared(name, statistics.median(a for a, _ in usable), statistics.median(b for _, b in usable), ratio))
    return found


def left_out(pairs: Sequence[tuple[Tally, Tally]]) -> list[str]:
    """What a reader would miss: figures that only some turns have, or only one side, as the rate of one that answers nothing. Pure."""
    missing: dict[tuple[int, int], list[str]] = {}
    for name, figure in FIGURES.items():
        values = [(figure(a) > 0, figure(b) > 0) for a, b in pairs]
        if any(a or b for a, b in values) and sum(a and b for a, b in values) < MIN_PAIRS:
            missing.setdefault((sum(a for a, _ in values), sum(b for _, b in values)), []).append(name)
    return [f"not compared, as A has it in {a} turns and B in {b}: {', '.join(names)}" for (a, b), names in missing.items()]
