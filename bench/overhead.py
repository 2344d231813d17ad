"""`python -m bench.overhead [--json]`: what meshserve adds to the floor, `bench.floor`, under the same load in turn.

The price of all that the floor does without: checks, tokenizing, hashing, routing, reservations, streams with deadlines, spans, metrics.
"""

import json

import click

from bench.ratios import measure, show
from bench.systems import FloorSystem, MeshSystem, System
from bench.wrk import SCENARIOS


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--rounds", default=10, show_default=True, help="Turns of each system in each scenario.")
@click.option("--seconds", default=2.0, show_default=True, help="Of each turn; a paced one lasts at least four answers.")
@click.option("--scenario", "names", multiple=True, type=click.Choice([scenario.name for scenario in SCENARIOS]), help="Only these.")
@click.option("--disaggregated/--no-disaggregated", default=True, show_default=True, help="Also with a prefill worker for every prompt.")
@click.option("--option", "options", multiple=True, help="For every meshserve peer, as --option=--no-observe.")
def main(as_json: bool, rounds: int, seconds: float, names: tuple[str, ...], disaggregated: bool, options: tuple[str, ...]) -> None:
    """Measure, and print ratios with their 95 % intervals."""

    def build(step_ms: float) -> list[System]:
        both = (False, True) if disaggregated else (False,)
        return [FloorSystem(step_ms), *(MeshSystem(step_ms, is_disaggregated, options) for is_disaggregated in both)]

    scenarios = [scenario for scenario in SCENARIOS if not names or scenario.name in names]
    found = measure(build, scenarios, rounds, seconds, lambda name: click.echo(f"{name} ...", err=True))
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
