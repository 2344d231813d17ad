"""An event loop that knows what each of its callbacks cost: the CPU time of its thread, whatever else the machine does meanwhile."""

import asyncio
import time
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVarTuple

Args = TypeVarTuple("Args")


class TimedLoop(asyncio.SelectorEventLoop):
    """`worst_s` and `worst` are of the most expensive callback since `forget`."""

    worst_s = 0.0
    worst = ""

    def forget(self) -> None:
        """Begin anew."""
        self.worst_s, self.worst = 0.0, ""

    def _timed(self, callback: Callable[[*Args], object], *args: *Args) -> None:
        began_s = time.thread_time()
        try:
            callback(*args)
        finally:
            took_s = time.thread_time() - began_s
            if took_s > self.worst_s:
                self.worst_s, self.worst = took_s, f"{callback!r} {args!r}"[:400]

    def call_soon(self, callback: Callable[[*Args], object], *args: *Args, context: Context | None = None) -> asyncio.Handle:
        return super().call_soon(self._timed, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Args], object], *args: *Args, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return super().call_at(when, self._timed, callback, *args, context=context)

    def _add_reader(self, fd: Any, callback: Callable[..., object], *args: Any) -> Any:
        return super()._add_reader(fd, self._timed, callback, *args)  # type: ignore[misc]

    def _add_writer(self, fd: Any, callback: Callable[..., object], *args: Any) -> Any:
        return super()._add_writer(fd, self._timed, callback, *args)  # type: ignore[misc]
