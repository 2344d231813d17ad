"""What the load generator shows: tables and a progress bar. Without a socket."""

import io
from typing import Any

import pytest
from rich.console import Console

from meshserve.cli.bench import live
from meshserve.cli.bench.session import Run
from meshserve.cli.bench.sse import text_of
from meshserve.cli.bench.sweep import find_knee
from meshserve.cli.bench.tables import print_run, print_sweep
from meshserve.cli.bench.tally import Goal, Tally
from tests.cli.test_bench_parts import record, step, tally_of

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
