"""Figures as tables for a terminal, or for a file in fixed width."""

import math
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from meshserve.cli.bench.compare import Compared
from meshserve.cli.bench.session import Run
from meshserve.cli.bench.sweep import RULE, Knee, power
from meshserve.cli.bench.tally import Tally
from meshserve.cli.columns import Output
from meshserve.telemetry import QUANTILES, Histogram

LABELS = {"ttft": "time to first token", "itl": "between tokens", "tpot": "per output token", "e2e": "end to end", "queue": "send delay"}
_WIDTH, _UNLIMITED = 160, 10_000


def console() -> Console:
    """For stdout."""
    return Output(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, soft_wrap=False)


def show(value: float) -> str:
    """Four significant digits or so; a dash for what is not there."""
    if math.isnan(value):
        return "-"
    digits = next((digits for digits, limit in ((3, 10), (2, 100), (1, 10_000)) if abs(value) < limit), 0)
    return f"{value:,.{digits}f}"


def print_run(out: Console, run: Run) -> None:
    """All figures of one run."""
    _line(out, f"[bold]{escape(run.target)}[/]  {escape(run.model)}  {escape(run.load)}")
    _line(out, summary_line(run.tally))
    if run.tally.num_done:
        out.print(times_table(run.tally.times))
    phases = run.tally.mean_phases_ms
    if phases:
        parts = [f"{phase.replace('_', ' ')} {show(value)}" for phase, value in phases.items() if value >= 0.0005]
        _line(out, f"where the time goes (ms, mean of {counted(run.tally.num_receipts, 'receipt')})  " + "  ".join(parts))


def print_findings(out: Console, findings: Sequence[str]) -> None:
    """What a reader must know."""
    for finding in findings:
        _line(out, f"[yellow]note[/]  {escape(finding)}")


def _line(out: Console, text: str) -> None:
    """On one line, however long: a terminal wraps it, and a script finds it."""
    out.print(text, soft_wrap=True)


def counted(count: int, noun: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def summary_line(tally: Tally) -> str:
    """Counts and rates."""
    parts = [
        counted(tally.num_done, "request"),
        counted(tally.num_errors, "error"),
        f"{show(tally.requests_per_s)} requests/s",
        f"{show(tally.tokens_per_s)} output tokens/s",
    ]
    if tally.goal.is_set:
        parts.append(f"goodput {show(tally.goodput)}/s ({tally.good_share:.1%})")
    parts.append(f"in {tally.window_s:.1f} s")
    return "  ".join(parts)


def times_table(times: dict[str, Histogram]) -> Table:
    """Quantiles of all times."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms", no_wrap=True)
    for column in ("mean", *QUANTILES, "max"):
        table.add_column(column, justify="right", min_width=8, no_wrap=True)
    for name, label in LABELS.items():
        histogram = times[name]
        if histogram.count:
            cells = [histogram.mean_ms, *(histogram.quantile_ms(share) for share in QUANTILES.values()), histogram.most_s * 1000]
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
    """A line for each step, and where the knee is. A narrow terminal gets fewer columns, not fewer digits."""
    _line(out, f"[bold]{escape(runs[0].target)}[/]  {escape(runs[0].model)}")
    table = _sweep_table(runs, knee, [])
    if Measurement.get(out, out.options.update(width=_UNLIMITED), table).maximum > out.width:
        table = _sweep_table(runs, knee, ["tok/s", "ITL p50", "ITL p99", "power"])
    out.print(table)
    _line(out, knee_line(runs, knee))


def _sweep_table(runs: Sequence[Run], knee: Knee, left_out: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("load", no_wrap=True)
    rows = [sweep_cells(run) for run in runs]
    for column in rows[0]:
        if column not in left_out:
            table.add_column(column, justify="right", no_wrap=True)
    for number, (run, row) in enumerate(zip(runs, rows, strict=True)):
        cells = [cell for column, cell in row.items() if column not in left_out]
        table.add_row(run.label, *cells, style="bold" if number == knee.index else "")
    return table


def sweep_cells(run: Run) -> dict[str, str]:
    """What each step of a sweep is shown with, by the heading of its column."""
    tally, times = run.tally, run.tally.times
    cells = {"req/s": show(tally.requests_per_s), "tok/s": show(tally.tokens_per_s)}
    for name, short in (("ttft", "TTFT"), ("itl", "ITL"), ("e2e", "e2e")):
        cells |= {f"{short} {word}": show(times[name].quantile_ms(share)) for word, share in (("p50", 0.5), ("p99", 0.99))}
    cells["power"] = show(power(tally))
    if tally.goal.is_set:
        cells["good"] = f"{tally.good_share:.1%}"
    return {**cells, "errors": str(tally.num_errors)}


def knee_line(runs: Sequence[Run], knee: Knee) -> str:
    """Where it is, and by which rule."""
    label = runs[knee.index].label
    found = f"knee at {label}" if knee.is_inside else f"no knee up to {label}: power still rises at the last step"
    if runs[knee.index].tally.goal.is_set:
        good = runs[knee.good_index].label if knee.good_index is not None else "none"
        found += f"; highest step with 99 % of requests within the targets: {good}"
    return f"{found}  ({RULE})"
