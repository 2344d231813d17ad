"""A small terminal application: raw keys, the alternate screen, resizing; where there is no terminal, plain text.

Nothing is ever cleared: each frame is drawn over the one before, so nothing flickers. The terminal is given back as it was, however
the application ends.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import termios
import time
from collections import deque
from collections.abc import Iterator
from io import StringIO
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.text import Text

from meshserve.cli.printing import Output

RESIZED, INTERRUPTED = "resized", "ctrl-c"

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[H"
"""Alternate screen, no cursor, no wrapping at the right edge."""
_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
_BEGIN_FRAME, _END_FRAME = "\x1b[?2026h\x1b[H", "\x1b[?2026l"
"""Between them terminals that can show nothing half-drawn; others ignore it."""
_KEYS = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b[C": "right",
    b"\x1bOC": "right",
    b"\x1b[D": "left",
    b"\x1bOD": "left",
    b"\x1b[5~": "page-up",
    b"\x1b[6~": "page-down",
    b"\x1b[H": "home",
    b"\x1b[F": "end",
    b"\r": "enter",
    b"\n": "enter",
    b"\x7f": "backspace",
    b"\x03": INTERRUPTED,
    b"\x1b": "escape",
}
_SMALLEST = (20, 4)
_MAX_LOG_LINES, _LOG_SHOWN_S = 100, 5.0
_MAX_EVENTS = 256


class View(Protocol):
    """What is shown."""

    async def refresh(self) -> None:
        """Look again; called every interval."""

    def draw(self, width: int | None, height: int | None) -> list[Text]:
        """Lines, at most `height`, each at most `width` cells; None where there is no terminal, and all is to be shown."""

    def on_key(self, key: str) -> bool:
        """A key other than those that end the application: a letter, or `up`, `enter`, `page-down`, ... True: look again at once."""


def parse_keys(data: bytes) -> list[str]:
    """What a terminal sent; sequences that are not known are passed over."""
    keys = []
    while data:
        size, key = next(((len(known), name) for known, name in _KEYS.items() if data.startswith(known) and known != b"\x1b"), (0, ""))
        if not size and data.startswith(b"\x1b") and len(data) > 1:
            size = 2 + next((at + 1 for at, byte in enumerate(data[2:]) if 0x40 <= byte <= 0x7E), len(data))
        elif not size:
            size = next((length for length in range(1, 5) if _decodes(data[:length])), 1)
            key = _KEYS.get(data[:size], data[:size].decode(errors="ignore"))
        keys.append(key)
        data = data[size:]
    return [key for key in keys if key and (len(key) > 1 or key.isprintable())]


def _decodes(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


def is_terminal() -> bool:
    """Whether there is one to draw on."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


async def run_view(view: View, interval_s: float) -> None:
    """Show it until `q` or Ctrl-C; without a terminal, print it every interval until interrupted."""
    if not is_terminal():
        await _print_forever(view, interval_s)
    with Terminal() as terminal:
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


async def _show(view: View, terminal: "Terminal", interval_s: float) -> None:
    """Keys are answered while a refresh is under way: it may wait for peers that do not answer."""
    refreshing: asyncio.Task[None] | None = None
    due_s = time.monotonic()
    try:
        while True:
            if refreshing is None and time.monotonic() >= due_s:
                due_s = time.monotonic() + interval_s
                refreshing = asyncio.create_task(view.refresh())
            event = await terminal.event(refreshing, due_s - time.monotonic())
            if event in ("q", INTERRUPTED):
                return
            if event not in (None, RESIZED) and view.on_key(str(event)):
                due_s = time.monotonic()
            if refreshing is not None and refreshing.done():
                await refreshing
                refreshing = None
            terminal.draw(view)
    finally:
        if refreshing is not None:
            refreshing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await refreshing


