"""A peer's side of the event feed: its events, as batches for the frontends that watch it. Without a watcher nothing runs.

The feed must cost next to nothing under any load. So a few requests are followed step by step, and all others
are only counted. All peers decide alike which requests to follow, each when it first sees the request: so a
request is followed from one peer to the next without a message between them.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import xxhash

from meshserve.mesh.mesh import Mesh
from meshserve.mesh.watches import WatchSource
from meshserve.observe.latencies import latencies_by_worker
from meshserve.wire.messages import FEED
from meshserve.wire.observing import MAX_EVENTS, MAX_SAMPLES, FeedBatch, FeedEvent
from meshserve.wire.routing import WorkerLoad

INTERVAL_S = 0.2
"""Between two batches, and between two updates to a reader. Half of it cost about 1 % more CPU time under full
load, and the dashboard, which shows everything in slow motion, looked the same."""
MAX_NEW_PER_S = 20
"""Requests that are begun to be followed in a second. Higher shows more of the load, at the cost of bandwidth."""
MAX_FOLLOWED = 64
"""At a time. Long streams fill it, and then new requests are only counted."""

_TICKS_A_SECOND = round(1 / INTERVAL_S)
_SILENT_S = 120.0
"""A followed request without an event for so long is forgotten: its end was missed."""
_BEGINNINGS = frozenset(("submit", "accepted", "prefill_begun"))
_ENDS = frozenset(("left", "prefill_ended"))
_SHOWN = frozenset(("submit", "routed", "accepted", "ticket", "claim", "prefill_begun", "attempt_failed", "handoff_ended", "result"))
"""Events that are shown one by one. Tokens and blocks are too many: they are shown as counts of an interval."""
_LOAD = ("num_running", "num_waiting", "waiting_prefill_tokens", "used_blocks", "cached_blocks", "num_blocks", "num_tickets")
_MAX_CANDIDATES = 6


class Sample:
    """Chooses which requests are followed: a bounded number a second, and the same ones on all peers.

    One request of 1, 2, 4, ... is taken, by a hash of its id: a quiet peer takes what a busy peer takes.
    """

    def __init__(self, max_per_s: int, now_s: float) -> None:
        self._max_per_s, self._since_s = max_per_s, now_s
        self._mask = self._num_seen = self._num_taken = 0

    def takes(self, request_id: str, now_s: float) -> bool:
        """Whether to follow this request, which is new here."""
        if now_s - self._since_s >= 1.0:
            self._begin_second(now_s)
        self._num_seen += 1
        # one more bit of the hash must be zero as soon as this second has brought too many, not only in the next second
        if self._num_seen > self._max_per_s * (self._mask + 1):
            self._mask = 2 * self._mask + 1
        if self._num_taken >= self._max_per_s or xxhash.xxh3_64_intdigest(request_id.encode()) & self._mask:
            return False
        self._num_taken += 1
        return True

    def _begin_second(self, now_s: float) -> None:
        rate = self._num_seen / (now_s - self._since_s)
        # a bit fewer only if all requests of the last second would have stayed within the bound
        while self._mask and rate <= self._max_per_s * (self._mask // 2 + 1):
            self._mask //= 2
        self._since_s, self._num_seen, self._num_taken = now_s, 0, 0


@dataclass(slots=True)
class _Followed:
    """A request that is followed on this peer."""

    began_s: float
    heard_s: float
    is_submitted_here: bool
    first_token_s: float = 0.0
    num_tokens: int = 0
    new_tokens: int = 0
    new_blocks: int = 0
    sender: str = ""
    """Of the blocks."""


class Digest:
    """Listens to a peer's event log while the peer is watched."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sample = Sample(MAX_NEW_PER_S, clock())
        self._followed: dict[str, _Followed] = {}
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._events: list[tuple[float, str, str, dict[str, Any]]] = []
        self._ttft_ms: list[float] = []
        self._itl_ms: list[float] = []

    def heard(self, event: str, request_id: str, details: dict[str, Any]) -> None:
        """Counts the event, and keeps it if its request is followed."""
        followed = self._followed.get(request_id)
        if event == "result":
            self._count_result(details, is_followed=followed is not None)
        elif event in _BEGINNINGS:
            self._counts[event] += 1
        if followed is not None:
            self._follow(followed, event, request_id, details)
        elif event in _BEGINNINGS:
            self._begin(event, request_id, details)

    def follows(self, request_id: str) -> bool:
        """Whether this request is told step by step."""
        return request_id in self._followed

    def _count_result(self, details: dict[str, Any], is_followed: bool) -> None:
        """Tokens of requests that are not followed count at their end."""
        outcome, counts = details["outcome"], self._counts
        # what a client cancelled did not fail
        counts[outcome if outcome in ("ok", "cancelled") else "failed"] += 1
        counts["prompt_tokens"] += details["num_prompt_tokens"]
        counts["cached_tokens"] += details["num_cached_tokens"]
        if not is_followed:
            counts["tokens"] += details["num_tokens"]

    def _begin(self, event: str, request_id: str, details: dict[str, Any]) -> None:
        now_s = self._clock()
        if self._sample.takes(request_id, now_s) and len(self._followed) < MAX_FOLLOWED:
            self._followed[request_id] = _Followed(now_s, now_s, event == "submit")
            self._show(now_s, event, request_id, details)

    def _follow(self, followed: _Followed, event: str, request_id: str, details: dict[str, Any]) -> None:
        now_s = followed.heard_s = self._clock()
        if event == "tokens":
            if not followed.first_token_s:
                followed.first_token_s = now_s
                _keep(self._ttft_ms, (now_s - followed.began_s) * 1000)
            self._counts["tokens"] += details["count"]
            followed.new_tokens += details["count"]
            followed.num_tokens += details["count"]
        elif event == "block":
            followed.new_blocks += 1
            followed.sender = details["peer_sending"]
        elif event in _SHOWN:
            self._show_counts(followed, request_id, now_s)  # tokens and blocks of before come before the event
            self._show(now_s, event, request_id, details)
        # where the request was submitted, roles of this peer end their part before the processor ends the request
        if event == "result" or (event in _ENDS and not followed.is_submitted_here):
            self._end(followed, request_id, now_s)

    def _end(self, followed: _Followed, request_id: str, now_s: float) -> None:
        del self._followed[request_id]
        self._show_counts(followed, request_id, now_s)
        if followed.num_tokens > 1:
            _keep(self._itl_ms, (now_s - followed.first_token_s) * 1000 / (followed.num_tokens - 1))

    def _show(self, now_s: float, event: str, request_id: str, details: dict[str, Any]) -> None:
        if len(self._events) < MAX_EVENTS:
            if event == "routed":
                details = {**details, "candidates": details["candidates"][:_MAX_CANDIDATES], "num_candidates": len(details["candidates"])}
            self._events.append((now_s, event, request_id, details))

    def _show_counts(self, followed: _Followed, request_id: str, now_s: float) -> None:
        if followed.new_blocks:
            self._show(now_s, "blocks", request_id, {"count": followed.new_blocks, "peer_sending": followed.sender})
        if followed.new_tokens:
            self._show(now_s, "tokens", request_id, {"count": followed.new_tokens})
        followed.new_blocks = followed.new_tokens = 0

    def take(self) -> dict[str, Any]:
        """Everything since the last call, as fields of a FeedBatch; empty if nothing happened. Times are those
        of followed requests."""
        now_s = self._clock()
        for request_id, followed in list(self._followed.items()):
            self._show_counts(followed, request_id, now_s)
            if now_s - followed.heard_s > _SILENT_S:
                del self._followed[request_id]
        events, self._events = self._events, []
        counts, self._counts = self._counts, defaultdict(int)
        ttft_ms, self._ttft_ms = self._ttft_ms, []
        itl_ms, self._itl_ms = self._itl_ms, []
        timed = [FeedEvent(round((now_s - at_s) * 1000, 1), event, request_id, details) for at_s, event, request_id, details in events]
        batch = {"events": timed, "counts": dict(counts), "ttft_ms": ttft_ms, "itl_ms": itl_ms}
        return {key: value for key, value in batch.items() if value}


