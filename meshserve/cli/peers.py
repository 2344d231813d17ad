"""`meshserve peers`: who is in the mesh."""

import asyncio
import json
import sys
from typing import Any

import click

from meshserve.cli.options import mesh_config, mesh_options, option
from meshserve.cli.running import execute

_WATCH_INTERVAL_S = 1.0
_SETTLE_S = 0.3
_GIVE_UP_S = 3.0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
@option("--watch", is_flag=True, help="Again every second, until interrupted.")
@mesh_options
def peers(as_json: bool, watch: bool, **settings: Any) -> None:
    """Show who is in the mesh: name, roles, model, address, state, load, round trip."""
    execute(settings, lambda: _show(settings, as_json, watch))


async def _show(settings: dict[str, Any], as_json: bool, is_watching: bool) -> int:
    from meshserve.cli.observing import observer
    from meshserve.observe.status import list_peers

    async with observer(mesh_config(settings)) as mesh:
        await _settle(mesh)
        while True:
            found = await list_peers(mesh)
            if as_json:
                click.echo(json.dumps(found, indent=None if is_watching else 1))
            else:
                _print_table(found, settings["mesh"], is_watching)
            if not is_watching:
                return 0 if found else 1
            await asyncio.sleep(_WATCH_INTERVAL_S)


async def _settle(mesh: Any) -> None:
    """Until no new peer was found for a moment, or nobody at all for three seconds."""
    began_s = last_s = mesh.now_s()
    num_known = 0
    while True:
        await asyncio.sleep(0.02)
        now_s = mesh.now_s()
        num_linked = sum(member.is_callable for member in mesh.links.membership.listed())
        if num_linked != num_known:
            num_known, last_s = num_linked, now_s
        if now_s - began_s > _GIVE_UP_S or (num_known and now_s - last_s > _SETTLE_S):
            return


def _print_table(found: list[dict[str, Any]], mesh: str, is_watching: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("NAME", "ROLES", "MODEL", "ADDRESS", "STATE", "RUNNING", "WAITING", "BLOCKS", "RTT"):
        table.add_column(column, justify="right" if column in ("RUNNING", "WAITING", "BLOCKS", "RTT") else "left", overflow="fold")
    for peer in found:
        load = peer["load"] or {}
        colour = {"alive": "green", "suspect": "yellow"}.get(peer["state"], "dim")
        table.add_row(
            peer["name"],
            ",".join(peer["roles"]),
            peer["model"] or "-",
            peer["address"].removeprefix("tcp://"),
            f"[{colour}]{peer['state']}[/]",
            str(load.get("num_running", "-")),
            str(load["num_waiting"] + load["num_tickets"] if load else "-"),
            str(load["used_blocks"] + load["cached_blocks"] if load else "-"),
            f"{peer['rtt_ms']:.1f} ms" if peer["rtt_ms"] is not None else "-",
        )
    if is_watching and console.is_terminal:
        console.clear()
    if found:
        console.print(table)
    else:
        console.print(f"no peer of mesh {mesh!r} found; try --peer HOST with the address of one")