class Terminal:
    """The terminal, taken over between `__enter__` and `__exit__`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._output = Console(highlight=False)
        self._events: deque[str] = deque(maxlen=_MAX_EVENTS)
        self._wake = asyncio.Event()
        self._input: int | None = None
        self._saved: list[Any] = []
        self._log = _LogLines()

    def __enter__(self) -> Self:
        """Take over."""
        if sys.stdin.isatty():
            self._input = sys.stdin.fileno()
            self._saved = termios.tcgetattr(self._input)
            _set_raw(self._input)
            self._loop.add_reader(self._input, self._read)
        for number, event in ((signal.SIGWINCH, RESIZED), (signal.SIGINT, INTERRUPTED), (signal.SIGTERM, INTERRUPTED)):
            self._loop.add_signal_handler(number, self._add, event)
        self._log.divert()
        self._write(_ENTER)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give it back."""
        for number in (signal.SIGWINCH, signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)
        self._write(_LEAVE)
        if self._input is not None:
            self._loop.remove_reader(self._input)
            termios.tcsetattr(self._input, termios.TCSADRAIN, self._saved)
        self._log.give_back()

    def _read(self) -> None:
        assert self._input is not None
        data = os.read(self._input, 1024)
        for key in parse_keys(data) if data else [INTERRUPTED]:  # no data: the terminal is gone
            self._add(key)

    def _add(self, event: str) -> None:
        self._events.append(event)
        self._wake.set()

    async def event(self, other: "asyncio.Task[None] | None", timeout_s: float) -> str | None:
        """The next key or resize; None once `other` is done, or at the timeout."""
        if not self._events:
            self._wake.clear()
            waking = asyncio.ensure_future(self._wake.wait())
            waits = [waking] if other is None else [waking, other]
            # while a refresh is under way the timeout is the refresh's own
            await asyncio.wait(waits, timeout=max(0.0, timeout_s) if other is None else None, return_when=asyncio.FIRST_COMPLETED)
            waking.cancel()
        return self._events.popleft() if self._events else None

    def draw(self, view: View) -> None:
        """One frame, over the one before."""
        size = os.get_terminal_size(sys.stdout.fileno())
        width, height = max(_SMALLEST[0], size.columns), max(_SMALLEST[1], size.lines)
        lines = view.draw(width, height)[:height]
        if log := self._log.latest():
            lines = [*lines[: height - 1], *([Text()] * (height - 1 - len(lines))), Text(log, "yellow")]
        below = "\r\n\x1b[J" if len(lines) < height else ""
        self._write(_BEGIN_FRAME + "\r\n".join(self._rendered(line, width) for line in lines) + below + _END_FRAME)

    def _rendered(self, line: Text, width: int) -> str:
        """Padded to the full width, so that nothing of the frame before is left."""
        padded = line.copy()
        padded.truncate(width, overflow="ellipsis", pad=True)
        buffer = StringIO()
        console = Console(
            file=buffer,
            force_terminal=True,
            color_system=self._output.color_system,  # type: ignore[arg-type]  # rich gives out as str what it takes as a literal
            width=width,
            highlight=False,
        )
        console.print(padded, end="", no_wrap=True, overflow="ignore", crop=False)
        return buffer.getvalue()

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _set_raw(descriptor: int) -> None:
    """No echo, no lines, no signals from keys; output stays as it is."""
    settings = termios.tcgetattr(descriptor)
    settings[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
    settings[6][termios.VMIN], settings[6][termios.VTIME] = 1, 0
    termios.tcsetattr(descriptor, termios.TCSADRAIN, settings)


class _LogLines:
    """What is logged while the screen is taken: shown for a moment at its foot, and written out afterwards."""

    def __init__(self) -> None:
        self._kept: deque[str] = deque(maxlen=_MAX_LOG_LINES)
        self._last_s = float("-inf")
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def divert(self) -> None:
        for handler in self._handlers():
            self._streams.append((handler, handler.setStream(self)))

    @staticmethod
    def _handlers() -> Iterator["logging.StreamHandler[Any]"]:
        yield from (handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler)

    def write(self, text: str) -> None:
        if text.strip():
            self._kept.append(text.strip())
            self._last_s = time.monotonic()

    def flush(self) -> None:
        """Nothing is buffered."""

    def latest(self) -> str:
        return self._kept[-1] if self._kept and time.monotonic() - self._last_s < _LOG_SHOWN_S else ""

    def give_back(self) -> None:
        for handler, stream in self._streams:
            handler.setStream(stream)
        for line in self._kept:
            sys.stderr.write(f"{line}\n")
