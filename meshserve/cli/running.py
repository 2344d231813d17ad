"""From a coroutine to an exit code: the event loop, logging, signals, and errors in one line."""

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from meshserve.errors import MeshserveError, UsageError
from meshserve.telemetry import ACCESS_LOGGER, printable

_WINDOW_S = 10.0
_MAX_PER_PLACE = 20
_MAX_REMEMBERED = 512


def set_up_logging(settings: dict[str, Any]) -> None:
    """Logs go to stderr; `--log-level` and `--log-json` say how. No library's chatter below a warning."""
    handler = logging.StreamHandler()
    handler.addFilter(RepeatFilter())
    handler.setFormatter(JsonFormatter() if settings.get("log_json") else PlainFormatter("%(asctime)s %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("zeroconf").setLevel(logging.CRITICAL)  # it logs a traceback for an interface without multicast
    logging.getLogger("meshserve").setLevel(str(settings.get("log_level", "warning")).upper())


def declare(event: str, text: str) -> None:
    """One line on stderr whatever the level: plain, or JSON where log lines are."""
    click.echo(declared(event, text), err=True)


def declared(event: str, text: str) -> str:
    """The line itself."""
    formatters = [handler.formatter for handler in logging.getLogger().handlers]
    as_json = next((found for found in formatters if isinstance(found, JsonFormatter)), None)
    record = logging.makeLogRecord({"name": "meshserve", "levelno": logging.WARNING, "levelname": "WARNING", "msg": text, "event": event})
    return f"meshserve: {printable(text)}" if as_json is None else as_json.format(record)


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
    click.echo(f"meshserve: {printable(error.message)}", err=True)
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


# --- how log lines look, and that none of them storms


class _Formatter(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """ISO 8601 with milliseconds and the offset from UTC: strftime knows no milliseconds."""
        at = time.localtime(record.created)
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', at)}.{int(record.msecs):03d}{time.strftime('%z', at)}"


class PlainFormatter(_Formatter):
    """One line each; what others sent cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """A traceback, which only `--log-level debug` brings, keeps its lines."""
        text = super().format(record)
        return "\n".join(map(printable, text.split("\n"))) if record.exc_info else printable(text)


class JsonFormatter(_Formatter):
    """A JSON object a line: time, level, logger, message; of events also their name and fields, such as `peer` or `request_id`."""

    def format(self, record: logging.LogRecord) -> str:
        """Without a traceback, whatever the record holds."""
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name}
        event = getattr(record, "event", None)
        fields = {"event": event, **getattr(record, "fields", {})} if event else {}
        return json.dumps({**line, "message": record.getMessage(), **fields}, default=str)


@dataclass(slots=True)
class _Repeats:
    began_s: float
    num_passed: int = 0
    num_held: int = 0


class RepeatFilter(logging.Filter):
    """Holds repeated lines back, and says with the next how many they were.

    The same text passes once in ten seconds, and twenty lines of one place in the code, whatever they say. Lines of HTTP requests all pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: OrderedDict[str, _Repeats] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """False: not this one."""
        if record.name == ACCESS_LOGGER:
            return True
        text = record.getMessage()
        place = f"{record.name}:{record.lineno}:{getattr(record, 'event', '')}"
        num_held = self.passes(place, text, time.monotonic())
        if num_held:
            record.msg, record.args = f"{text} ({num_held} like this held back)", ()
        return num_held is not None

    def passes(self, place: str, text: str, now_s: float) -> int | None:
        """None if this line is held back; else how many of this place were, since the last one that passed. Pure."""
        by_text, by_place = self._of(text, now_s), self._of(place, now_s)
        if by_text.num_passed >= 1 or by_place.num_passed >= _MAX_PER_PLACE:
            by_place.num_held += 1
            return None
        by_text.num_passed += 1
        by_place.num_passed += 1
        num_held, by_place.num_held = by_place.num_held, 0
        return num_held

    def _of(self, key: str, now_s: float) -> _Repeats:
        known = self._known.pop(key, None)
        if known is None:
            known = _Repeats(now_s)
        elif now_s - known.began_s >= _WINDOW_S:
            known = _Repeats(now_s, 0, known.num_held)
        self._known[key] = known
        while len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)
        return known
