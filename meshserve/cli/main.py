"""The `meshserve` command."""

import click

from meshserve import __version__
from meshserve.cli.bench.command import bench
from meshserve.cli.demo.command import demo
from meshserve.cli.doctor.command import doctor
from meshserve.cli.generate import generate
from meshserve.cli.key import key
from meshserve.cli.peers import peers
from meshserve.cli.run import run
from meshserve.cli.top.command import top
from meshserve.cli.trace.command import trace


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="meshserve")
def main() -> None:
    """Disaggregated LLM serving as a mesh of peers, with no broker.

    Try `meshserve demo`. On a LAN: `meshserve run --role frontend,processor,router` on one machine, `meshserve run --role decode` and
    `meshserve run --role prefill` on others.
    """


for command in (run, demo, peers, top, trace, doctor, generate, bench, key):
    main.add_command(command)
