"""The options of `meshserve bench`, in groups, so that `--help` can be read."""

from collections.abc import Callable
from typing import Any

import click

from meshserve.cli.bench.arrivals import ARRIVALS
from meshserve.cli.bench.distributions import FORMS
from meshserve.cli.bench.exchange import PATHS
from meshserve.cli.options import Command, option

_MESH_GROUP = "The mesh, where no URL is given"


class GroupedOption(click.Option):
    """An option that says under which heading it is shown."""

    def __init__(self, *names: Any, group: str = _MESH_GROUP, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help has headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                group = parameter.group if isinstance(parameter, GroupedOption) else _MESH_GROUP
                groups.setdefault("Other" if "--help" in parameter.opts else group, []).append(record)
        groups[_MESH_GROUP] = groups.pop(_MESH_GROUP)  # last but one: few need them
        groups["Other"] = groups.pop("Other")
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records, col_max=34)


def _in(group: str) -> Callable[..., Callable[[Command], Command]]:
    """Options of one group."""

    def add(*names: str, **settings: Any) -> Callable[[Command], Command]:
        return option(*names, cls=GroupedOption, group=group, **settings)

    return add


_target, _load, _prompts, _kind, _output = (_in(group) for group in ("Target", "Load", "Prompts and answers", "What to find out", "Output"))
_rate = click.FloatRange(0, 1e6, min_open=True)
_seconds = click.FloatRange(0, 86_400)

_OPTIONS = [
    _target("--endpoint", type=click.Choice(list(PATHS)), default="completions", help="Which API."),
    _target("--model", default=None, metavar="NAME", help="[default: the first of /v1/models]", show_default=False),
    _target("--api-key", default=None, metavar="KEY", help="Sent as a bearer token."),
    _target("--stream/--no-stream", "stream", default=True, help="Without a stream there is no time to the first token but the last's."),
    _target("--extra", default=None, metavar="JSON", help='More fields of each request, as {"temperature": 0}.'),
    _target("--insecure", is_flag=True, help="Do not check the server's certificate."),
    _target("--timeout", type=click.FloatRange(0.1, 86_400), default=120.0, metavar="S", help="For one request."),
    _load("--concurrency", type=click.IntRange(1, 100_000), default=None, metavar="N", help="Closed loop: N clients.  [default: 1]"),
    _load(
        "--rate",
        type=_rate,
        default=None,
        metavar="R",
        help="Open loop: R requests a second (conversations, with --turns). Latency counts from the time each was due.",
    ),
    _load("--arrival", type=click.Choice(ARRIVALS), default="poisson", help="Of an open loop."),
    _load(
        "--ramp",
        default=None,
        metavar="NAME=FROM:TO:S",
        help="rate or concurrency that goes from FROM to TO in S seconds, and stays there.",
    ),
    _load("--trace", type=click.Path(), default=None, metavar="FILE", help="Arrivals, lengths and shared blocks of a Mooncake trace."),
    _load("--speed", type=_rate, default=1.0, metavar="X", help="Play the trace X times as fast."),
    _load("--requests", "num_requests", type=click.IntRange(1), default=None, metavar="N", help="Measure so many."),
    _load(
        "--duration",
        type=click.FloatRange(0.1, 86_400),
        default=None,
        metavar="S",
        help="Measure so long.  [default: 10, where nothing else ends it; 2 a turn of --compare; 5 a step of --sweep]",
    ),
    _load("--warmup", default="1s", metavar="N|Ss", help="Left out of all figures: the first N requests, or S seconds (as 2s)."),
    _load("--max-open", type=click.IntRange(1, 1_000_000), default=10_000, metavar="N", help="Open loop: so many under way at most."),
    _load("--seed", type=int, default=0, metavar="N", help="Of prompts, lengths and arrivals."),
    _prompts("--prompt-tokens", default="256", metavar="LENGTH", help=f"{FORMS}; of each turn, without the shared prefix."),
    _prompts("--output-tokens", default="64", metavar="LENGTH", help="The same; goes out as max_tokens."),
    _prompts("--ignore-eos", is_flag=True, help="Ask for all of them, whatever the model says."),
    _prompts("--shared-prefix-tokens", type=click.IntRange(0, 1_000_000), default=0, metavar="N", help="Which prompts have in common."),
    _prompts("--num-prefixes", type=click.IntRange(1, 100_000), default=1, metavar="N", help="So many such prefixes, drawn evenly."),
    _prompts(
        "--turns", type=click.IntRange(1, 1000), default=1, metavar="N", help="Conversations: each prompt has all that was said before."
    ),
    _prompts("--think-time", type=_seconds, default=0.0, metavar="S", help="Between an answer and the next turn."),
    _prompts(
        "--chars-per-token",
        type=click.FloatRange(0.1, 100),
        default=None,
        metavar="X",
        help="[default: what the target counts in two probes]",
        show_default=False,
    ),
    _kind("--target-ttft-ms", type=_rate, default=None, metavar="MS", help="Goodput: requests whose first token comes in time ..."),
    _kind("--target-itl-ms", type=_rate, default=None, metavar="MS", help="... and the others too, on average over the request."),
    _kind(
        "--compare",
        nargs=2,
        default=None,
        metavar="A B",
        help="Each a URL, `mesh`, and options as NAME=VALUE with spaces between: "
        "'http://127.0.0.1:8000 concurrency=8'. What they do not name is as the other options say.",
    ),
    _kind("--pairs", type=click.IntRange(6, 1000), default=10, metavar="N", help="Turns of A and of B."),
    _kind("--sweep", default=None, metavar="NAME=N,N,..", help="concurrency or rate in steps; says where the knee is."),
    _kind("--receipt-every", type=click.IntRange(0), default=10, metavar="N", help="Of a mesh, for the time in each phase; 0: never."),
    _output("--json", "as_json", is_flag=True, help="One JSON object instead of tables; docs/measuring.md has its fields."),
    _output("--report", type=click.Path(dir_okay=False), default=None, metavar="FILE", help="Plots and tables in one HTML file."),
    _output("--csv", "csv_file", type=click.Path(dir_okay=False), default=None, metavar="FILE", help="A line for each measured request."),
]


def bench_options(command: Command) -> Command:
    """All but those of the mesh."""
    for add in reversed(_OPTIONS):
        command = add(command)
    return command
