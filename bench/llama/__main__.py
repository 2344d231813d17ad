"""`python -m bench.llama [--json] [ROW ...]`: meshserve against llama.cpp's own server, same library, same model, in turn.

Each server has one thread for the model and a core of its own. Their command lines are part of the result.
"""

import json
from pathlib import Path
from typing import Any

import click

from bench.llama.rows import ROWS, Size
from meshserve.engines.models.resolving import resolve


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--model", default="smollm2", show_default=True)
@click.option("--pairs", default=10, show_default=True, help="Alternations of each row that has them.")
@click.option("--minutes", default=5.0, show_default=True, help="Of the row `separation`.")
@click.option(
    "--prompt-every",
    default=5.0,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="Seconds from one long prompt of the row `separation` to the next. On a slow machine 5 is more than it can compute.",
)
@click.argument("rows", nargs=-1, type=click.Choice(list(ROWS)))
def main(as_json: bool, model: str, pairs: int, minutes: float, prompt_every: float, rows: tuple[str, ...]) -> None:
    """All rows, or those that are named."""
    source = resolve(model, lambda line: click.echo(line, err=True))
    found: dict[str, Any] = {}
    for name in rows or ROWS:
        found[name] = ROWS[name](Path(source.path), Size(pairs, minutes, prompt_every))
        figures = {key: value for key, value in found[name].items() if not key.startswith("command")}
        click.echo(f"{name}: {json.dumps(figures)}", err=as_json)
    if as_json:
        click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