def _keep(samples: list[float], value_ms: float) -> None:
    if len(samples) < MAX_SAMPLES:
        samples.append(round(value_ms, 3))


class FeedSource:
    """Serves a peer's batches to those that watch the peer. One a peer."""

    def __init__(self, mesh: Mesh, load: Callable[[], WorkerLoad] | None) -> None:
        """`load` is a worker's; None on other peers."""
        self._mesh, self._load = mesh, load
        self._loop = asyncio.get_running_loop()
        self._source = WatchSource(mesh, FEED, self._snapshot)
        self._digest: Digest | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._told: dict[str, Any] = {"latencies": {}}
        """Load and latencies as they were last published."""
        self._num_ticks = 0

    def _snapshot(self) -> Iterable[FeedBatch]:
        """The state now; events begin now."""
        if self._digest is None:
            self._digest = Digest()
            self._mesh.event_log.listen(self._digest.heard, self._digest.follows)
            self._timer = self._loop.call_later(INTERVAL_S, self._publish)
        yield FeedBatch(**self._state(has_latencies=True))

    def _state(self, has_latencies: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._load is not None:
            load = self._load()
            found["load"] = {name: getattr(load, name) for name in _LOAD}
        if has_latencies:
            found["latencies"] = latencies_by_worker(self._mesh.histograms.snapshot_parts())
        return found

    def _publish(self) -> None:
        if not self._source.watchers:
            self.close()
            return
        assert self._digest is not None
        self._timer = self._loop.call_later(INTERVAL_S, self._publish)
        batch = self._digest.take()
        self._num_ticks += 1
        # latencies once a second: percentiles of half a minute change slowly, and to collect them costs more than a load
        for name, value in self._state(self._num_ticks % _TICKS_A_SECOND == 0).items():
            if value != self._told.get(name):
                self._told[name] = batch[name] = value
        if batch:
            self._source.publish(FeedBatch(**batch))

    def close(self) -> None:
        """Listen no more."""
        if self._digest is not None:
            self._digest = None
            self._mesh.event_log.listen(None, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
