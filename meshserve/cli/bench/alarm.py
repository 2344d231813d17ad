"""Waiting until a moment, to some 50 us. Event loops wait in whole milliseconds, and half of one on average would count as latency."""

import asyncio
import contextlib
import ctypes
import os
import struct
import sys
import time

_TFD_NONBLOCK, _TFD_CLOEXEC, _TFD_TIMER_ABSTIME = os.O_NONBLOCK, os.O_CLOEXEC, 1


class Alarm:
    """One waiter at a time. On Linux a timerfd (timerfd_create(2)), which Python has from 3.13 on; elsewhere the loop's own timers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: asyncio.Future[None] | None = None
        self._libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
        self._descriptor = -1
        if self._libc is not None:
            self._descriptor = self._libc.timerfd_create(time.CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self._descriptor >= 0:
            loop.add_reader(self._descriptor, self._rang)

    async def until(self, at_s: float) -> None:
        """Return at `at_s` of time.monotonic; if that is past, after all else had its turn, so that being late does not make later."""
        left_s = at_s - time.monotonic()
        if left_s <= 0 or self._descriptor < 0:
            await asyncio.sleep(max(0.0, left_s))
            return
        assert self._libc is not None
        self._waiting = self._loop.create_future()
        # `struct itimerspec` where longs have 64 bits: no interval, then seconds and nanoseconds
        spec = struct.pack("@4l", 0, 0, *divmod(int(at_s * 1e9), 1_000_000_000))
        self._libc.timerfd_settime(self._descriptor, _TFD_TIMER_ABSTIME, spec, None)
        await self._waiting

    def _rang(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, 8)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> None:
        """No longer used."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
