"""The page: what was run, what came of it, as one file that needs nothing else."""

from datetime import UTC, datetime
from html import escape

from meshserve.cli.bench.outcome import Outcome
from meshserve.cli.bench.report.plots import plots
from meshserve.cli.bench.report.style import STYLE
from meshserve.cli.bench.session import Run
from meshserve.cli.bench.tables import (
    Figures,
    comparison_figures,
    counted,
    knee_line,
    show,
    summary_line,
    sweep_figures,
    times_figures,
)


def page(outcome: Outcome, command: str, now: datetime | None = None) -> str:
    """HTML with its style and plots in it."""
    fields = outcome.to_dict()
    when = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")
    where = f"{when}, meshserve {fields['meshserve']}, {fields['machine']}"
    title = {"run": "One run", "compare": "Comparison", "sweep": "Sweep"}[outcome.kind]
    parts = [
        f"<h1>meshserve bench: {title.lower()}</h1>",
        f'<p class="meta"><code>{escape(command)}</code><br>{escape(where)}</p>',
        _body(outcome),
        _notes(outcome),
        f'<div class="plots">{"".join(plots(outcome))}</div>',
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<title>meshserve bench</title><style>{STYLE}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _body(outcome: Outcome) -> str:
    if outcome.kind == "compare":
        return _comparison(outcome)
    if outcome.knee is not None:
        table = _table(sweep_figures(outcome.runs, outcome.knee))
        return f"{_where(outcome.runs[0])}{table}<p>{escape(knee_line(outcome.runs, outcome.knee))}</p>"
    run = outcome.runs[0]
    line = f"<p>{escape(run.load)}: {escape(summary_line(run.tally).replace('  ', ', '))}</p>"
    return f"{_where(run)}{line}{_table(times_figures(run.tally.times)) if run.tally.num_done else ''}{_phases(run)}"


def _where(run: Run) -> str:
    return f"<p><b>{escape(run.target)}</b> {escape(run.model)}</p>"


def _phases(run: Run) -> str:
    """Where the time of a mesh's requests goes, as one bar."""
    phases = {phase: value for phase, value in run.tally.mean_phases_ms.items() if value >= 0.0005}
    total = sum(phases.values())
    if not total:
        return ""
    bar, keys = [], []
    for number, (phase, value) in enumerate(phases.items()):
        colour = f"c{number % 8 + 1}"
        bar.append(f'<span class="part {colour}" style="width:{value / total:.2%}"></span>')
        keys.append(f'<span class="key {colour}">{escape(phase.replace("_", " "))} {show(value)}</span>')
    words = f"Where the time goes: ms, mean of {counted(run.tally.num_receipts, 'receipt')}"
    return f'<h2>{words}</h2><div class="bar">{"".join(bar)}</div><p class="keys">{"".join(keys)}</p>'


def _comparison(outcome: Outcome) -> str:
    sides = "".join(f"<p><b>{side}</b> {escape(name)}</p>" for side, name in zip("AB", outcome.sides, strict=True))
    if not outcome.compared:
        return f"{sides}<p>Nothing to compare: too few pairs of turns had answers.</p>"
    return sides + _table(comparison_figures(outcome.compared))


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
