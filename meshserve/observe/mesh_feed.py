"""The event feed of a whole mesh: the batches of all peers, merged for the dashboard. Without a reader no peer is watched."""

import asyncio
import json
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from meshserve.errors import Overloaded
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.transport.sockets import endpoint
from meshserve.mesh.watches import Watcher
from meshserve.observe.latencies import WorkerLatencies
from meshserve.observe.peer_feed import INTERVAL_S, MAX_FOLLOWED, MAX_NEW_PER_S
from meshserve.wire.hello import PeerInfo
from meshserve.wire.messages import FEED
from meshserve.wire.observing import MAX_EVENTS, MAX_SAMPLES, FeedBatch

HISTORY_S = 120
"""Points of the past that a page gets when it opens."""
MAX_READERS = 32
RETRY_MS = 1000
"""After which a reader whose stream broke off asks again; it gets the whole state anew."""

_STRAY_S = 1.0
"""For events that arrive before their request's beginning, or after its end: peers' batches are not in step."""
_SILENT_S = 180.0
_CACHED_S = 10
"""Points that a cache hit rate is of."""
_MAX_KEPT = 24
"""Events of one request kept for pages that open while it runs."""
_MAX_STORIES = 512
"""Requests with events here. Most lack their beginning: each peer chooses for itself what to follow."""
_MAX_BACKLOG = 20
"""Updates that wait for one reader: four seconds. A slower reader skips them and gets the state instead."""
_KEEP_ALIVE_S = 1.0
_MAX_GONE = 32
_GONE_S = 30.0
"""How long a peer that died or left is still shown."""

Event = list[Any]
"""[milliseconds since the feed began, peer, event, request, details]"""


@dataclass(slots=True)
class _Story:
    """The events of one request, from all peers."""

    forget_s: float
    is_known: bool = False
    """Its beginning has arrived, so it is shown."""
    is_over: bool = False
    num_tokens: int = 0
    events: list[Event] = field(default_factory=list)


