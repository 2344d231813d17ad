"""Waiting for conditions with deadlines, and pacing: the one place where a test lets time pass.

A deadline counts the time in which the machine had a core for everybody: time in which some task waited for one is
added, up to `MOST_PATIENCE` times the deadline. So load cannot break a wait, and a condition that never comes ends it.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.01
MOST_PATIENCE = 8
_PRESSURE = Path("/proc/pressure/cpu")


def stalled_s() -> float:
    """Seconds since the machine's start in which some task waited for a core; 0 where the kernel does not say."""
    try:
        some = _PRESSURE.read_text().split("\n", 1)[0]
    except OSError:
        return 0.0
    return int(some.rpartition("total=")[2]) / 1e6


class Deadline:
    """`seconds` from now on, and what the machine stalls meanwhile."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._began_s, self._stalled_s = seconds, time.monotonic(), stalled_s()

    def is_over(self) -> bool:
        """Whether that time has passed."""
        passed_s = time.monotonic() - self._began_s
        if passed_s < self._seconds:
            return False
        return passed_s >= self._seconds + min(stalled_s() - self._stalled_s, self._seconds * (MOST_PATIENCE - 1))


def pace(seconds: float) -> None:
    """Let `seconds` pass: for the pacing of faults and load, never to wait for something to happen."""
    threading.Event().wait(seconds)


async def pace_async(seconds: float) -> None:
    """Like `pace`, while the event loop goes on."""
    loop = asyncio.get_running_loop()
    passed: asyncio.Future[None] = loop.create_future()
    timer = loop.call_later(seconds, _resolve, passed)
    try:
        await passed
    finally:
        timer.cancel()


def _resolve(passed: asyncio.Future[None]) -> None:
    # a cancelled wait may see its timer fire before it runs again
    if not passed.done():
        passed.set_result(None)


def wait_until(condition: Callable[[], T | None], deadline_s: float, what: str) -> T:
    """Ask `condition` about every 10 ms until its answer is true, and return that answer.

    Raises:
        AssertionError: no true answer within `deadline_s` seconds; the message names `what` was waited for.
    """
    deadline = Deadline(deadline_s)
    while True:
        # asked once more at the deadline itself: on a busy machine one pause may outlast it
        is_last = deadline.is_over()
        if answer := condition():
            return answer
        if is_last:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        pace(POLL_S)


async def until(condition: Callable[[], T | None], deadline_s: float, what: str) -> T:
    """Like `wait_until`, while the event loop goes on.

    Raises:
        AssertionError: no true answer within `deadline_s` seconds; the message names `what` was waited for.
    """

    async def ask() -> T | None:
        return condition()

    return await until_awaited(ask, deadline_s, what)


async def until_awaited(condition: Callable[[], Awaitable[T | None]], deadline_s: float, what: str) -> T:
    """Like `until`, for a condition that has to be awaited, such as an HTTP request; it bounds its own waits.

    Raises:
        AssertionError: no true answer within `deadline_s` seconds; the message names `what` was waited for.
    """
    deadline = Deadline(deadline_s)
    while True:
        is_last = deadline.is_over()
        if answer := await condition():
            return answer
        if is_last:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        await pace_async(POLL_S)
