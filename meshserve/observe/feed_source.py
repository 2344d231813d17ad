"""A peer's side of the event feed: what it tells those who watch it. With no watcher its event log has no listener, and nothing runs."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from meshserve.mesh.mesh import Mesh
from meshserve.mesh.watch import WatchSource
from meshserve.observe.feed import Digest
from meshserve.observe.latencies import Counts, counts_by_worker
from meshserve.wire.messages import FEED
from meshserve.wire.routing import WorkerLoad

INTERVAL_S = 0.2
"""Between two batches, and between two updates to a reader. Half of it cost a mesh under full load about 1 % more CPU time, and a page that
shows everything in slow motion looks the same."""

_TICKS_A_SECOND = round(1 / INTERVAL_S)

_SHOWN = ("num_running", "num_waiting", "waiting_prefill_tokens", "used_blocks", "cached_blocks", "num_blocks", "num_tickets")


class FeedSource:
    """One a peer. Items of its watch are :class:`~meshserve.observe.feed.Digest`'s batches, with the worker's `load` and a processor's
    `latencies` by worker when they changed."""

    def __init__(self, mesh: Mesh, load: Callable[[], WorkerLoad] | None) -> None:
        self._mesh, self._load = mesh, load
        self._loop = asyncio.get_running_loop()
        self._source = WatchSource(mesh, FEED, self._snapshot)
        self._digest: Digest | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._told: WorkerLoad | None = None
        self._told_latencies: dict[str, Counts] = {}
        self._num_ticks = 0

    def _snapshot(self) -> Iterable[Any]:
        """There is no past to tell: events begin now."""
        if self._digest is None:
            self._digest = Digest()
            self._mesh.event_log.listen(self._digest)
            self._timer = self._loop.call_later(INTERVAL_S, self._publish)
        if self._load is not None:
            yield {"load": _shown(self._load())}
        if latencies := self._latencies():
            yield {"latencies": latencies}

    def _latencies(self) -> dict[str, Counts]:
        """Empty on peers that are no processors."""
        return counts_by_worker(self._mesh.histograms.snapshot_parts())

    def _publish(self) -> None:
        if not self._source.has_watchers:
            self.close()
            return
        assert self._digest is not None
        self._timer = self._loop.call_later(INTERVAL_S, self._publish)
        batch = self._digest.take()
        load = self._load() if self._load is not None else None
        if load is not None and load != self._told:
            self._told = load
            batch["load"] = _shown(load)
        self._num_ticks += 1
        if self._num_ticks % _TICKS_A_SECOND == 0 and (latencies := self._latencies()) != self._told_latencies:
            self._told_latencies = batch["latencies"] = latencies
        if batch:
            self._source.publish(batch)

    def close(self) -> None:
        """Listen no more."""
        if self._digest is not None:
            self._digest = None
            self._mesh.event_log.listen(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _shown(load: WorkerLoad) -> dict[str, int]:
    return {name: getattr(load, name) for name in _SHOWN}
