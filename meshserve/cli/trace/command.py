"""The command."""

import json
from typing import Any

import click

from meshserve.cli.options import mesh_config, mesh_options
from meshserve.cli.running import execute, leave
from meshserve.errors import UsageError


@click.command()
@click.argument("request_id", required=False)
@click.option("--last", "is_last", is_flag=True, help="The request that ended last, whoever asked.")
@click.option("--json", "as_json", is_flag=True, help="The receipt as JSON.")
@mesh_options
def trace(request_id: str | None, is_last: bool, as_json: bool, **settings: Any) -> None:
    """Show who served a request, why, and where its time went.

    REQUEST_ID is the x-request-id of its response: the mesh's own, or what the client called it. The last 1,000 requests of each
    processor are known, with those that failed or were cancelled.
    """
    if (request_id is None) != is_last:
        leave(UsageError("name one request by its x-request-id, or ask for --last"))
    execute(settings, lambda: _trace(settings, request_id, as_json))


async def _trace(settings: dict[str, Any], request_id: str | None, as_json: bool) -> int:
    from meshserve.cli.columns import Output
    from meshserve.cli.observing import observer, settle, wait_for
    from meshserve.cli.trace.waterfall import waterfall
    from meshserve.observe.receipt_store import find_receipt, latest_receipt

    async with observer(mesh_config(settings)) as mesh:
        await wait_for(mesh, lambda: any(member.is_callable for member in mesh.links.membership.listed()), "found no peer")
        await settle(mesh)
        receipt = await (latest_receipt(mesh) if request_id is None else find_receipt(mesh, request_id))
    if as_json:
        click.echo(json.dumps(receipt, indent=1))
        return 0
    console = Output(highlight=False, soft_wrap=True)
    width, height = (console.width, console.height - 1) if console.is_terminal else (None, None)
    for line in waterfall(receipt, width, height):
        console.print(line)
    return 0
