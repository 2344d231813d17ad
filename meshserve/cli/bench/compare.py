"""Two targets or settings in turn, many times in one run, so that whatever else the machine does happens to both."""

import math
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from meshserve.cli.bench.pairing import Ratio, ratio_of
from meshserve.cli.bench.session import Run
from meshserve.cli.bench.tally import TIMES, Tally, fine_histogram
from meshserve.telemetry import Histogram

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
        found.append(Compared(name, median(a for a, _ in usable), median(b for _, b in usable), ratio))
    return found


def left_out(pairs: Sequence[tuple[Tally, Tally]]) -> list[str]:
    """What a reader would miss: figures that only some turns have, or only one side, as the rate of one that answers nothing. Pure."""
    missing: dict[tuple[int, int], list[str]] = {}
    for name, figure in FIGURES.items():
        values = [(figure(a) > 0, figure(b) > 0) for a, b in pairs]
        if any(a or b for a, b in values) and sum(a and b for a, b in values) < MIN_PAIRS:
            missing.setdefault((sum(a for a, _ in values), sum(b for _, b in values)), []).append(name)
    return [f"not compared, as A has it in {a} turns and B in {b}: {', '.join(names)}" for (a, b), names in missing.items()]


async def alternate(
    run_a: Callable[[], Awaitable[Run]], run_b: Callable[[], Awaitable[Run]], num_pairs: int, seed: int, is_stopped: Callable[[], bool]
) -> list[tuple[Run, Run]]:
    """Pairs of runs; which of a pair comes first is drawn, so that a drift favours neither. A pair that was stopped counts for nothing."""
    rng = random.Random(f"order {seed}")
    pairs: list[tuple[Run, Run]] = []
    while len(pairs) < num_pairs and not is_stopped():
        if rng.random() < 0.5:
            a = await run_a()
            b = await run_b()
        else:
            b = await run_b()
            a = await run_a()
        if not is_stopped():
            pairs.append((a, b))
    return pairs


def all_times(runs: Iterable[Run]) -> dict[str, Histogram]:
    """Of several runs together."""
    merged = {name: fine_histogram() for name in TIMES}
    for run in runs:
        for name, histogram in run.tally.times.items():
            merged[name].add(histogram)
    return merged
