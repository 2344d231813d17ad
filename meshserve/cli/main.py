"""The `meshserve` command."""

from importlib import import_module

import click

from meshserve import __version__

_COMMANDS = {
    "run": "meshserve.cli.run",
    "demo": "meshserve.cli.demo.command",
    "peers": "meshserve.cli.peers",
    "top": "meshserve.cli.top.command",
    "trace": "meshserve.cli.trace.command",
    "doctor": "meshserve.cli.doctor.command",
    "generate": "meshserve.cli.generate",
    "bench": "meshserve.cli.bench.command",
    "key": "meshserve.cli.key",
}
"""Where each command is, by its name there."""


class _Commands(click.Group):
    """Loads a command when it is asked for: a peer that starts waits for no other command's imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(_COMMANDS[cmd_name]), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="meshserve")
def main() -> None:
    """Disaggregated LLM serving as a mesh of peers, with no broker.

    Try `meshserve demo`. On a LAN: `meshserve run --role frontend,processor,router` on one machine, `meshserve run --role decode` and
    `meshserve run --role prefill` on others.
    """
