"""The command: flags -> settings -> runs -> tables, JSON, CSV, a report."""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshserve.cli.bench.options import GroupedCommand, bench_options
from meshserve.cli.options import mesh_config, mesh_options
from meshserve.cli.running import execute, leave
from meshserve.errors import StartupFailed, UsageError

if TYPE_CHECKING:
    from meshserve.cli.bench.outcome import Outcome
    from meshserve.cli.bench.settings import Settings
    from meshserve.cli.bench.stopping import Stop
    from meshserve.cli.bench.sweep import Sweep

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
    try:
        plan = _Course(context, options)
    except UsageError as error:
        leave(error)
    execute(options, plan.run)


class _Course:
    """What is to be run, checked before anything is."""

    def __init__(self, context: click.Context, options: Mapping[str, Any]) -> None:
        from meshserve.cli.bench.settings import read_settings
        from meshserve.cli.bench.sweep import parse_sweep

        self._options = options
        _check_files(options)
        self.sweep: Sweep | None = None
        self.sides: list[tuple[str, Settings]] = []
        if options["compare"] and options["sweep"]:
            raise UsageError("--compare and --sweep: one at a time")
        if options["compare"]:
            if options["url"]:
                raise UsageError("--compare names its targets itself: without URL")
            for spec in options["compare"]:
                self.sides.append((_without_key(spec), read_settings(_with_overrides(context, options, spec), _TURN_S)))
            return
        if options["sweep"]:
            self.sweep = parse_sweep(options["sweep"])
            given = [name for name in ("concurrency", "rate", "ramp") if options[name] is not None]
            if given:
                raise UsageError(f"--sweep says what the load is: without --{given[0]}")
            for step in self.sweep.steps:
                self.sides.append((f"{self.sweep.name} {step:g}", read_settings({**options, self.sweep.name: step}, _STEP_S)))
            return
        self.sides.append(("run", read_settings(options, _DURATION_S)))

    async def run(self) -> int:
        """Runs it, and gives the exit code: 1 if nothing was answered, that of Ctrl-C if there was one."""
        from meshserve.cli.bench.stopping import EXIT_CODE, Stop

        stop = Stop()
        outcome = await self._outcome(stop)
        self._write(outcome)
        if stop.is_asked:
            return EXIT_CODE
        return 0 if outcome.is_answered else 1

    async def _outcome(self, stop: "Stop") -> "Outcome":
        from meshserve.cli.bench.live import Live
        from meshserve.cli.bench.outcome import Course, run_comparison, run_once, run_sweep

        options, mesh = self._options, mesh_config(dict(self._options))
        async with AsyncExitStack() as stack:
            live = stack.enter_context(Live(2 * options["pairs"] if options["compare"] else len(self.sides)))
            course = Course(stack, mesh, live, stop, options["csv_file"] is not None)
            if options["compare"]:
                return await run_comparison(course, self.sides, options["pairs"])
            if self.sweep is not None:
                return await run_sweep(course, self.sides)
            return await run_once(course, self.sides[0][1])

    def _write(self, outcome: "Outcome") -> None:
        """What is printed first: figures are not lost where a file cannot be written after all. Raises StartupFailed then."""
        options = self._options
        if options["as_json"]:
            click.echo(json.dumps(outcome.to_dict(), indent=1))
        else:
            outcome.print()
        try:
            if options["csv_file"]:
                with Path(options["csv_file"]).open("w", newline="") as file:
                    outcome.write_rows(file)
            if options["report"]:
                from meshserve.cli.bench.report.page import page

                Path(options["report"]).write_text(page(outcome, _command_line()))
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
                found[parameter.name] = parameter.type_cast_value(context, text)
            except click.BadParameter as exc:
                raise UsageError(f"--compare: {name}={text}: {exc.message}") from exc
            if parameter.name in _LEVELS:
                found.update(dict.fromkeys(_LEVELS - {parameter.name}))
            return
    raise UsageError(f"--compare: {name!r} is no option that two sides can differ in")


_LEVELS = frozenset(("concurrency", "rate", "ramp"))
_OVERRIDABLE = _LEVELS | {
    "endpoint", "model", "api_key", "stream", "extra", "insecure", "timeout", "arrival", "num_requests", "duration", "max_open",
    "prompt_tokens", "output_tokens", "ignore_eos", "shared_prefix_tokens", "num_prefixes", "turns", "think_time", "receipt_every",
}  # fmt: skip
