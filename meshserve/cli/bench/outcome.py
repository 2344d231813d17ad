"""Runs as they belong together: one, a comparison, a sweep; and all that is said of them."""

import csv
import itertools
import platform
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TextIO

from meshserve import __version__
from meshserve.cli.bench.compare import Compared, all_times, alternate, compare_runs
from meshserve.cli.bench.histogram import Histogram
from meshserve.cli.bench.live import Live
from meshserve.cli.bench.session import CSV_COLUMNS, Run, Session
from meshserve.cli.bench.settings import Settings
from meshserve.cli.bench.sweep import RULE, Knee, find_knee, power
from meshserve.cli.bench.tables import console, print_comparison, print_findings, print_run, print_sweep
from meshserve.config import MeshConfig

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
    knee: Knee | None = None

    @property
    def notes(self) -> list[str]:
        """What the targets are to be known for, and what the generator found about itself."""
        told = [note for session in self.sessions for note in session.target.notes]
        for run in self.runs:
            told += [*run.findings, *run.advice] if self.kind == "run" else [f"{run.label}: {finding}" for finding in run.findings]
        return list(dict.fromkeys(told))

    @property
    def main_notes(self) -> list[str]:
        """As many of them as a person reads."""
        notes = self.notes
        left = len(notes) - _MAX_NOTES + 1
        return notes if left <= 1 else [*notes[:-left], f"and {left} more, in --json"]

    def side_times(self, side: int) -> dict[str, Histogram]:
        """All times of A (0) or B (1)."""
        return all_times(self.runs[side::2])

    def to_dict(self) -> dict[str, Any]:
        """For `--json`; README.md says what the fields are."""
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


async def _opened(stack: AsyncExitStack, settings: Settings, mesh: MeshConfig) -> Session:
    session = Session(settings, mesh)
    stack.push_async_callback(session.close)
    await session.open()
    return session


async def run_once(stack: AsyncExitStack, settings: Settings, mesh: MeshConfig, live: Live, is_keeping_rows: bool) -> Outcome:
    """One run. Raises StartupFailed if the target cannot be used."""
    session = await _opened(stack, settings, mesh)
    live.begin("", settings.plan)
    run = await session.run("run", watch=live.watch, is_keeping_rows=is_keeping_rows)
    return Outcome("run", [run], [session])


async def run_sweep(
    stack: AsyncExitStack, steps: Sequence[tuple[str, Settings]], mesh: MeshConfig, live: Live, is_keeping_rows: bool
) -> Outcome:
    """A run for each step, on the same connections."""
    session = await _opened(stack, steps[0][1], mesh)
    runs = []
    for label, settings in steps:
        live.begin(label, settings.plan)
        runs.append(await session.run(label, settings, live.watch, is_keeping_rows))
    return Outcome("sweep", runs, [session], knee=find_knee([run.tally for run in runs]))


async def run_comparison(
    stack: AsyncExitStack, sides: Sequence[tuple[str, Settings]], mesh: MeshConfig, num_pairs: int, live: Live, is_keeping_rows: bool
) -> Outcome:
    """Turns of both, in pairs."""
    sessions = [await _opened(stack, settings, mesh) for _, settings in sides]
    a, b = (_turns(name, session, live, is_keeping_rows) for name, session in zip("AB", sessions, strict=True))
    pairs = await alternate(a, b, num_pairs, sides[0][1].seed)
    compared = compare_runs([(one.tally, other.tally) for one, other in pairs])
    return Outcome("compare", [run for pair in pairs for run in pair], sessions, tuple(spec for spec, _ in sides), compared)


def _turns(name: str, session: Session, live: Live, is_keeping_rows: bool) -> Callable[[], Awaitable[Run]]:
    numbers = itertools.count(1)

    async def turn() -> Run:
        live.begin(f"{name} {session.target.name}", session.settings.plan)
        return await session.run(f"{name}{next(numbers)}", watch=live.watch, is_keeping_rows=is_keeping_rows)

    return turn
