"""Figures as tables: for a terminal, for a file in fixed width, and for the report."""

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from meshserve.cli.bench.compare import Compared
from meshserve.cli.bench.session import Run
from meshserve.cli.bench.sweep import RULE, Knee, power
from meshserve.cli.bench.tally import Tally
from meshserve.cli.columns import Output
from meshserve.telemetry import QUANTILES, Histogram

LABELS = {
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "tpot": "time per output token",
    "e2e": "end-to-end latency",
    "queue": "send delay",
}
_WIDTH, _UNLIMITED = 160, 10_000
_DISPENSABLE = ("tok/s", "ITL p50", "ITL p99", "power")
"""Columns of a sweep that a narrow terminal does not show."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A table. The first column is to the left, numbers to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Collection[int] = ()
    """Rows that stand out."""


def times_figures(times: Mapping[str, Histogram]) -> Figures:
    """Quantiles of all times of a run, in milliseconds."""
    rows = []
    for name, label in LABELS.items():
        if (histogram := times[name]).count:
            quantiles = (histogram.quantile_ms(share) for share in QUANTILES.values())
            values = (histogram.mean_ms, *quantiles, histogram.most_s * 1000)
            rows.append([label, *map(show, values)])
    return Figures(["ms", "mean", *QUANTILES, "max"], rows)


def comparison_figures(compared: Sequence[Compared]) -> Figures:
    """Ratios with their intervals; those that differ are marked."""
    rows = []
    for one in compared:
        interval = f"{one.ratio.low:.3f} to {one.ratio.high:.3f}"
        ratio = f"{one.ratio.median:.3f}"
        rows.append([one.name, show(one.a), show(one.b), ratio, interval, one.verdict])
    marked = [row for row, one in enumerate(compared) if one.ratio.is_different]
    return Figures(["", "A", "B", "B / A", "95 % interval", "verdict"], rows, marked)


def sweep_figures(runs: Sequence[Run], knee: Knee, left_out: Collection[str] = ()) -> Figures:
    """A row for each step; the knee is marked."""
    steps = [_sweep_cells(run) for run in runs]
    columns = [name for name in steps[0] if name not in left_out]
    return Figures(columns, [[step[name] for name in columns] for step in steps], [knee.index])


def _sweep_cells(run: Run) -> dict[str, str]:
    tally, times = run.tally, run.tally.times
    cells = {
        "load": run.label,
        "req/s": show(tally.requests_per_s),
        "tok/s": show(tally.tokens_per_s),
    }
    for name, short in (("ttft", "TTFT"), ("itl", "ITL"), ("e2e", "e2e")):
        for word in ("p50", "p99"):
            cells[f"{short} {word}"] = show(times[name].quantile_ms(QUANTILES[word]))
    cells["power"] = show(power(tally))
    if tally.goal.is_set:
        cells["good"] = f"{tally.good_share:.1%}"
    return {**cells, "errors": str(tally.num_errors)}


def _table(figures: Figures, min_width: int = 0) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(figures.columns):
        is_text = number == 0 or column == "verdict"
        justify: JustifyMethod = "left" if is_text else "right"
        width = 0 if is_text else min_width
        table.add_column(column, justify=justify, min_width=width, no_wrap=True)
    for number, row in enumerate(figures.rows):
        table.add_row(*row, style="bold" if number in figures.marked else "")
    return table


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
        out.print(_table(times_figures(run.tally.times), min_width=8))
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


def print_comparison(out: Console, a: str, b: str, compared: Sequence[Compared]) -> None:
    """Ratios with their intervals."""
    _line(out, f"[bold]A[/] {escape(a)}\n[bold]B[/] {escape(b)}")
    if not compared:
        out.print("nothing to compare: too few pairs of turns had answers")
        return
    out.print(_table(comparison_figures(compared)))
    num_pairs = max(one.ratio.num_pairs for one in compared)
    words = "pairs of turns, times in ms; of figures that do not differ, one in twenty or fewer is called different by chance"
    _line(out, f"{num_pairs} {words}")
    if not any(one.ratio.is_different for one in compared):
        _line(out, "[bold]A and B cannot be told apart by any figure.[/] More or longer turns (--pairs, --duration) narrow the intervals.")


def print_sweep(out: Console, runs: Sequence[Run], knee: Knee) -> None:
    """A line for each step, and where the knee is. A narrow terminal gets fewer columns, not fewer digits."""
    _line(out, f"[bold]{escape(runs[0].target)}[/]  {escape(runs[0].model)}")
    table = _table(sweep_figures(runs, knee))
    if Measurement.get(out, out.options.update(width=_UNLIMITED), table).maximum > out.width:
        table = _table(sweep_figures(runs, knee, _DISPENSABLE))
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
