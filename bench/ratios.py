"""Systems under the same load in turn, and how each compares with the first, scenario by scenario."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import click

from bench.systems import System, running
from bench.wrk import SCENARIOS, Found, Scenario, load
from meshserve.cli.bench.compare import ratio_of
from meshserve.cli.options import together

_WARMUP_S = 1.0

json_option = click.option("--json", "as_json", is_flag=True)
load_options = together(
    json_option,
    click.option("--rounds", default=10, show_default=True, help="Turns of each system in each scenario."),
    click.option("--seconds", default=2.0, show_default=True, help="Of each turn; a paced one lasts at least four answers."),
    click.option("--scenario", "names", multiple=True, type=click.Choice([scenario.name for scenario in SCENARIOS]), help="Only these."),
)
"""Of a command that ends in :func:`report`."""


def report(
    build: Callable[[float], list[System]],
    as_json: bool,
    rounds: int,
    seconds: float,
    names: tuple[str, ...],
    **more: Any,
) -> None:
    """Measure the systems in turn, and print their figures, those of the later ones as ratios to the first."""
    scenarios = [scenario for scenario in SCENARIOS if not names or scenario.name in names]
    found = measure(build, scenarios, rounds, seconds, lambda name: click.echo(f"{name} ...", err=True))
    if as_json:
        click.echo(json.dumps({**more, **found}, indent=1))
    else:
        _show(found)


def interval(ratio: Mapping[str, float]) -> str:
    """The interval of a ratio, as :meth:`Ratio.to_dict` gives it, in words."""
    low, high, num_pairs = ratio["low"], ratio["high"], ratio["num_pairs"]
    return f"95 % interval {low:.3f} to {high:.3f}, {num_pairs:.0f} pairs"


def measure(
    build: Callable[[float], list[System]], scenarios: Sequence[Scenario], num_rounds: int, seconds: float, told: Callable[[str], None]
) -> dict[str, Any]:
    """For each scenario: what the systems showed, and the ratios of the later ones to the first, with intervals."""
    found: dict[str, Any] = {"ready_s": {}, "scenarios": {}}
    for step_ms in sorted({scenario.step_ms for scenario in scenarios}):
        systems = build(step_ms)
        with running(systems):
            found["ready_s"].update({system.name: round(system.ready_s, 3) for system in systems})
            for scenario in scenarios:
                if scenario.step_ms == step_ms:
                    told(scenario.name)
                    found["scenarios"][scenario.name] = _scenario(systems, scenario, num_rounds, seconds)
    return found


def _scenario(systems: Sequence[System], scenario: Scenario, num_rounds: int, seconds: float) -> dict[str, Any]:
    # a paced answer takes its time: turns must be long against it
    seconds = max(seconds, 4 * scenario.num_tokens * scenario.step_ms / 1000)
    turns: dict[str, list[tuple[Found, float]]] = {system.name: [] for system in systems}
    for system in systems:
        load(system.url, system.model, scenario, _WARMUP_S)
    rng = random.Random(0)
    for _ in range(num_rounds):
        for system in rng.sample(systems, len(systems)):
            before = system.cpu_s()
            seen = load(system.url, system.model, scenario, seconds)
            cpu_us = (system.cpu_s() - before) * 1e6 / max(1, seen.num_requests * scenario.num_tokens)
            turns[system.name].append((seen, cpu_us))
    return _figures(systems, turns)


def _figures(systems: Sequence[System], turns: dict[str, list[tuple[Found, float]]]) -> dict[str, Any]:
    values = {
        system.name: {
            "requests_per_s": [seen.requests_per_s for seen, _ in turns[system.name]],
            "p50_ms": [seen.p50_ms for seen, _ in turns[system.name]],
            "cpu_us_per_token": [cpu_us for _, cpu_us in turns[system.name]],
        }
        for system in systems
    }
    first, *_ = values.values()
    found: dict[str, Any] = {}
    for name, own in values.items():
        found[name] = {figure: round(median(seen), 4) for figure, seen in own.items()}
        found[name]["errors"] = sum(seen.num_errors for seen, _ in turns[name])
        if own is not first:
            for figure, seen in own.items():
                base = [max(value, 1e-9) for value in first[figure]]
                found[name][f"{figure}_ratio"] = ratio_of(seen, base).to_dict()
    return found


def _show(found: dict[str, Any]) -> None:
    """As lines: each system's figures, and its ratios to the first with their intervals."""
    for name, systems in found["scenarios"].items():
        for system, figures in systems.items():
            click.echo(
                f"{name:14} {system:24} {figures['requests_per_s']:10,.1f} /s {figures['p50_ms']:10.3f} ms "
                f"{figures['cpu_us_per_token']:8.2f} us/token {figures['errors']} errors"
            )
            for figure in ("requests_per_s", "p50_ms", "cpu_us_per_token"):
                ratio = figures.get(f"{figure}_ratio")
                if ratio is not None:
                    click.echo(f"{'':14} {figure:24} {ratio['median']:10.3f} x   ({interval(ratio)})")
    click.echo("ready after    " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found["ready_s"].items()))