class Merge:
    """Merges the batches of all peers. `take` gives what is new; `now` the state, for a page that opens. Pure."""

    def __init__(self, now_s: float) -> None:
        self._began_s = self._point_s = self._second_s = now_s
        self._num_begun = 0
        self._stories: dict[str, _Story] = {}
        self._events: list[Event] = []
        self._loads: dict[str, dict[str, int]] = {}
        self._new_loads: set[str] = set()
        self._by_worker = WorkerLatencies()
        self._latencies: dict[str, Any] = {}
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """By peer, since the last update."""
        self._sums: Counter[str] = Counter()
        """Of all peers, since the last point."""
        self._ttft_ms: list[float] = []
        self._itl_ms: list[float] = []
        self._cached: deque[tuple[int, int]] = deque(maxlen=_CACHED_S)
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY_S)

    def time_ms(self, now_s: float) -> float:
        """Since this feed began."""
        return round((now_s - self._began_s) * 1000, 1)

    # --- batches in

    def add(self, peer: str, batch: FeedBatch, now_s: float) -> None:
        """One batch of this peer. Loads, counts and times add to the second that ends next."""
        for event in batch.events:
            self._add_event([self.time_ms(now_s - event.age_ms / 1000), peer, event.kind, event.request_id, event.details], now_s)
        if batch.counts:
            self._counts[peer].update(batch.counts)
            self._sums.update(batch.counts)
        self._ttft_ms += batch.ttft_ms[: 8 * MAX_SAMPLES - len(self._ttft_ms)]
        self._itl_ms += batch.itl_ms[: 8 * MAX_SAMPLES - len(self._itl_ms)]
        if batch.load is not None:
            self._loads[peer] = batch.load
            self._new_loads.add(peer)
        if batch.latencies is not None:
            self._by_worker.told(peer, batch.latencies)

    def _add_event(self, event: Event, now_s: float) -> None:
        kind, request_id = event[2], event[3]
        story = self._stories.get(request_id)
        if kind == "submit":
            if self._can_begin(now_s):
                self._begin(story or _Story(0.0), event, now_s)
        elif story is None:
            # the beginning may still arrive from the processor; without it the request is never shown
            if len(self._stories) < _MAX_STORIES:
                self._stories[request_id] = _Story(now_s + _STRAY_S, events=[event])
        elif story.is_known:
            self._keep(story, event)
            if kind == "result":
                story.is_over, story.forget_s = True, now_s + _STRAY_S
        elif len(story.events) < _MAX_KEPT:
            story.events.append(event)

    def _begin(self, story: _Story, submit: Event, now_s: float) -> None:
        # events that came before the beginning are told after it, as if they had come in order
        early, story.events = story.events, []
        story.is_known, story.forget_s = True, now_s + _SILENT_S
        self._stories[submit[3]] = story
        for event in [submit, *early]:
            self._keep(story, event)

    def _can_begin(self, now_s: float) -> bool:
        """Each processor keeps to these bounds; here all processors together do."""
        if now_s - self._second_s >= 1.0:
            self._second_s, self._num_begun = now_s, 0
        self._num_begun += 1
        return (
            self._num_begun <= MAX_NEW_PER_S
            and sum(story.is_known and not story.is_over for story in self._stories.values()) < MAX_FOLLOWED
        )

    def _keep(self, story: _Story, event: Event) -> None:
        if len(self._events) < MAX_EVENTS:
            self._events.append(event)
        if event[2] == "tokens":
            story.num_tokens += event[4].get("count", 0)
        elif len(story.events) < _MAX_KEPT:
            story.events.append(event)

    def forget(self, peer: str) -> None:
        """The peer left, or its batches begin anew: its load and its latencies are void."""
        self._by_worker.forget(peer)
        self._loads.pop(peer, None)
        self._new_loads.discard(peer)

    # --- updates out

    def take(self, now_s: float) -> dict[str, Any]:
        """What is new since the last call; empty if nothing is."""
        self._stories = {request_id: story for request_id, story in self._stories.items() if now_s <= story.forget_s}
        events, self._events = sorted(self._events, key=lambda event: float(event[0])), []
        counts, self._counts = self._counts, defaultdict(Counter)
        loads, self._new_loads = {peer: self._loads[peer] for peer in self._new_loads}, set()
        update: dict[str, Any] = {"events": events, "counts": counts, "loads": loads}
        if now_s - self._point_s >= 1.0:
            update["point"] = self._end_point(now_s)
            before, self._latencies = self._latencies, self._by_worker.end_second()
            update["latencies"] = {worker: found for worker, found in self._latencies.items() if found != before.get(worker)}
        return {key: value for key, value in update.items() if value}

    def _end_point(self, now_s: float) -> dict[str, Any]:
        """The second that ends now, as the charts show it; None where nothing was measured."""
        elapsed_s, self._point_s = now_s - self._point_s, now_s
        sums, self._sums = self._sums, Counter()
        loads = sum(map(Counter, self._loads.values()), Counter[str]())
        point = {
            "t_ms": self.time_ms(now_s),
            "requests_per_s": round(sums["submit"] / elapsed_s, 1),
            "tokens_per_s": round(sums["tokens"] / elapsed_s, 1),
            "failed": sums["failed"],
            "queued": loads["num_waiting"] + loads["num_tickets"],
            "running": loads["num_running"],
            "ttft_ms": round(statistics.median(self._ttft_ms), 3) if self._ttft_ms else None,
            "itl_ms": round(statistics.median(self._itl_ms), 3) if self._itl_ms else None,
            "cached": self._cache_hits(sums),
        }
        self._ttft_ms, self._itl_ms = [], []
        self._history.append(point)
        return point

    def _cache_hits(self, sums: Counter[str]) -> float | None:
        """Of prompt tokens. Many requests are all hit or all miss, so one second alone says little."""
        self._cached.append((sums["cached_tokens"], sums["prompt_tokens"]))
        num_cached, num_prompt = (sum(pair[rank] for pair in self._cached) for rank in (0, 1))
        return round(num_cached / num_prompt, 4) if num_prompt else None

    def now(self) -> dict[str, Any]:
        """The state, for a page that opens: loads, workers' latencies, the past as points, and the requests that are under way."""
        events: list[Event] = []
        for request_id, story in self._stories.items():
            if story.is_known and not story.is_over:
                events += story.events
                if story.num_tokens:  # tokens are kept as one count: a page needs the progress, not each step
                    events.append([story.events[-1][0], story.events[0][1], "tokens", request_id, {"count": story.num_tokens}])
        events.sort(key=lambda event: float(event[0]))
        return {"loads": self._loads, "latencies": self._latencies, "history": list(self._history), "events": events}


