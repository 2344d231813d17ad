"""`python -m bench.observing [--json]`: what spans and metrics cost: the mesh against one with `--no-observe`, under wrk in turn."""

import json

import click

from bench.ratios import measure, show
from bench.systems import MeshSystem, System
from bench.wrk import SCENARIOS


class _Mesh(MeshSystem):
    """Both are aggregated: a handed-over prompt costs so much more that spans would not show."""

    def __init__(self, step_ms: float, name: str, *options: str) -> None:
        super().__init__(step_ms, options=options)
        self.name = name


def build(step_ms: float) -> list[System]:
    """The first is what the other is compared with."""
    return [_Mesh(step_ms, "without", "--no-observe"), _Mesh(step_ms, "observed")]


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--rounds", default=10, show_default=True, help="Turns of each.")
@click.option("--seconds", default=3.0, show_default=True, help="Of each turn.")
@click.option("--scenario", default="stream32_c32", show_default=True, type=click.Choice([scenario.name for scenario in SCENARIOS]))
def main(as_json: bool, rounds: int, seconds: float, scenario: str) -> None:
    """Measure, and print the ratios with their 95 % intervals."""
    found = measure(build, [known for known in SCENARIOS if known.name == scenario], rounds, seconds, lambda name: None)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
