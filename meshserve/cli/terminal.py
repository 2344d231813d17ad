"""A small terminal application on rich's console: keys, the alternate screen, resizing, logs.

Each frame is drawn over the one before and nothing is ever cleared, so nothing flickers. The
terminal is given back as it was, however the application ends. Without a terminal, plain text.
"""

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import termios
import time
import tty
from collections import deque
from typing import Any, Protocol, Self

from rich.console import Console
from rich.control import Control
from rich.screen import Screen
from rich.text import Text

from meshserve.cli.columns import Output

_REFRESHED, _RESIZED, _INTERRUPTED = "refreshed", "resized", "ctrl-c"

_BEGIN_FRAME, _END_FRAME = "\x1b[?2026h", "\x1b[?2026l"
"""Synchronized output: a terminal that knows it shows a frame when all of it is there."""
_KEYS = {
    **dict.fromkeys(("\x1b[A", "\x1bOA"), "up"),
    **dict.fromkeys(("\x1b[B", "\x1bOB"), "down"),
    **dict.fromkeys(("\x1b[C", "\x1bOC"), "right"),
    **dict.fromkeys(("\x1b[D", "\x1bOD"), "left"),
    "\x1b[5~": "page-up",
    "\x1b[6~": "page-down",
    "\x1b[H": "home",
    "\x1b[F": "end",
    **dict.fromkeys("\r\n", "enter"),
    "\x7f": "backspace",
    "\x03": _INTERRUPTED,
    "\x1b": "escape",
}
_SEQUENCE = re.compile(r"\x1b(?:[\[O][0-?]*[ -/]*[@-~]?|.)?|.", re.DOTALL)
"""An escape sequence (ECMA-48, section 5.4), a key pressed with Alt, or any letter."""
_SMALLEST = (20, 4)
_MAX_LOG_LINES, _LOG_SHOWN_S = 100, 5.0
_MAX_EVENTS = 256


class View(Protocol):
    """What is shown."""

    async def refresh(self) -> None:
        """Gather anew what is shown; called every interval."""

    def draw(self, width: int | None, height: int | None) -> list[Text]:
        """At most `height` lines of at most `width` cells; None: no terminal, show everything."""

    def on_key(self, key: str) -> bool:
        """A letter, or `up`, `enter`, `page-down`, ...; True asks for a refresh at once."""


def parse_keys(data: bytes) -> list[str]:
    """The keys that a terminal sent; unknown sequences are ignored."""
    found = _SEQUENCE.findall(data.decode(errors="ignore"))
    return [key for key in (_KEYS.get(each, each) for each in found) if key.isprintable()]


async def run_view(view: View, interval_s: float) -> None:
    """Show the view until `q` or Ctrl-C; without a terminal, print it every interval."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        await _print_forever(view, interval_s)
    with _Terminal() as terminal:
        await _show(view, terminal, interval_s)


async def _print_forever(view: View, interval_s: float) -> None:
    console = Output(highlight=False, soft_wrap=True, color_system=None)
    while True:
        began_s = time.monotonic()
        await view.refresh()
        for line in view.draw(None, None):
            console.print(line)
        console.print()
        console.file.flush()
        await asyncio.sleep(max(0.0, began_s + interval_s - time.monotonic()))


async def _show(view: View, terminal: "_Terminal", interval_s: float) -> None:
    """Keys are answered while a refresh goes on, which may wait for peers that do not answer."""
    is_due = asyncio.Event()

    async def refresh() -> None:
        while True:
            next_s = asyncio.get_running_loop().time() + interval_s
            is_due.clear()
            await view.refresh()
            terminal.add(_REFRESHED)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(next_s):
                    await is_due.wait()

    refreshing = asyncio.create_task(refresh())
    # a refresh that fails ends the application, which then raises the error
    refreshing.add_done_callback(lambda task: terminal.add(_INTERRUPTED))
    try:
        while (event := await terminal.events.get()) not in ("q", _INTERRUPTED):
            if event not in (_REFRESHED, _RESIZED) and view.on_key(event):
                is_due.set()
            terminal.draw(view)
    finally:
        refreshing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await refreshing


class _Terminal:
    """The terminal, taken over between `__enter__` and `__exit__`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._console = Console(highlight=False)
        self.events: asyncio.Queue[str] = asyncio.Queue(_MAX_EVENTS)
        self._input: int | None = None
        self._saved: list[Any] = []
        self._log = _LogLines()

    def __enter__(self) -> Self:
        if sys.stdin.isatty():
            self._input = sys.stdin.fileno()
            self._saved = termios.tcgetattr(self._input)
            tty.setraw(self._input, termios.TCSADRAIN)
            self._loop.add_reader(self._input, self._read)
        self._loop.add_signal_handler(signal.SIGWINCH, self.add, _RESIZED)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self.add, _INTERRUPTED)
        self._log.divert()
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)
        return self

    def __exit__(self, *error: object) -> None:
        for number in (signal.SIGWINCH, signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)
        self._console.show_cursor(True)
        self._console.set_alt_screen(False)
        if self._input is not None:
            self._loop.remove_reader(self._input)
            termios.tcsetattr(self._input, termios.TCSADRAIN, self._saved)
        self._log.give_back()

    def _read(self) -> None:
        assert self._input is not None
        data = os.read(self._input, 1024)
        for key in parse_keys(data) if data else [_INTERRUPTED]:  # no data: the terminal is gone
            self.add(key)

    def add(self, event: str) -> None:
        """A key, or what else is a reason to draw; the oldest gives way to one too many."""
        if self.events.full():
            self.events.get_nowait()
        self.events.put_nowait(event)

    def draw(self, view: View) -> None:
        """One frame, over the one before."""
        size = self._console.size
        width, height = max(_SMALLEST[0], size.width), max(_SMALLEST[1], size.height)
        lines = view.draw(width, height)[:height]
        if log := self._log.latest():
            lines = [*lines, *([Text()] * (height - len(lines)))]
            lines[-1] = Text(log, "yellow")
        # the screen pads each line to the full width: nothing of the frame before is left
        screen = Screen(*lines, application_mode=True)
        self._console.file.write(_BEGIN_FRAME)
        with self._console:
            self._console.control(Control.home())
            self._console.print(screen, end="", no_wrap=True, overflow="ellipsis")
        self._console.file.write(_END_FRAME)
        self._console.file.flush()


class _LogLines(logging.Handler):
    """Log lines that come while the screen is taken: at its foot for a moment, printed later."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: deque[str] = deque(maxlen=_MAX_LOG_LINES)
        self._last_s = float("-inf")
        self._others: list[logging.Handler] = []

    def divert(self) -> None:
        """Take the place of the log's handlers, with the form and the filters of the first."""
        root = logging.getLogger()
        self._others, root.handlers = root.handlers, [self]
        for other in self._others[:1]:
            self.formatter, self.filters = other.formatter, other.filters

    def emit(self, record: logging.LogRecord) -> None:
        """Called by the log."""
        self._kept.append(self.format(record))
        self._last_s = time.monotonic()

    def latest(self) -> str:
        """The last line, if it is recent."""
        is_recent = time.monotonic() - self._last_s < _LOG_SHOWN_S
        return self._kept[-1] if self._kept and is_recent else ""

    def give_back(self) -> None:
        """Print the lines where they would have been."""
        logging.getLogger().handlers = self._others
        for line in self._kept:
            sys.stderr.write(f"{line}\n")
