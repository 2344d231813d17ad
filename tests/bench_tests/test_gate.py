"""When the CI calls the mesh slower, as a table; and that what is committed is complete."""

import json

import pytest

from bench.gate import COMMITTED, FIGURES, Figure, Verdict, bar_of, judge
from meshserve.cli.bench.compare import Ratio

TIME, RATE = Figure("a time", True), Figure("a rate", False)


@pytest.mark.parametrize(
    ("figure", "low", "median", "high", "verdict"),
    [
        # a time that was 2.1 times its floor's may be 3 times it
        (TIME, 2.0, 2.1, 2.2, Verdict.HOLDS),
        (TIME, 1.0, 1.1, 1.2, Verdict.HOLDS),
        (TIME, 2.5, 2.9, 9.0, Verdict.HOLDS),
        (TIME, 2.9, 3.2, 9.0, Verdict.UNCLEAR),
        (TIME, 3.0, 3.2, 9.0, Verdict.UNCLEAR),
        (TIME, 3.01, 3.2, 3.3, Verdict.FELL),
        # a rate that was 2.1 of its floor's may be 1.47 of it
        (RATE, 2.0, 2.1, 2.2, Verdict.HOLDS),
        (RATE, 4.0, 4.1, 4.2, Verdict.HOLDS),
        (RATE, 0.5, 1.5, 2.2, Verdict.HOLDS),
        (RATE, 0.5, 1.4, 1.48, Verdict.UNCLEAR),
        (RATE, 1.3, 1.4, 1.46, Verdict.FELL),
    ],
)
def test_only_a_whole_interval_beyond_the_bar_is_a_fall(figure: Figure, low: float, median: float, high: float, verdict: Verdict) -> None:
    assert judge(figure, Ratio(median, low, high, 8), 2.1, 0.3) is verdict


def test_a_time_and_a_rate_fall_by_the_same_speed() -> None:
    assert bar_of(RATE, 1.0, 0.3) == pytest.approx(0.7)
    assert bar_of(TIME, 1.0, 0.3) == pytest.approx(1 / 0.7)


def test_what_is_committed_names_every_figure_and_how_it_was_made() -> None:
    committed = json.loads(COMMITTED.read_text())
    assert set(committed["ratios"]) == {figure.name for figure in FIGURES}
    assert committed["tolerance"] == 0.3
    assert "--update" in committed["made"]
    assert all(ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in committed["ratios"].values())
