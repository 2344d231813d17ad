"""`meshserve generate`: one prompt through the mesh, without HTTP."""

import asyncio
import json
import sys
from typing import Any

import click

from meshserve.cli.options import mesh_config, mesh_options, option
from meshserve.cli.running import execute
from meshserve.errors import MeshserveError

_TIMEOUT_S = 600.0


@click.command()
@click.argument("prompt")
@option("--max-tokens", type=click.IntRange(1), default=64, help="At most so many tokens.")
@option("--model", help="Which model.  [default: the first that is served]")
@click.option("--receipt", is_flag=True, help="Then print who served it, why, and where the time went, as JSON to stderr.")
@mesh_options
def generate(prompt: str, max_tokens: int, model: str | None, receipt: bool, **settings: Any) -> None:
    """Send PROMPT through the mesh and print what comes back, as it comes."""
    execute(settings, lambda: _generate(settings, prompt, max_tokens, model, receipt))


class _Printer:
    """The sink of the processor's stream."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def on_item(self, item: Any) -> None:
        sys.stdout.write(str(item))
        sys.stdout.flush()

    def on_end(self, value: Any) -> None:
        self.ended.set_result(value)

    def on_error(self, error: MeshserveError) -> None:
        self.ended.set_exception(error)


async def _generate(settings: dict[str, Any], prompt: str, max_tokens: int, model: str | None, wants_receipt: bool) -> int:
    from meshserve.cli.observing import observer, wait_for_workers
    from meshserve.wire.completion import CompletionRequest, Ending
    from meshserve.wire.messages import COMPLETE

    async with observer(mesh_config(settings)) as mesh:
        cards = await wait_for_workers(mesh)
        request = CompletionRequest(
            request_id=f"{mesh.incarnation}-1",
            kind="completion",
            model=model or cards[0].model,
            prompt=prompt,
            max_tokens=max_tokens,
            wants_receipt=wants_receipt,
        )
        printer = _Printer()
        mesh.open(mesh.peers_with("processor")[0].incarnation, COMPLETE, request, printer, _TIMEOUT_S)
        try:
            end: Ending = await printer.ended
        finally:
            click.echo()
        if wants_receipt:
            click.echo(json.dumps(end.receipt, indent=1), err=True)
    return 0
