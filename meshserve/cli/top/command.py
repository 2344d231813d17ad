"""The command."""

from typing import Any

import click

from meshserve.cli.options import mesh_config, mesh_options, option
from meshserve.cli.running import execute


@click.command()
@option("--interval", type=click.FloatRange(0.2, 60), default=1.0, help="Seconds between two looks.")
@mesh_options
def top(interval: float, **settings: Any) -> None:
    """Watch what every peer is doing: batch, queue, cache, tokens a second, latencies. `q` quits."""
    execute(settings, lambda: _top(settings, interval))


async def _top(settings: dict[str, Any], interval_s: float) -> int:
    from meshserve.cli.observing import observer, settle
    from meshserve.cli.terminal import run_view
    from meshserve.cli.top.view import TopView

    async with observer(mesh_config(settings)) as mesh:
        await settle(mesh)
        await run_view(TopView(mesh), interval_s)
    return 0
