"""The `meshserve` command."""

import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from meshserve import __version__
from meshserve.cli.running import leave
from meshserve.errors import MeshserveError, UsageError

_COMMANDS = {
    "run": "meshserve.cli.run",
    "demo": "meshserve.cli.demo.command",
    "peers": "meshserve.cli.peers",
    "top": "meshserve.cli.top",
    "trace": "meshserve.cli.trace",
    "doctor": "meshserve.cli.doctor.command",
    "generate": "meshserve.cli.generate",
    "bench": "meshserve.cli.bench.command",
    "key": "meshserve.cli.key",
}
"""Where each command is, by its name there."""


class _Commands(click.Group):
    """Loads a command when it is asked for: a peer that starts waits for no other command's imports."""

    def main(self, *arguments: Any, **settings: Any) -> NoReturn:
        """Run, and exit; what is wrong is said in one line, where click would print its usage too."""
        try:
            code = super().main(*arguments, **{**settings, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.ClickException as error:
            leave(UsageError(_one_line(error)))
        except MeshserveError as error:
            leave(error)
        except click.Abort:
            code = 130
        sys.exit(code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in _COMMANDS:
            raise click.UsageError(f"No such command {cmd_name!r}; there are {', '.join(sorted(_COMMANDS))}", ctx)
        command: click.Command = getattr(import_module(_COMMANDS[cmd_name]), cmd_name)
        return command


def _one_line(error: click.ClickException) -> str:
    """What is wrong, and where to read what is right."""
    words = " ".join(error.format_message().split()).rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{words}; see `{context.command_path} --help`" if context is not None else words


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="meshserve")
def main() -> None:
    """Disaggregated LLM serving as a mesh of peers, with no broker.

    Try `meshserve demo`. On a LAN: `meshserve run --role frontend,processor,router` on one machine, `meshserve run --role decode` and
    `meshserve run --role prefill` on others.
    """