class Reader:
    """One reader's place in the feed. The owner of the reader calls `next` again and again."""

    def __init__(self, snapshot: Callable[[], bytes]) -> None:
        self._snapshot, self._has_news = snapshot, asyncio.Event()
        self._has_news.set()
        self._updates: list[bytes] | None = None
        """None: the reader has missed some, or has just come, and gets the whole state next."""
        self._is_closed = False

    def push(self, update: bytes) -> None:
        """One update more."""
        if self._updates is not None:
            self._updates = [*self._updates, update] if len(self._updates) < _MAX_BACKLOG else None
        self._has_news.set()

    def close(self) -> None:
        """The feed ends here."""
        self._is_closed = True
        self._has_news.set()

    async def next(self) -> bytes:
        """What is new, at first the whole state; empty at the end."""
        await self._has_news.wait()
        if self._is_closed:
            return b""
        self._has_news.clear()
        updates, self._updates = self._updates, []
        return self._snapshot() if updates is None else b"".join(updates)


class MeshFeed:
    """Watches all peers while it has readers. All readers get the same updates, at most 5 a second."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._loop = asyncio.get_running_loop()
        self._readers: set[Reader] = set()
        self._watchers: dict[str, Watcher] = {}
        self._peers: dict[str, dict[str, Any]] = {}
        self._gone_s: dict[str, float] = {}
        self._changed: dict[str, None] = {}
        self._merge = Merge(0.0)
        self._timer: asyncio.TimerHandle | None = None
        self._told_s = 0.0
        self._number = 0
        mesh.subscribe(self._on_change)

    # --- readers

    def join(self) -> Reader:
        """One more reader. Raises Overloaded if there are too many."""
        if len(self._readers) >= MAX_READERS:
            raise Overloaded(f"{MAX_READERS} readers follow this frontend's events already")
        if not self._readers:
            self._begin()
        reader = Reader(self._snapshot)
        self._readers.add(reader)
        return reader

    def leave(self, reader: Reader) -> None:
        """This reader reads no more. Without readers the feed stands still."""
        self._readers.discard(reader)
        if not self._readers:
            self._end()

    def close(self) -> None:
        """End all readers' streams."""
        for reader in self._readers:
            reader.close()
        self._readers.clear()
        self._end()

    def _begin(self) -> None:
        self._merge = Merge(time.monotonic())
        self._show(self._mesh.own, None)
        self._follow(self._mesh.incarnation)
        for member in self._mesh.links.membership.listed():
            self._show(member.info, member)
            if member.is_callable:
                self._follow(member.info.incarnation)
        self._changed.clear()
        self._timer = self._loop.call_later(INTERVAL_S, self._tick)

    def _end(self) -> None:
        for watcher in self._watchers.values():
            watcher.close()
        for state in (self._watchers, self._peers, self._gone_s, self._changed):
            state.clear()
        if self._timer is not None:
            self._timer.cancel()

    # --- peers

    def _on_change(self, change: Change, member: Member) -> None:
        if not self._readers:
            return
        incarnation = member.info.incarnation
        if change in (Change.DIED, Change.LEFT):
            self._forget(incarnation, "dead" if change is Change.DIED else "left")
            return
        self._show(member.info, member)
        if change is Change.CALLABLE:
            self._follow(incarnation)

    def _follow(self, incarnation: str) -> None:
        def on_change(batch: FeedBatch) -> None:
            self._merge.add(incarnation, batch, time.monotonic())

        if incarnation not in self._watchers:
            forget = partial(self._merge.forget, incarnation)
            self._watchers[incarnation] = Watcher(self._mesh, incarnation, FEED, on_reset=forget, on_change=on_change)

    def _forget(self, incarnation: str, state: str) -> None:
        if watcher := self._watchers.pop(incarnation, None):
            watcher.close()
        self._merge.forget(incarnation)
        if incarnation in self._peers:
            self._peers[incarnation] = {**self._peers[incarnation], "state": state, "since_ms": self._merge.time_ms(time.monotonic())}
            self._gone_s[incarnation] = time.monotonic()
            self._changed[incarnation] = None

    def _show(self, info: PeerInfo, member: Member | None) -> None:
        """`member` is None for this very peer."""
        known, state, host = self._peers.get(info.incarnation), "alive", info.addresses[0]
        if member is not None:
            state = member.state.value if member.is_callable or member.was_cut else "joining"
            host = member.shown_address
        state = "draining" if info.is_draining else state
        is_same_state = known is not None and known["state"] == state
        self._gone_s.pop(info.incarnation, None)
        self._changed[info.incarnation] = None
        self._peers[info.incarnation] = {
            "id": info.incarnation,
            "name": self._mesh.name_of(info.incarnation),
            "roles": list(info.roles),
            "model": info.card.model if info.card else None,
            "block_bytes": info.layout.block_bytes if info.layout else None,
            "address": endpoint(host, info.port),
            "version": info.version,
            "state": state,
            "since_ms": known["since_ms"] if known is not None and is_same_state else self._merge.time_ms(time.monotonic()),
        }

    def _drop_gone(self, now_s: float) -> list[str]:
        """Peers that are not shown any more: gone for long, or the first of too many that are gone."""
        num_surplus = len(self._gone_s) - _MAX_GONE
        dropped = [peer for rank, (peer, gone_s) in enumerate(self._gone_s.items()) if rank < num_surplus or now_s - gone_s > _GONE_S]
        for peer in dropped:
            del self._gone_s[peer], self._peers[peer]
            self._changed.pop(peer, None)
        return dropped

    # --- what readers get

    def _tick(self) -> None:
        now_s = time.monotonic()
        self._timer = self._loop.call_later(INTERVAL_S, self._tick)
        update = self._merge.take(now_s)
        if dropped := self._drop_gone(now_s):
            update["dropped"] = dropped
        if self._changed:
            update["peers"] = [self._peers[peer] for peer in self._changed]
            self._changed.clear()
        if "point" in update:
            update["rtt_ms"] = self._round_trips()
        if not update and now_s - self._told_s < _KEEP_ALIVE_S:
            return
        self._told_s = now_s
        message = self._message("update", {"t_ms": self._merge.time_ms(now_s), **update})
        for reader in self._readers:
            reader.push(message)

    def _round_trips(self) -> dict[str, float]:
        members = self._mesh.links.membership.listed()
        return {member.info.incarnation: round(member.rtt_ms, 3) for member in members if member.rtt_ms is not None}

    def _snapshot(self) -> bytes:
        own = self._mesh.own
        state = {
            "t_ms": self._merge.time_ms(time.monotonic()),
            "mesh": own.mesh,
            "frontend": own.incarnation,
            "peers": list(self._peers.values()),
            "rtt_ms": self._round_trips(),
            **self._merge.now(),
        }
        return self._message("snapshot", state)

    def _message(self, event: str, data: dict[str, Any]) -> bytes:
        """As server-sent events (HTML Standard, section 9.2)."""
        self._number += 1
        return f"id: {self._number}\nretry: {RETRY_MS}\nevent: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
