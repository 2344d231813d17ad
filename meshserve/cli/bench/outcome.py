"""Runs as they belong together: one, a comparison, a sweep; and all that is said of them."""

import csv
import platform
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TextIO

from meshserve import __version__
from meshserve.cli.bench.compare import Compared, compare_runs, left_out
from meshserve.cli.bench.live import Live
from meshserve.cli.bench.load import Stop
from meshserve.cli.bench.options import Settings
from meshserve.cli.bench.session import CSV_COLUMNS, Run, Session
from meshserve.cli.bench.sweep import RULE, Knee, find_knee, power
from meshserve.cli.bench.tables import console, print_comparison, print_findings, print_run, print_sweep
from meshserve.cli.bench.tally import TIMES, fine_histogram
from meshserve.config import MeshConfig
from meshserve.telemetry import Histogram

SCHEMA = 1
_MAX_NOTES = 6


@dataclass(slots=True)
class Outcome:
    """What a command found out."""

    kind: str
    """`run`, `compare` or `sweep`."""
    runs: list[Run]
    sessions: list[Session]
    sides: tuple[str, ...] = ()
    """A and B of a comparison, whose runs take turns: A's first in each pair here, whatever the order was."""
    compared: list[Compared] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Of a comparison: what could not be compared, and why."""
    knee: Knee | None = None
    interruption: str = ""
    """What a user who ended it early must know."""

    @property
    def notes(self) -> list[str]:
        """What the targets are to be known for, and what the generator found about itself."""
        told = [self.interruption, *self.left_out] if self.interruption else [*self.left_out]
        told += [note for session in self.sessions for note in session.target.notes]
        for run in self.runs:
            told += [*run.findings, *run.advice] if self.kind == "run" else [f"{run.label}: {finding}" for finding in run.findings]
        return list(dict.fromkeys(told))

    @property
    def is_answered(self) -> bool:
        """Whether there is anything to show; of a comparison, whether of both sides."""
        sides = [self.runs[0::2], self.runs[1::2]] if self.kind == "compare" else [self.runs]
        return all(any(run.tally.num_done for run in side) for side in sides)

    @property
    def main_notes(self) -> list[str]:
        """As many of them as a person reads."""
        notes = self.notes
        left = len(notes) - _MAX_NOTES + 1
        return notes if left <= 1 else [*notes[:-left], f"and {left} more, in --json"]

    def side_times(self, side: int) -> dict[str, Histogram]:
        """All times of A (0) or B (1)."""
        merged = {name: fine_histogram() for name in TIMES}
        for run in self.runs[side::2]:
            for name, histogram in run.tally.times.items():
                merged[name].add(histogram)
        return merged

    def to_dict(self) -> dict[str, Any]:
        """For `--json`; docs/measuring.md says what the fields are."""
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": self.kind,
            "meshserve": __version__,
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "runs": [run.to_dict() for run in self.runs],
            "notes": self.notes,
        }
        if self.kind == "compare":
            found["sides"] = dict(zip("AB", self.sides, strict=True))
            found["ratios"] = {
                one.name: {"A": round(one.a, 4), "B": round(one.b, 4), **one.ratio.to_dict(), "verdict": one.verdict}
                for one in self.compared
            }
        if self.knee is not None:
            good = self.knee.good_index
            found["knee"] = {
                "rule": RULE,
                "at": self.runs[self.knee.index].label,
                "is_inside": self.knee.is_inside,
                "power": [round(power(run.tally), 4) for run in self.runs],
                "highest_within_targets": None if good is None else self.runs[good].label,
            }
        return found

    def write_rows(self, file: TextIO) -> None:
        """As CSV; those of A before those of B."""
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for session in self.sessions:
            writer.writerows(session.rows())

    def print(self) -> None:
        """As tables, to stdout."""
        out = console()
        if self.kind == "compare":
            print_comparison(out, self.sides[0], self.sides[1], self.compared)
        elif self.knee is not None:
            print_sweep(out, self.runs, self.knee)
        else:
            print_run(out, self.runs[0])
        print_findings(out, self.main_notes)


Sides = Sequence[tuple[str, Settings]]
"""Loads with their labels."""


async def measure(
    kind: str,
    sides: Sides,
    num_pairs: int,
    mesh: MeshConfig,
    stop: Stop,
    is_keeping_rows: bool,
) -> Outcome:
    """All runs of a command. Raises StartupFailed if a target cannot be used."""
    num_runs = 2 * num_pairs if kind == "compare" else len(sides)
    async with AsyncExitStack() as stack:
        live = stack.enter_context(Live(num_runs))
        sessions = []
        # the steps of a sweep go to one target, over the same connections
        for _, settings in sides if kind == "compare" else sides[:1]:
            session = Session(settings, mesh, live, stop, is_keeping_rows)
            stack.push_async_callback(session.close)
            await session.open()
            sessions.append(session)
        with stop:
            if kind == "compare":
                return await _compare(sessions, sides, num_pairs, stop)
            if kind == "sweep":
                return await _sweep(sessions[0], sides, stop)
            return Outcome(kind, [await sessions[0].run("run", "", sides[0][1])], sessions)


async def _sweep(session: Session, steps: Sides, stop: Stop) -> Outcome:
    runs: list[Run] = []
    for label, settings in steps:
        runs.append(await session.run(label, label, settings))
        if stop.is_asked:
            break
    if stop.is_asked and len(runs) > 1 and not runs[-1].tally.num_done:
        del runs[-1]
    knee = find_knee([run.tally for run in runs])
    told = f"interrupted: {len(runs)} of {len(steps)} steps are shown" if stop.is_asked else ""
    return Outcome("sweep", runs, [session], knee=knee, interruption=told)


async def _compare(sessions: list[Session], sides: Sides, num_pairs: int, stop: Stop) -> Outcome:
    """Turns in pairs. Which of a pair comes first is drawn, so that a drift favours neither; one that was stopped is left out."""
    rng = random.Random(f"order {sides[0][1].seed}")
    pairs: list[tuple[Run, Run]] = []
    while len(pairs) < num_pairs and not stop.is_asked:
        order = (0, 1) if rng.random() < 0.5 else (1, 0)
        runs = {}
        for side in order:
            name, session = "AB"[side], sessions[side]
            label, shown = f"{name}{len(pairs) + 1}", f"{name} {session.target.name}"
            runs[side] = await session.run(label, shown, sides[side][1])
        if not stop.is_asked:
            pairs.append((runs[0], runs[1]))
    tallies = [(one.tally, other.tally) for one, other in pairs]
    return Outcome(
        "compare",
        [run for pair in pairs for run in pair],
        sessions,
        tuple(label for label, _ in sides),
        compare_runs(tallies),
        left_out(tallies),
        interruption=f"interrupted after {len(pairs)} of {num_pairs} pairs" if stop.is_asked else "",
    )
