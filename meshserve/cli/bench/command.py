"""The command: flags -> settings -> runs -> tables, JSON, CSV, a report."""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from meshserve.cli.bench.load import EXIT_CODE, Stop
from meshserve.cli.bench.options import GroupedCommand, Settings, bench_options, read_settings
from meshserve.cli.bench.outcome import Outcome, measure
from meshserve.cli.bench.report import report
from meshserve.cli.bench.sweep import parse_sweep
from meshserve.cli.options import mesh_config, mesh_options
from meshserve.cli.running import execute
from meshserve.errors import StartupFailed, UsageError

_DURATION_S, _TURN_S, _STEP_S = 10.0, 2.0, 5.0


@click.command(cls=GroupedCommand)
@click.argument("url", required=False)
@bench_options
@mesh_options
@click.pass_context
def bench(context: click.Context, /, **options: Any) -> None:
    """Measure the latency and throughput of any OpenAI-compatible server at URL, or of the mesh itself, without HTTP.

    \b
    meshserve bench http://127.0.0.1:8000 --concurrency 8
    meshserve bench http://127.0.0.1:8000 --rate 20 --duration 60 --target-ttft-ms 200 --report out.html
    meshserve bench --sweep concurrency=1,2,4,8,16            the mesh, without HTTP
    meshserve bench --compare http://one:8000 http://other:8000 --concurrency 4
    """
    _check_files(options)
    sides = _sides(context, options)
    execute(options, lambda: _run(options, sides))


def _sides(context: click.Context, options: Mapping[str, Any]) -> list[tuple[str, Settings]]:
    """What is run, by its label: one load, two of a comparison, or steps. Raises UsageError."""
    if options["compare"] and options["sweep"]:
        raise UsageError("--compare and --sweep: one at a time")
    if options["compare"]:
        if options["url"]:
            raise UsageError("--compare names its targets itself: without URL")
        specs = [(spec, _with_overrides(context, options, spec)) for spec in options["compare"]]
        return [(_without_key(spec), read_settings(found, _TURN_S)) for spec, found in specs]
    if not options["sweep"]:
        return [("run", read_settings(options, _DURATION_S))]
    name, steps = parse_sweep(options["sweep"])
    given = [level for level in ("concurrency", "rate", "ramp") if options[level] is not None]
    if given:
        raise UsageError(f"--sweep says what the load is: without --{given[0]}")
    return [
        (f"{name} {step:g}", read_settings({**options, name: step}, _STEP_S)) for step in steps
    ]


async def _run(options: Mapping[str, Any], sides: list[tuple[str, Settings]]) -> int:
    """Returns the exit code: 1 if nothing was answered, that of Ctrl-C if there was one."""
    stop = Stop()
    kind = next((name for name in ("compare", "sweep") if options[name]), "run")
    is_keeping_rows = options["csv_file"] is not None
    outcome = await measure(kind, sides, options["pairs"], mesh_config(options), stop, is_keeping_rows)
    _write(outcome, options)
    if stop.is_asked:
        return EXIT_CODE
    return 0 if outcome.is_answered else 1


def _write(outcome: Outcome, options: Mapping[str, Any]) -> None:
    """Print first, so that no figures are lost if a file cannot be written. Raises StartupFailed."""
    if options["as_json"]:
        click.echo(json.dumps(outcome.to_dict(), indent=1))
    else:
        outcome.print()
    try:
        if options["csv_file"]:
            with Path(options["csv_file"]).open("w", newline="") as file:
                outcome.write_rows(file)
        if options["report"]:
            Path(options["report"]).write_text(report(outcome, _command_line()))
    except OSError as exc:
        raise StartupFailed(f"the figures cannot be written: {exc}") from exc


def _check_files(options: Mapping[str, Any]) -> None:
    """Before anything is measured for them. Raises UsageError."""
    for name, file in (("--report", options["report"]), ("--csv", options["csv_file"])):
        if file is not None:
            place = Path(file).absolute()
            if not place.parent.is_dir():
                raise UsageError(f"{name} {file!r}: there is no directory {str(place.parent)!r}")
            if not os.access(place if place.exists() else place.parent, os.W_OK):
                raise UsageError(f"{name} {file!r}: cannot be written")


def _command_line() -> str:
    """As it was typed, without a key."""
    words = [*sys.argv[1:]]
    for number, word in enumerate(words):
        words[number] = "..." if number and words[number - 1] == "--api-key" else _without_key(word)
    return shlex.join(["meshserve", *words])


def _without_key(words: str) -> str:
    """A side of a comparison, or an option, as others may read it."""
    return re.sub(r"(api-key=)(\"[^\"]*\"|'[^']*'|\S+)", r"\1...", words)


def _with_overrides(context: click.Context, options: Mapping[str, Any], spec: str) -> dict[str, Any]:
    """The options with what one side of a comparison says instead. Raises UsageError."""
    try:
        words = shlex.split(spec)
    except ValueError as exc:
        raise UsageError(f"--compare {spec!r}: {exc}") from exc
    found = dict(options)
    for word in words:
        name, equals, text = word.partition("=")
        if word == "mesh" or "://" in name:
            found["url"] = None if word == "mesh" else word
        elif equals:
            _override(context, found, name, text)
        else:
            raise UsageError(f"--compare {spec!r}: {word!r} is neither a URL, `mesh`, nor NAME=VALUE")
    return found


def _override(context: click.Context, found: dict[str, Any], name: str, text: str) -> None:
    for parameter in context.command.params:
        if f"--{name.lstrip('-')}" in parameter.opts and parameter.name in _OVERRIDABLE:
            try:
                found[parameter.name] = parameter.process_value(context, text)
            except click.UsageError as exc:
                raise UsageError(f"--compare: {name}={text}: {exc.message}") from exc
            if parameter.name in _LEVELS:
                found.update(dict.fromkeys(_LEVELS - {parameter.name}))
            return
    raise UsageError(f"--compare: {name!r} is no option that two sides can differ in")


_LEVELS = frozenset(("concurrency", "rate", "ramp"))
_OVERRIDABLE = _LEVELS | {
    "endpoint", "model", "api_key", "is_stream", "extra", "insecure", "timeout_s", "arrival",
    "num_requests", "duration_s", "max_open", "prompt_tokens", "output_tokens", "ignore_eos",
    "num_shared_tokens", "num_prefixes", "num_turns", "think_s", "receipt_every",
}  # fmt: skip
