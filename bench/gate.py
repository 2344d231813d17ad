"""`python -m bench.gate [--update]`: whether the mesh fell back against its floors, as ratios: the check of the CI.

Short forms of `bench.hop` and `bench.overhead`, compared with what `bench/gate.json` holds. Only ratios count, each of the mesh to
its floor in turn on the same machine within seconds: absolute times say more about the machine than about the mesh. It fails if a whole
95 % interval lies beyond the bar, twice, the second time with more pairs: noise alone hardly does that.
"""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import click

from bench import hop
from bench.ratios import measure
from bench.systems import FloorSystem, MeshSystem
from bench.wrk import SCENARIOS
from meshserve.cli.bench.compare import Ratio

COMMITTED = Path(__file__).with_name("gate.json")
_TOLERANCE = 0.3
_PAIRS, _PAIRS_AGAIN, _PAIRS_UPDATE = 8, 20, 20
_TURN_S = 1.0
_WIDE = 1.4
_HOP_CALLS = 600


@dataclass(frozen=True, slots=True)
class Figure:
    """One ratio to a floor that must not get worse."""

    name: str
    is_time: bool
    """Of times, where less is better; else of rates."""
    scenario: str | None = None
    """Of `bench.overhead`; None: `bench.hop`."""
    key: str = "ratio"
    """Where that benchmark's findings have it."""


HOP = Figure("hop p50", True)
FIGURES = (
    HOP,
    Figure("unary1_c1 p50", True, "unary1_c1", "p50_ms_ratio"),
    Figure("stream32_c32 requests/s", False, "stream32_c32", "requests_per_s_ratio"),
)


class Verdict(StrEnum):
    """On one figure."""

    HOLDS = "holds"
    UNCLEAR = "unclear"
    """The median lies beyond the bar, but not the whole interval: no reason to fail."""
    FELL = "fell"


def bar_of(figure: Figure, committed: float, tolerance: float) -> float:
    """The worst ratio that is let pass. Speed falls by the tolerance when a rate is multiplied, or a time divided, by what is left."""
    return committed / (1 - tolerance) if figure.is_time else committed * (1 - tolerance)


def judge(figure: Figure, seen: Ratio, committed: float, tolerance: float) -> Verdict:
    """Fell only if the whole interval lies beyond the bar."""
    bar = bar_of(figure, committed, tolerance)
    median, best = (-seen.median, -seen.low) if figure.is_time else (seen.median, seen.high)
    bar = -bar if figure.is_time else bar
    if best < bar:
        return Verdict.FELL
    return Verdict.UNCLEAR if median < bar else Verdict.HOLDS


def look(figures: Sequence[Figure], num_pairs: int) -> dict[str, Ratio]:
    """Measure these. Raises ClickException where something answers in errors, or wrk is missing."""
    found: dict[str, Ratio] = {}
    if HOP in figures:
        found[HOP.name] = Ratio(**hop.run(num_pairs, _HOP_CALLS)[HOP.key])
    wanted = {figure.scenario: figure for figure in figures if figure is not HOP}
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in wanted]
    seen = measure(lambda step_ms: [FloorSystem(step_ms), MeshSystem(step_ms)], scenarios, num_pairs, _TURN_S, lambda name: None)
    for name, systems in seen["scenarios"].items():
        if any(system["errors"] for system in systems.values()):
            raise click.ClickException(f"{name}: requests ended in errors")
        *_, mesh = systems.values()
        found[wanted[name].name] = Ratio(**mesh[wanted[name].key])
    return found


def update() -> None:
    """Write what is seen now as what is to be kept."""
    ratios = {name: ratio.to_dict() for name, ratio in look(FIGURES, _PAIRS_UPDATE).items()}
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    how = f"python -m bench.gate --update, {_PAIRS_UPDATE} pairs, turns of {_TURN_S:g} s, on {machine}"
    COMMITTED.write_text(json.dumps({"made": how, "tolerance": _TOLERANCE, "ratios": ratios}, indent=1) + "\n")
    for name, ratio in ratios.items():
        is_wide = ratio["high"] > _WIDE * ratio["low"]
        hint = ", too wide to keep: try again when the machine has nothing else to do" if is_wide else ""
        click.echo(f"{name:24} {ratio['median']:7.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}){hint}")


def check() -> bool:
    """Measure, those that seem to have fallen once more with more pairs, and print a table. False if one fell."""
    committed = json.loads(COMMITTED.read_text())
    tolerance = float(committed["tolerance"])
    medians = {name: float(ratio["median"]) for name, ratio in committed["ratios"].items()}
    figures: Sequence[Figure] = FIGURES
    for num_pairs in (_PAIRS, _PAIRS_AGAIN):
        seen = look(figures, num_pairs)
        verdicts = {figure: judge(figure, seen[figure.name], medians[figure.name], tolerance) for figure in figures}
        for figure, verdict in verdicts.items():
            click.echo(_line(figure, seen[figure.name], medians[figure.name], tolerance, verdict))
        figures = [figure for figure, verdict in verdicts.items() if verdict is Verdict.FELL]
        if not figures:
            return True
    return False


def _line(figure: Figure, seen: Ratio, committed: float, tolerance: float, verdict: Verdict) -> str:
    limit = f"{'at most' if figure.is_time else 'at least'} {bar_of(figure, committed, tolerance):.3f}"
    interval = f"({seen.low:.3f} to {seen.high:.3f}, {seen.num_pairs:.0f} pairs)"
    return f"{figure.name:24} {seen.median:7.3f} of its floor {interval:30} committed {committed:.3f}, {limit}: {verdict}"


@click.command()
@click.option("--update", "is_update", is_flag=True, help="Keep what is measured now as what later runs are compared with.")
def main(is_update: bool) -> None:
    """Fail if the mesh's ratio to a floor fell by more than is tolerated."""
    if is_update:
        update()
    elif not check():
        click.echo("slower than committed, by more than is tolerated; if that is meant: python -m bench.gate --update", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
