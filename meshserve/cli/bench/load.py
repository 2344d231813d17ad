"""Load on a target: closed loop, where each client waits for its answer, or open loop, where requests are due whatever the target does.

In an open loop latency counts from the time a request was due: else a target that stalls would also stop the measuring of it
(coordinated omission; Tene, How NOT to Measure Latency, 2013).
"""

import asyncio
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from meshserve.cli.bench.alarm import Alarm
from meshserve.cli.bench.arrivals import Level
from meshserve.cli.bench.mesh_target import Target
from meshserve.cli.bench.requests import Request, RequestRecord
from meshserve.cli.bench.selfcheck import SelfCheck
from meshserve.cli.bench.tally import Tally

_TICK_S = 0.05
EXIT_CODE = 128 + signal.SIGINT
_AFTER_ERROR_S = 0.05
"""Before a client of the closed loop asks again, so that a target that refuses everything is not asked 10,000 times a second."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much, and for how long."""

    clients: Level | None = None
    """Of a closed loop; None is an open one."""
    num_requests: int | None = None
    duration_s: float | None = None
    num_warmup: int = 0
    warmup_s: float = 0.0
    max_open: int = 10_000
    """Of an open loop: requests under way."""
    timeout_s: float = 120.0
    think_s: float = 0.0
    """Between an answer and the next turn of a conversation."""
    receipt_every: int = 0
    """Ask for a receipt with every n-th request, if the target gives them; 0 is never."""


