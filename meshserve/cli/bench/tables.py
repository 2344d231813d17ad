"""Figures as tables for a terminal, or for a file in fixed width."""

import math
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from meshserve.cli.bench.compare import Compared
from meshserve.cli.bench.histogram import QUANTILES, Histogram
from meshserve.cli.bench.session import Run
from meshserve.cli.bench.sweep import RULE, Knee, power
from meshserve.cli.bench.tally import Tally
from meshserve.cli.printing import Output

LABELS = {"ttft": "time to first token", "itl": "between tokens", "tpot": "per output token", "e2e": "end to end", "queue": "send delay"}
_WIDTH = 110


def console() -> Console:
    """For stdout."""
    return Output(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, soft_wrap=False)


def show(value: float) -> str:
    """Four significant digits or so; a dash for what is not there."""
    if math.isnan(value):
        return "-"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:,.{digits}f}"


def print_run(out: Console, run: Run) -> None:
    """All figures of one run."""
    _line(out, f"[bold]{escape(run.target)}[/]  {escape(run.model)}  {escape(run.load)}")
    _line(out, summary_line(run.tally))
    out.print(times_table(run.tally.times))
    phases = run.tally.mean_phases_ms
    if phases:
        parts = [f"{phase.replace('_', ' ')} {show(value)}" for phase, value in phases.items() if value >= 0.0005]
        _line(out, f"where the time goes (ms, mean of {run.tally.num_receipts} receipts)  " + "  ".join(parts))


def print_findings(out: Console, findings: Sequence[str]) -> None:
    """What a reader must know."""
    for finding in findings:
        _line(out, f"[yellow]note[/]  {escape(finding)}")


def _line(out: Console, text: str) -> None:
    """On one line, however long: a terminal wraps it, and a script finds it."""
    out.print(text, soft_wrap=True)


def summary_line(tally: Tally) -> str:
    """Counts and rates."""
    parts = [
        f"{tally.num_done:,} requests",
        f"{tally.num_errors:,} errors",
        f"{show(tally.requests_per_s)} requests/s",
        f"{show(tally.tokens_per_s)} output tokens/s",
    ]
    if tally.goal.is_set:
        parts.append(f"goodput {show(tally.goodput)}/s ({tally.num_good / max(1, tally.num_done + tally.num_errors):.1%})")
    parts.append(f"in {tally.window_s:.1f} s")
    return "  ".join(parts)


def times_table(times: dict[str, Histogram]) -> Table:
    """Quantiles of all times."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms", no_wrap=True)
    for column in ("mean", *QUANTILES, "max"):
        table.add_column(column, justify="right", min_width=9)
    for name, label in LABELS.items():
        histogram = times[name]
        if histogram.count:
            cells = [histogram.mean_ms, *(histogram.quantile_ms(share) for share in QUANTILES.values()), histogram.most / 1e6]
            table.add_row(label, *(show(cell) for cell in cells))
    return table


def print_comparison(out: Console, a: str, b: str, compared: Sequence[Compared]) -> None:
    """Ratios with their intervals."""
    _line(out, f"[bold]A[/] {escape(a)}\n[bold]B[/] {escape(b)}")
    if not compared:
        out.print("nothing to compare: too few pairs of turns had answers")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for column in ("A", "B", "B / A", "95 % interval"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for one in compared:
        ratio = one.ratio
        colour = "bold" if ratio.is_different else "dim"
        interval = f"{ratio.low:.3f} to {ratio.high:.3f}"
        table.add_row(one.name, show(one.a), show(one.b), f"{ratio.median:.3f}", interval, f"[{colour}]{one.verdict}[/]")
    out.print(table)
    num_pairs = max(one.ratio.num_pairs for one in compared)
    words = "pairs of turns, times in ms; of figures that do not differ, one in twenty or fewer is called different by chance"
    _line(out, f"{num_pairs} {words}")
    if not any(one.ratio.is_different for one in compared):
        _line(out, "[bold]A and B cannot be told apart by any figure.[/] More or longer turns (--pairs, --duration) narrow the intervals.")


def print_sweep(out: Console, runs: Sequence[Run], knee: Knee) -> None:
    """A line for each step, and where the knee is."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("load", no_wrap=True)
    columns = ("req/s", "tok/s", "TTFT p50", "p99", "ITL p50", "p99", "e2e p50", "p99", "power", "good", "errors")
    for column in columns:
        table.add_column(column, justify="right")
    for number, run in enumerate(runs):
        tally, times = run.tally, run.tally.times
        cells = [show(tally.requests_per_s), show(tally.tokens_per_s)]
        for name in ("ttft", "itl", "e2e"):
            cells += [show(times[name].quantile_ms(share)) for share in (0.5, 0.99)]
        good = f"{tally.num_good / max(1, tally.num_done + tally.num_errors):.1%}" if tally.goal.is_set else "-"
        table.add_row(run.label, *cells, show(power(tally)), good, str(tally.num_errors), style="bold" if number == knee.index else "")
    _line(out, f"[bold]{escape(runs[0].target)}[/]  {escape(runs[0].model)}")
    out.print(table)
    _line(out, knee_line(runs, knee))


def knee_line(runs: Sequence[Run], knee: Knee) -> str:
    """Where it is, and by which rule."""
    label = runs[knee.index].label
    found = f"knee at {label}" if knee.is_inside else f"no knee up to {label}: power still rises at the last step"
    if runs[knee.index].tally.goal.is_set:
        good = runs[knee.good_index].label if knee.good_index is not None else "none"
        found += f"; highest step with 99 % of requests within the targets: {good}"
    return f"{found}  ({RULE})"
