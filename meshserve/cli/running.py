"""From a coroutine to an exit code: the event loop, logging, signals, and errors in one line."""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import click

from meshserve.cli.logs import JsonFormatter, PlainFormatter, RepeatFilter
from meshserve.errors import MeshserveError, UsageError


def set_up_logging(settings: dict[str, Any]) -> None:
    """Logs go to stderr; `--log-level` and `--log-json` say how. No library's chatter below a warning."""
    handler = logging.StreamHandler()
    handler.addFilter(RepeatFilter())
    handler.setFormatter(JsonFormatter() if settings.get("log_json") else PlainFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("zeroconf").setLevel(logging.CRITICAL)  # it logs a traceback for an interface without multicast
    logging.getLogger("meshserve").setLevel(str(settings.get("log_level", "warning")).upper())


def declare(event: str, text: str) -> None:
    """One line on stderr whatever the level: plain, or JSON where log lines are."""
    formatters = [handler.formatter for handler in logging.getLogger().handlers]
    as_json = next((found for found in formatters if isinstance(found, JsonFormatter)), None)
    record = logging.makeLogRecord({"name": "meshserve", "levelno": logging.WARNING, "levelname": "WARNING", "msg": text, "event": event})
    click.echo(f"meshserve: {text}" if as_json is None else as_json.format(record), err=True)


def run_loop(coroutine: Coroutine[Any, Any, int]) -> int:
    """Run under uvloop where there is one."""
    make_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):
        from uvloop import new_event_loop

        make_loop = new_event_loop
    with asyncio.Runner(loop_factory=make_loop) as runner:
        return runner.run(coroutine)


def leave(error: MeshserveError) -> NoReturn:
    """One line, and the exit code of the contract: 2 for usage, 1 for the rest."""
    click.echo(f"meshserve: {error.message}", err=True)
    sys.exit(2 if isinstance(error, UsageError) else 1)


def _let_go_of_stdout() -> None:
    """What is still buffered for a reader that has left goes nowhere, without a word at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def execute(settings: dict[str, Any], make: Callable[[], Coroutine[Any, Any, int]]) -> NoReturn:
    """Run a command's coroutine and exit with its code."""
    set_up_logging(settings)
    try:
        code = run_loop(make())
    except MeshserveError as error:
        leave(error)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `meshserve peers | head`
        _let_go_of_stdout()
        code = 0
    except Exception as error:  # a bug: people get one line, and a way to see more
        logging.getLogger("meshserve").debug("unexpected", exc_info=error)
        leave(MeshserveError(f"unexpected {type(error).__name__}: {error}; --log-level debug shows where"))
    sys.exit(code)