class Load:
    """One run. `requests` are taken as they are needed, and `dues` are seconds from the start, one for each request of an open loop."""

    def __init__(
        self,
        target: Target,
        plan: Plan,
        requests: Iterable[Request],
        dues: Iterator[float] | None,
        tally: Tally,
        next_turn: Callable[[Request, str], Request | None] | None = None,
    ) -> None:
        self._target, self.plan, self.tally = target, plan, tally
        self._requests, self._dues, self._next_turn = iter(requests), dues, next_turn
        self.check = SelfCheck()
        self._loop = asyncio.get_running_loop()
        self._began_s = 0.0
        self._num_started = self._num_measured = 0
        self._open: dict[int, RequestRecord] = {}
        """By identity, in the order in which they were started."""
        self._pauses: set[asyncio.TimerHandle] = set()
        self._is_exhausted = False
        self._changed = asyncio.Event()
        self._task: asyncio.Task[object] | None = None
        self.is_stopped = False
        self.num_left = 0
        """Requests that were under way when the run was stopped."""

    @property
    def num_started(self) -> int:
        """Requests that were sent, those of the warm-up included."""
        return self._num_started

    @property
    def num_open(self) -> int:
        """Requests under way."""
        return len(self._open)

    def stop(self) -> None:
        """End now, with what there is: no more is sent, and what is under way is left out."""
        if self._task is not None and not self.is_stopped:
            self._task.cancel()
        self.is_stopped = True

    async def run(self) -> None:
        """Until all is sent and answered, or timed out; or stopped."""
        self._task = None if self.is_stopped else asyncio.current_task()
        if self._task is None:
            return
        self._began_s = time.monotonic()
        watch = self._loop.create_task(self._watch())
        try:
            if self.plan.clients is None:
                await self._run_open()
            else:
                self._fill()
            while self._open or not self._is_over(time.monotonic()):
                self._changed.clear()
                await self._changed.wait()
        except asyncio.CancelledError:
            if not self.is_stopped or self._task.uncancel():
                raise
            self.tally.close_window(time.monotonic())
            self.num_left = sum(record.is_measured for record in self._open.values())
        finally:
            self._task = None
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            self._abandon()
            self.check.stop()

    def _is_over(self, now_s: float) -> bool:
        """Whether no more is to be sent."""
        tally, num_wanted = self.tally, self.plan.num_requests
        if self._is_exhausted or (num_wanted is not None and self._num_measured >= num_wanted):
            return True
        return tally.ends_s is not None and now_s >= tally.ends_s

    # --- starting one

    def _start(self, request: Request, due_s: float, encoded: Any) -> None:
        is_measured = self._is_measured(due_s)
        record = RequestRecord(request, due_s, self._ended, is_measured)
        self._num_started += 1
        self._num_measured += is_measured
        self._open[id(record)] = record
        self._target.start(encoded, record)

    def _is_measured(self, due_s: float) -> bool:
        """Whether the warm-up is over; the first request after it opens the window."""
        if self.tally.began_s is not None:
            return True
        if self._num_started < self.plan.num_warmup or due_s < self._began_s + self.plan.warmup_s:
            return False
        self.tally.open_window(due_s, self.plan.duration_s)
        self.check.start()
        return True

    def _encode(self, request: Request) -> Any:
        every = self.plan.receipt_every
        return self._target.encode(request, bool(every) and self._target.is_mesh and self._num_started % every == 0)

    def _next_request(self) -> Request | None:
        request = next(self._requests, None)
        if request is None:
            self._is_exhausted = True
        return request

    # --- open loop

    async def _run_open(self) -> None:
        alarm = Alarm(self._loop)
        try:
            while (request := self._next_request()) is not None:
                due_s = self._due(request)
                if due_s is None or self._is_over(due_s):
                    return
                encoded = self._encode(request)
                await alarm.until(due_s)
                self.check.late.observe(time.monotonic() - due_s)
                if self.num_open >= self.plan.max_open and not await self._wait_for_room(due_s):
                    return
                self._start(request, due_s, encoded)
        finally:
            alarm.close()
            self._is_exhausted = True

    def _due(self, request: Request) -> float | None:
        offset_s = request.due_s if request.due_s is not None else next(self._dues, None) if self._dues is not None else 0.0
        return None if offset_s is None else self._began_s + offset_s

    async def _wait_for_room(self, due_s: float) -> bool:
        """False if the time to send was over before there was any; then what was due until now is counted."""
        self.tally.num_delayed += 1
        while self.num_open >= self.plan.max_open:
            if self._is_over(time.monotonic()):
                self.tally.num_unsent += 1 + self._num_due_before(self.tally.ends_s or due_s)
                return False
            self._changed.clear()
            await self._changed.wait()
        return True

    def _num_due_before(self, end_s: float) -> int:
        count = 0
        while (request := next(self._requests, None)) is not None:
            due_s = self._due(request)
            if due_s is None or due_s >= end_s:
                break
            count += 1
        return count

    # --- closed loop

    def _fill(self) -> None:
        """As many under way as there are clients now."""
        assert self.plan.clients is not None
        now_s = time.monotonic()
        num_clients = math.floor(self.plan.clients.at(now_s - self._began_s) + 1e-9)
        while len(self._open) + len(self._pauses) < num_clients and not self._is_over(now_s):
            request = self._next_request()
            if request is None:
                return
            self._send_now(request)

    def _send_now(self, request: Request) -> None:
        encoded = self._encode(request)
        self._start(request, time.monotonic(), encoded)

    # --- the end of one

    def _ended(self, record: RequestRecord) -> None:
        self._open.pop(id(record), None)
        self.tally.ended(record)
        self._changed.set()
        request = None
        if self._next_turn is not None and record.error is None:
            request = self._next_turn(record.request, record.ending.text)
        if request is not None:
            self._pause(self.plan.think_s, request)
        elif self.plan.clients is not None:
            if record.error is None:
                self._fill()
            else:
                self._pause(_AFTER_ERROR_S, None)

    def _pause(self, seconds: float, request: Request | None) -> None:
        """Go on after a while: with this request, or with the next one."""

        def go_on() -> None:
            self._pauses.discard(handle)
            self._changed.set()
            if request is not None and not self._is_over(time.monotonic()):
                self._send_now(request)
            elif self.plan.clients is not None:
                self._fill()

        handle = self._loop.call_later(seconds, go_on)
        self._pauses.add(handle)

    async def _watch(self) -> None:
        """Ends what takes too long, and starts clients that a ramp brings."""
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            for record in list(self._open.values()):
                if now_s - (record.sent_s or record.due_s) < self.plan.timeout_s:
                    break
                if record.cancel is not None:
                    record.cancel()
                record.fail(now_s, "timeout")
            if self.plan.clients is not None:
                self._fill()
            self._changed.set()

    def _abandon(self) -> None:
        for handle in self._pauses:
            handle.cancel()
        for record in list(self._open.values()):
            if record.cancel is not None:
                record.cancel()
        self._open.clear()


class Stop:
    """Whether the user has had enough. A second Ctrl-C ends the command as it always does."""

    def __init__(self) -> None:
        self._load: Load | None = None
        self.is_asked = False

    def watch(self, load: Load) -> None:
        """Stop this run when asked; at once, if that was before."""
        self._load = load
        if self.is_asked:
            load.stop()

    def __enter__(self) -> Self:
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._asked)
        return self

    def _asked(self) -> None:
        self.is_asked = True
        self.__exit__()
        if self._load is not None:
            self._load.stop()

    def __exit__(self, *error: object) -> None:
        # Python's own handler, KeyboardInterrupt, is back
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
