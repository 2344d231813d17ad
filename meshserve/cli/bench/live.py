"""A progress bar on stderr while a run goes on. It is drawn from the run's own event loop, twice a second: half a millisecond each."""

import asyncio
import math
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from meshserve.cli.bench.load import Load
from meshserve.cli.bench.tally import Tally

_REFRESH_S = 0.5
_WIDE = 110
"""Columns of a terminal in which a long label has room."""


class Live:
    """Nothing is shown if stderr is no terminal."""

    def __init__(self, num_runs: int = 1) -> None:
        console = Console(stderr=True)
        self._is_shown = console.is_terminal
        is_narrow = console.width < _WIDE
        self._label_chars = 16 if is_narrow else 40
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8 if is_narrow else 24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn(
                "[cyan]{task.fields[figures]}",
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("asking the target", total=num_runs, figures="")
        self._num_runs, self._num_begun = num_runs, 0
        self._load: Load | None = None
        self._num_requests: int | None = None
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, label: str, load: Load, num_planned: int | None) -> None:
        """Follow the next run; `num_planned` is the number of requests, if a trace has it."""
        self._num_begun += 1
        self._load, self._num_requests = load, load.plan.num_requests or num_planned
        count = f"{self._num_begun}/{self._num_runs} " if self._num_runs > 1 else ""
        self._progress.update(self._task, description=f"{count}{label}"[: self._label_chars])
        if self._is_shown and self._timer is None:
            self._draw()

    def _draw(self) -> None:
        assert self._load is not None
        self._timer = asyncio.get_running_loop().call_later(_REFRESH_S, self._draw)
        tally = self._load.tally
        done = share_done(self._load.plan.duration_s, self._num_requests, tally, time.monotonic())
        figures = _line(self._load.num_open, tally)
        self._progress.update(self._task, completed=self._num_begun - 1 + done, figures=figures)
        self._progress.refresh()

    def __enter__(self) -> Self:
        if self._is_shown:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._progress.stop()


def share_done(duration_s: float | None, num_requests: int | None, tally: Tally, now_s: float) -> float:
    """Of a run that is done."""
    if tally.began_s is None:
        return 0.0
    shares = [0.0]
    if duration_s:
        shares.append((now_s - tally.began_s) / duration_s)
    if num_requests:
        shares.append((tally.num_done + tally.num_errors) / num_requests)
    return min(1.0, max(shares))


def _line(num_open: int, tally: Tally) -> str:
    elapsed_s = time.monotonic() - tally.began_s if tally.began_s is not None else math.inf
    ttft_ms, itl_ms = tally.times["ttft"].quantile_ms(0.5), tally.times["itl"].quantile_ms(0.5)
    parts = [f"{tally.num_done} done", f"{num_open} open", f"{tally.num_done / elapsed_s:.1f}/s"]
    if tally.num_done:
        parts.append(f"TTFT {ttft_ms:.2f} ms")
    if not math.isnan(itl_ms):
        parts.append(f"ITL {itl_ms:.2f} ms")
    if tally.num_errors:
        parts.append(f"{tally.num_errors} errors")
    return "  ".join(parts)
