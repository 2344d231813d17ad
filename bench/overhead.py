"""`python -m bench.overhead [--json]`: what meshserve adds to the floor, `bench.floor`, under the same load in turn.

The price of all that the floor does without: checks, tokenizing, hashing, routing, reservations,
streams with deadlines, spans, metrics. With `--observing`: the price of spans and metrics alone.
With `--before DIRECTORY`: what a change costs or brings, this code against another checkout's.
"""

from pathlib import Path

import click

from bench.ratios import load_options, report
from bench.systems import FloorSystem, MeshSystem, System


@click.command()
@load_options
@click.option("--disaggregated/--no-disaggregated", default=True, show_default=True, help="Also with a prefill worker for every prompt.")
@click.option("--option", "options", multiple=True, help="For every meshserve peer, as --option=--no-observe.")
@click.option("--observing", is_flag=True, help="The mesh against one with --no-observe instead, both aggregated.")
@click.option(
    "--before",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    help="A checkout of the code before a change: this mesh against its mesh instead, both aggregated.",
)
def main(
    as_json: bool,
    rounds: int,
    seconds: float,
    names: tuple[str, ...],
    disaggregated: bool,
    options: tuple[str, ...],
    observing: bool,
    before: Path | None,
) -> None:
    """Measure, and print ratios with their 95 % intervals."""

    def build(step_ms: float) -> list[System]:
        if before is not None:
            then, now = MeshSystem(step_ms, options=options, checkout=before), MeshSystem(step_ms, options=options)
            then.name, now.name = "before", "now"
            return [then, now]
        if observing:
            # aggregated: a handed-over prompt costs so much more that spans would not show
            without = MeshSystem(step_ms, options=(*options, "--no-observe"))
            observed = MeshSystem(step_ms, options=options)
            without.name, observed.name = "without", "observed"
            return [without, observed]
        both = (False, True) if disaggregated else (False,)
        return [FloorSystem(step_ms), *(MeshSystem(step_ms, is_disaggregated, options) for is_disaggregated in both)]

    report(build, as_json, rounds, seconds, names)


if __name__ == "__main__":
    main()
