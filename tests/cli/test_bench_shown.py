"""What the load generator shows: plots, tables, a progress bar. Without a socket."""

import io
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from meshserve.cli.bench import live
from meshserve.cli.bench.report.plots import distribution
from meshserve.cli.bench.report.svg import axis_for, linear_ticks, log_ticks
from meshserve.cli.bench.session import Run
from meshserve.cli.bench.sse import text_of
from meshserve.cli.bench.sweep import find_knee
from meshserve.cli.bench.tables import print_run, print_sweep
from meshserve.cli.bench.tally import Goal, Tally, fine_histogram
from tests.cli.test_bench_parts import record, step, tally_of

# --- plots


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_lie_within_their_axis_and_are_neither_few_nor_many(low: float, width: float) -> None:
    ticks = linear_ticks(low, low + width)
    assert 2 <= len(ticks) <= 11 and ticks == sorted(ticks)
    assert low - width * 1e-6 <= ticks[0] and ticks[-1] <= low + width * (1 + 1e-6)


@given(st.floats(1e-4, 1e4), st.floats(1.5, 1e7))
def test_ticks_of_a_logarithmic_axis_lie_within_it(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert 2 <= len(ticks) <= 12 and low * 0.998 <= ticks[0] and ticks[-1] <= low * factor * 1.002


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, min_value=None), max_size=5), st.booleans(), st.booleans())
def test_an_axis_has_room_for_whatever_comes(values: list[float], is_log: bool, is_from_zero: bool) -> None:
    known = [value for value in values if not math.isfinite(value) or (abs(value) < 1e12 and (abs(value) > 1e-6 or value == 0))]
    axis = axis_for(known, "ms", is_log, is_from_zero)
    assert axis.low < axis.high and axis.ticks()
    assert all(0 <= axis.place(value) <= 1 for value in known if math.isfinite(value) and (value > 0 or not is_log))


# --- tables and words


def run_of(label: str, tally: Tally) -> Run:
    return Run(label, "4 clients", "http://127.0.0.1:8000", "dummy", tally, {})


@pytest.mark.parametrize("width", [80, 110, 160])
def test_tables_lose_no_digit_to_a_narrow_terminal(width: int) -> None:
    out = Console(file=io.StringIO(), width=width)
    steps = [step(10, 0.1, Goal(ttft_s=1.0)), step(2000, 123.4567, Goal(ttft_s=1.0))]
    print_run(out, run_of("run", steps[1]))
    print_sweep(out, [run_of("concurrency 1", steps[0]), run_of("concurrency 1000", steps[1])], find_knee(steps))
    assert isinstance(out.file, io.StringIO)
    shown = out.file.getvalue()
    assert "…" not in shown and "max" in shown and "123,457" in shown and "good" in shown
    assert ("ITL p99" in shown) is (width > 80)


def test_a_progress_bar_follows_a_trace_by_its_requests() -> None:
    tally = tally_of([record(0.0, [0.01])] * 5)
    assert live.share_done(None, 20, tally, 1.0) == 0.25
    assert live.share_done(10.0, None, tally, 5.0) == pytest.approx(0.5) and live.share_done(None, None, tally, 1.0) == 0.0


def test_lines_of_a_long_sweep_differ() -> None:
    histogram = fine_histogram([0.01, 0.02])
    page = distribution("times", [(f"step {number}", histogram) for number in range(12)])
    assert len(set(re.findall(r'<path class="(line [^"]+)"', page))) == 12


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"choices": [{"text": "a"}]}, "a"),
        ({"choices": [{"delta": {"content": "b"}}]}, "b"),
        ({"choices": [{"message": {"content": None, "reasoning_content": "c"}}]}, "c"),
        ({"choices": [{"text": 5, "delta": "no object", "message": ["nor this"]}]}, ""),
        ({"choices": {"0": "a"}}, ""),
    ],
)
def test_text_is_found_wherever_servers_put_it(fields: dict[str, Any], text: str) -> None:
    assert text_of(fields) == text
