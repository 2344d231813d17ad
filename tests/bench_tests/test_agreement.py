"""When two instruments are said to agree."""

import pytest

from bench.agreement import AGREES, DIFFERS, UNDECIDED, verdict
from meshserve.cli.bench.compare import Ratio


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.96, 1.04, AGREES),
        (0.95, 1.05, AGREES),
        (1.01, 1.04, AGREES),
        (0.94, 1.01, UNDECIDED),
        (1.00, 3.00, UNDECIDED),
        (0.50, 2.00, UNDECIDED),
        (1.06, 1.10, DIFFERS),
        (0.80, 0.94, DIFFERS),
    ],
)
def test_instruments_agree_or_differ_by_the_whole_interval(low: float, high: float, words: str) -> None:
    assert verdict(Ratio((low + high) / 2, low, high, 10)) == words
