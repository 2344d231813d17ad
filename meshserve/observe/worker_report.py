"""A worker's reports to those that watch it: its load and the KV blocks that it holds to routers, its load alone to frontends."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from meshserve.engines.protocol import Engine
from meshserve.handoff.provider import PrefillProvider
from meshserve.handoff.requester import PrefillRequester
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.watches import WatchSource
from meshserve.wire.messages import WORKER_LOADS, WORKER_REPORTS
from meshserve.wire.routing import MAX_HASHES_PER_REPORT, WorkerLoad, WorkerReport

_REPORT_INTERVAL_S = 0.02
"""Changes within it leave as one report: well under the time that an in-flight reservation lasts, and at
most 50 small messages a second."""
_RUNNING_INTERVAL_S = 0.1
"""Between two reports of progress alone. Each costs 0.3 ms of a core at both ends together: at the interval above,
reports took a twentieth of the time of a model on the same core."""
_LOAD_INTERVAL_S = 0.1
"""Between two loads to frontends, which know their own part of it better."""


class WorkerReporter:
    """One a peer that has an engine, whatever its roles."""

    def __init__(
        self, mesh: Mesh, engine: Engine, provider: PrefillProvider | None = None, requester: PrefillRequester | None = None
    ) -> None:
        self._engine, self._provider, self._requester = engine, provider, requester
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._is_slow = False
        """Whether that timer is one that a change brings forward."""
        self._stored: dict[int, None] = {}
        self._evicted: dict[int, None] = {}
        self._held = dict.fromkeys(engine.watch_blocks(self._on_blocks))
        self._admitted: list[str] = []
        self._kept: list[str] = []
        self._source = WatchSource(mesh, WORKER_REPORTS, self._snapshot)
        self._loads = WatchSource(mesh, WORKER_LOADS, lambda: [self.load()])
        self._load_timer: asyncio.TimerHandle | None = None

    def load(self) -> WorkerLoad:
        """As it is now."""
        found = self._engine.load()
        return WorkerLoad(
            found.num_running,
            found.num_waiting,
            found.waiting_prefill_tokens,
            found.used_blocks,
            found.cached_blocks,
            found.num_blocks,
            self._provider.queue.num_queued if self._provider is not None else 0,
            handoff_ns_per_token=self._requester.choice.rates.ns_per_token() if self._requester is not None else 0,
            max_running=found.max_running,
            **self._engine.rates.figures(),
        )

    def changed(self, admitted: str = "", is_kept: bool = False) -> None:
        """Report soon, with all other changes until then. From now on the load counts the request `admitted`,
        whose prompt might have been handed over and is computed here (`is_kept`).
        """
        if self._source.watchers:
            if admitted:
                self._admitted.append(admitted)
            if is_kept:
                self._kept.append(admitted)
            if self._timer is None or self._is_slow:  # a report of progress alone is brought forward
                if self._timer is not None:
                    self._timer.cancel()
                self._timer, self._is_slow = self._loop.call_later(_REPORT_INTERVAL_S, self._publish), False
        if self._load_timer is None and self._loads.watchers:
            self._load_timer = self._loop.call_later(_LOAD_INTERVAL_S, self._publish_load)

    def _publish_load(self) -> None:
        self._load_timer = None
        load = self.load()
        self._loads.publish(load)
        if load.num_running or load.num_waiting:  # the load of a busy worker changes without any event
            self.changed()

    def _on_blocks(self, stored: Sequence[int], evicted: Sequence[int]) -> None:
        for block_hash in evicted:
            self._held.pop(block_hash, None)
        self._held.update(dict.fromkeys(stored))
        if not self._source.watchers:  # a later watcher starts with a snapshot
            self._stored, self._evicted = {}, {}
            return
        # net changes, as the engine's own: a block that came and went since the last report is in neither
        for block_hash in evicted:
            if self._stored.pop(block_hash, 0) is not None:
                self._evicted[block_hash] = None
        for block_hash in stored:
            if self._evicted.pop(block_hash, 0) is not None:
                self._stored[block_hash] = None
        self.changed()

    def _publish(self) -> None:
        self._timer = None
        admitted, self._admitted = tuple(self._admitted), []
        kept, self._kept = tuple(self._kept), []
        stored, self._stored = tuple(self._stored), {}
        evicted, self._evicted = tuple(self._evicted), {}
        load = self.load()
        self._source.publish(WorkerReport(load, stored, evicted, admitted, kept))
        if load.num_running and self._source.watchers:  # progress changes the load without any event
            self._timer, self._is_slow = self._loop.call_later(_RUNNING_INTERVAL_S, self._publish), True

    def _snapshot(self) -> Iterable[Any]:
        """Includes changes that are not published yet: to hear of them twice does no harm."""
        held = tuple(self._held)
        yield WorkerReport(self.load(), held[:MAX_HASHES_PER_REPORT])
        for start in range(MAX_HASHES_PER_REPORT, len(held), MAX_HASHES_PER_REPORT):
            yield WorkerReport(self.load(), held[start : start + MAX_HASHES_PER_REPORT])

    def close(self) -> None:
        """Report no more."""
        self._engine.watch_blocks(None)
        for timer in (self._timer, self._load_timer):
            if timer is not None:
                timer.cancel()
