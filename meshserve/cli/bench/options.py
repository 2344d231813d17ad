"""The options of `meshserve bench`, in groups, so that `--help` can be read; and what they say, as one value."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from meshserve.cli.bench.arrivals import ARRIVALS, Level, constant_level, parse_ramp
from meshserve.cli.bench.http_target import HttpSettings
from meshserve.cli.bench.load import Plan
from meshserve.cli.bench.prompts import FORMS, Shape, parse_lengths
from meshserve.cli.bench.requests import PATHS
from meshserve.cli.bench.tally import Goal
from meshserve.cli.options import option, pick, together
from meshserve.errors import UsageError

_MESH_GROUP = "The mesh, where no URL is given"


def _parsed(parse: Callable[[str], Any]) -> Callable[..., Any]:
    """A callback for an option whose value is what `parse` makes of its text."""

    def convert(context: click.Context, parameter: click.Parameter, text: str | None) -> Any:
        try:
            return None if text is None else parse(text)
        except UsageError as error:
            raise click.UsageError(error.message, context) from error

    return convert


def _parse_warmup(text: str) -> tuple[int, float]:
    """A number of requests, as `20`, and seconds, as `2s`: one of them is 0."""
    try:
        if text.endswith("s"):
            number, seconds = 0, float(text[:-1])
        else:
            number, seconds = int(text), 0.0
    except ValueError:
        number, seconds = -1, 0.0
    if not (0 <= number <= 1_000_000 and 0 <= seconds <= 86_400):
        raise UsageError(f"--warmup {text!r} is neither a number of requests nor seconds, as 2s")
    return number, seconds


def _parse_fields(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as exc:
        raise UsageError(f"--extra is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise UsageError("--extra is not a JSON object")
    return found


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


_target, _load, _prompts, _kind, _output = (
    partial(option, cls=GroupedOption, group=group)
    for group in ("Target", "Load", "Prompts and answers", "What to find out", "Output")
)
_rate = click.FloatRange(0, 1e6, min_open=True)
_seconds = click.FloatRange(0, 86_400)

_lengths = _parsed(parse_lengths)

bench_options = together(
    _target("--endpoint", type=click.Choice(list(PATHS)), default="completions", help="Which API."),
    _target("--model", metavar="NAME", help="[default: the first of /v1/models]"),
    _target("--api-key", metavar="KEY", help="Sent as a bearer token."),
    _target("--stream/--no-stream", "is_stream", default=True, help="Without a stream there is no time to the first token but the last's."),
    _target("--extra", callback=_parsed(_parse_fields), metavar="JSON", help='More fields of each request, as {"temperature": 0}.'),
    _target("--insecure", is_flag=True, help="Do not check the server's certificate."),
    _target("--timeout", "timeout_s", type=click.FloatRange(0.1, 86_400), default=120.0, metavar="S", help="For one request."),
    _load("--concurrency", type=click.IntRange(1, 100_000), metavar="N", help="Closed loop: N clients.  [default: 1]"),
    _load(
        "--rate", type=_rate, metavar="R",
        help="Open loop: R requests a second (conversations, with --turns). Latency counts from the time each was due.",
    ),
    _load("--arrival", type=click.Choice(ARRIVALS), default="poisson", help="Of an open loop."),
    _load(
        "--ramp", callback=_parsed(parse_ramp), metavar="NAME=FROM:TO:S",
        help="rate or concurrency that goes from FROM to TO in S seconds, and stays there.",
    ),
    _load("--trace", type=click.Path(path_type=Path), metavar="FILE", help="Arrivals, lengths and shared blocks of a Mooncake trace."),
    _load("--speed", type=_rate, default=1.0, metavar="X", help="Play the trace X times as fast."),
    _load("--requests", "num_requests", type=click.IntRange(1), metavar="N", help="Measure so many."),
    _load(
        "--duration", "duration_s", type=click.FloatRange(0.1, 86_400), metavar="S",
        help="Measure so long.  [default: 10, where nothing else ends it; 2 a turn of --compare; 5 a step of --sweep]",
    ),
    _load(
        "--warmup", callback=_parsed(_parse_warmup), default="1s", metavar="N|Ss",
        help="Left out of all figures: the first N requests, or S seconds (as 2s).",
    ),
    _load("--max-open", type=click.IntRange(1, 1_000_000), default=10_000, metavar="N", help="Open loop: so many under way at most."),
    _load("--seed", type=int, default=0, metavar="N", help="Of prompts, lengths and arrivals."),
    _prompts(
        "--prompt-tokens", callback=_lengths, default="256", metavar="LENGTH",
        help=f"{FORMS}; of each turn, without the shared prefix.",
    ),
    _prompts("--output-tokens", callback=_lengths, default="64", metavar="LENGTH", help="The same; goes out as max_tokens."),
    _prompts(
        "--ignore-eos/--no-ignore-eos", default=None,
        help="Ask for all of them, whatever the model says.  [default: with --trace, whose lengths are kept]",
    ),
    _prompts(
        "--shared-prefix-tokens", "num_shared_tokens",
        type=click.IntRange(0, 1_000_000), default=0, metavar="N",
        help="Which prompts have in common.",
    ),
    _prompts("--num-prefixes", type=click.IntRange(1, 100_000), default=1, metavar="N", help="So many such prefixes, drawn evenly."),
    _prompts(
        "--turns", "num_turns", type=click.IntRange(1, 1000), default=1, metavar="N",
        help="Conversations: each prompt has all that was said before.",
    ),
    _prompts("--think-time", "think_s", type=_seconds, default=0.0, metavar="S", help="Between an answer and the next turn."),
    _prompts(
        "--chars-per-token", type=click.FloatRange(0.1, 100), metavar="X",
        help="[default: what the target counts in two probes]",
    ),
    _kind("--target-ttft-ms", type=_rate, metavar="MS", help="Goodput: requests whose first token comes in time ..."),
    _kind("--target-itl-ms", type=_rate, metavar="MS", help="... and the others too, on average over the request."),
    _kind(
        "--compare",
        nargs=2,
        metavar="A B",
        help="Each a URL, `mesh`, and options as NAME=VALUE with spaces between: "
        "'http://127.0.0.1:8000 concurrency=8'. What they do not name is as the other options say.",
    ),
    _kind("--pairs", type=click.IntRange(6, 1000), default=10, metavar="N", help="Turns of A and of B."),
    _kind("--sweep", metavar="NAME=N,N,..", help="concurrency or rate in steps; says where the knee is."),
    _kind("--receipt-every", type=click.IntRange(0), default=10, metavar="N", help="Of a mesh, for the time in each phase; 0: never."),
    _output("--json", "as_json", is_flag=True, help="One JSON object instead of tables; docs/measuring.md has its fields."),
    _output("--report", type=click.Path(dir_okay=False), metavar="FILE", help="Plots and tables in one HTML file."),
    _output("--csv", "csv_file", type=click.Path(dir_okay=False), metavar="FILE", help="A line for each measured request."),
)


# --- what they say, as one value


@dataclass(frozen=True, slots=True)
class Settings:
    """One load on one target."""

    url: str | None
    """None: the mesh itself."""
    plan: Plan
    rate: Level | None
    """Of an open loop that no trace paces."""
    arrival: str
    shape: Shape
    trace: Path | None
    speed: float
    http: HttpSettings
    goal: Goal
    seed: int
    chars_per_token: float | None

    @property
    def load(self) -> str:
        """In words."""
        if self.plan.clients is not None:
            level, what = self.plan.clients, "clients"
        elif self.rate is not None:
            level, what = self.rate, f"requests/s, {self.arrival}"
        else:
            return f"as {self.trace} has it" + (f", {self.speed:g} times as fast" if self.speed != 1 else "")
        if level.ramp_s:
            return f"{level.first:g} to {level.last:g} {what} in {level.ramp_s:g} s"
        return "1 client" if what == "clients" and level.last == 1 else f"{level.last:g} {what}"


def read_settings(options: Mapping[str, Any], default_duration_s: float) -> Settings:
    """From options as click gives them. Raises UsageError for options that exclude each other."""
    is_traced, is_conversing = options["trace"] is not None, options["num_turns"] > 1
    if is_traced and is_conversing:
        raise UsageError("--trace has its own prompts: without --turns")
    clients, rate = _levels(options)
    num_warmup, warmup_s = options["warmup"]
    found = {
        **options,
        "clients": clients,
        "rate": rate,
        "num_warmup": num_warmup,
        "warmup_s": warmup_s,
        "ignore_eos": is_traced if options["ignore_eos"] is None else options["ignore_eos"],
        "is_keeping_text": is_conversing,
        "is_checking_certificates": not options["insecure"],
        "extra": options["extra"] or {},
    }
    if options["num_requests"] is None and options["duration_s"] is None and not is_traced:
        found["duration_s"] = default_duration_s
    goal = Goal(_in_seconds(options["target_ttft_ms"]), _in_seconds(options["target_itl_ms"]))
    plan, shape, http = pick(Plan, found), pick(Shape, found), pick(HttpSettings, found)
    return pick(Settings, {**found, "plan": plan, "shape": shape, "http": http, "goal": goal})


def _levels(options: Mapping[str, Any]) -> tuple[Level | None, Level | None]:
    """Of clients, or of requests a second; neither where a trace paces."""
    given = [name for name in ("concurrency", "rate", "ramp") if options[name] is not None]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]}: one of them says what the load is")
    if options["ramp"] is not None:
        name, level = options["ramp"]
        return (level, None) if name == "concurrency" else (None, level)
    if options["rate"] is not None:
        if options["trace"] is not None:
            raise UsageError("--trace says when requests are due: --speed scales it, --concurrency ignores it")
        return None, constant_level(options["rate"])
    if options["trace"] is not None and options["concurrency"] is None:
        return None, None
    return constant_level(options["concurrency"] or 1), None


def _in_seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
