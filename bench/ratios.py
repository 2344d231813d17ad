"""Systems under the same load in turn, and how each compares with the first, scenario by scenario."""

import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from bench.systems import System, running
from bench.wrk import Found, Scenario, load
from meshserve.cli.bench.compare import ratio_of

_WARMUP_S = 1.0


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
    first = turns[systems[0].name]
    found: dict[str, Any] = {}
    for system in systems:
        own = turns[system.name]
        figures: dict[str, Any] = {
            "requests_per_s": round(_median(seen.requests_per_s for seen, _ in own), 1),
            "p50_ms": round(_median(seen.p50_ms for seen, _ in own), 4),
            "cpu_us_per_token": round(_median(cpu_us for _, cpu_us in own), 2),
            "errors": sum(seen.num_errors for seen, _ in own),
        }
        if own is not first:
            for name, values, base in (
                ("requests_per_s", [seen.requests_per_s for seen, _ in own], [seen.requests_per_s for seen, _ in first]),
                ("p50_ms", [seen.p50_ms for seen, _ in own], [seen.p50_ms for seen, _ in first]),
                ("cpu_us_per_token", [cpu_us for _, cpu_us in own], [cpu_us for _, cpu_us in first]),
            ):
                figures[f"{name}_ratio"] = ratio_of(values, [max(value, 1e-9) for value in base]).to_dict()
        found[system.name] = figures
    return found


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def show(found: dict[str, Any]) -> None:
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
                    interval = f"{ratio['low']:.3f} to {ratio['high']:.3f}, {ratio['num_pairs']:.0f} pairs"
                    click.echo(f"{'':14} {figure:24} {ratio['median']:10.3f} x   ({interval})")
    click.echo("ready after    " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found["ready_s"].items()))
