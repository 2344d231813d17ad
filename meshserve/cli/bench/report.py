"""The report: one HTML file that needs nothing else. Tables, and the figures with the script that plots them."""

import json
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import meshserve.observe.dashboard
from meshserve.cli.bench.outcome import Outcome
from meshserve.cli.bench.tables import (
    LABELS,
    Figures,
    comparison_figures,
    knee_line,
    summary_line,
    sweep_figures,
    times_figures,
)
from meshserve.telemetry import Histogram

_FOLDER = Path(__file__).parent
_PLOT = Path(meshserve.observe.dashboard.__file__).with_name("plot.js")
_TITLES = {"run": "one run", "compare": "comparison", "sweep": "sweep"}
_MAX_POINTS = 400
"""Of one line of a distribution."""


def report(outcome: Outcome, command: str, now: datetime | None = None) -> str:
    """The file's text. In the file are the very fields of `--json`, for those who look for more than is plotted."""
    fields = outcome.to_dict()
    when = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")
    figures = json.dumps({**fields, "labels": LABELS, "distributions": _distributions(outcome)})
    return Template((_FOLDER / "report.html").read_text()).substitute(
        style=(_FOLDER / "report.css").read_text(),
        title=_TITLES[outcome.kind],
        command=escape(command),
        where=escape(f"{when}, meshserve {fields['meshserve']}, {fields['machine']}"),
        body=_body(outcome),
        notes=_notes(outcome),
        figures=figures.replace("<", "\\u003c"),  # else a name could end the script element
        script=_PLOT.read_text() + (_FOLDER / "report.js").read_text(),
    )


def _distributions(outcome: Outcome) -> list[dict[str, Any]]:
    """All times of each line of a plot: the two sides of a comparison, else the runs."""
    if outcome.kind == "compare":
        series = [(name, outcome.side_times(side)) for side, name in enumerate("AB")]
    else:
        series = [(run.label, run.tally.times) for run in outcome.runs]
    return [
        {"name": name, "times": {kind: _points(found) for kind, found in times.items() if found.count}}
        for name, times in series
    ]


def _points(histogram: Histogram) -> list[tuple[float, float]]:
    steps = [(x, share) for x, share in histogram.steps() if x > 0] or [(1e-6, 1.0)]
    stride = max(1, len(steps) // _MAX_POINTS)
    return [(float(f"{x:.5g}"), round(share, 5)) for x, share in [*steps[::stride], steps[-1]]]


def _body(outcome: Outcome) -> str:
    first = outcome.runs[0] if outcome.runs else None
    if outcome.kind == "compare" or first is None:
        sides = zip("AB", outcome.sides, strict=True)
        named = "".join(f"<p><b>{side}</b> {escape(name)}</p>" for side, name in sides)
        if not outcome.compared:
            return f"{named}<p>Nothing to compare: too few pairs of turns had answers.</p>"
        return named + _table(comparison_figures(outcome.compared))
    where = f"<p><b>{escape(first.target)}</b> {escape(first.model)}</p>"
    if outcome.knee is not None:
        table = _table(sweep_figures(outcome.runs, outcome.knee))
        return f"{where}{table}<p>{escape(knee_line(outcome.runs, outcome.knee))}</p>"
    summary = summary_line(first.tally).replace("  ", ", ")
    table = _table(times_figures(first.tally.times)) if first.tally.num_done else ""
    return f"{where}<p>{escape(first.load)}: {escape(summary)}</p>{table}"


def _notes(outcome: Outcome) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in outcome.main_notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _table(figures: Figures) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in figures.columns)
    lines = []
    for number, row in enumerate(figures.rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        mark = ' class="marked"' if number in figures.marked else ""
        lines.append(f"<tr{mark}>{cells}</tr>")
    body = "".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
