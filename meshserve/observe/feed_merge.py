"""The batches of all peers, merged into what one page can show: a few requests followed from peer to peer, and a point a second. Pure."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshserve.errors import ProtocolError
from meshserve.observe.feed import MAX_EVENTS, MAX_FOLLOWED, MAX_NEW_PER_S, MAX_SAMPLES
from meshserve.observe.latencies import NAMES, Counts, WorkerLatencies
from meshserve.telemetry import BUCKETS_S

HISTORY_S = 120
"""Points of the past that a page gets when it opens."""

_STRAY_S = 1.0
"""Peers' batches are not in step: word of a request may be here before its beginning is, or after its end."""
_SILENT_S = 180.0
_CACHED_S = 10
"""Points that a cache hit rate is of."""
_MAX_KEPT = 24
"""Events of one request kept for pages that open while it runs."""
_MAX_STORIES = 512
"""Requests of which there is word, most of them not followed from their beginning: peers choose what to follow each for itself."""
_MAX_WORKERS = 1024
"""Of which one processor tells."""
_MAX_TEXT, _MAX_ITEMS, _MAX_DEPTH = 256, 32, 4

Event = list[Any]
"""[milliseconds since the feed began, peer, event, request, details]"""


def plain(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """A peer's data as JSON can hold it, cut to a bounded size. Raises ProtocolError for what has no place in it."""
    if isinstance(value, str):
        return value[:_MAX_TEXT]
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if depth and isinstance(value, list):
        return [plain(item, depth - 1) for item in value[:_MAX_ITEMS]]
    if depth and isinstance(value, dict) and len(value) <= _MAX_ITEMS and all(isinstance(key, str) for key in value):
        return {key: plain(item, depth - 1) for key, item in value.items()}
    raise ProtocolError("a batch holds text, numbers, lists and maps")


def _numbers(value: Any) -> list[float]:
    if not isinstance(value, list) or not all(type(item) in (int, float) and math.isfinite(item) for item in value):
        raise ProtocolError("times are numbers")
    return value[:MAX_SAMPLES]


def _counts(value: Any) -> dict[str, int]:
    if not isinstance(value, dict) or not all(isinstance(key, str) and type(count) is int for key, count in value.items()):
        raise ProtocolError("counts are integers by name")
    return dict(list(value.items())[:_MAX_ITEMS])


def _latencies(value: Any) -> dict[str, Counts]:
    if not isinstance(value, dict) or not all(isinstance(key, str) and isinstance(of_names, dict) for key, of_names in value.items()):
        raise ProtocolError("latencies are counts by worker")
    found = {worker[:_MAX_TEXT]: {name: of_names[name] for name in NAMES if name in of_names} for worker, of_names in value.items()}
    if len(found) > _MAX_WORKERS or not all(map(_is_buckets, (counts for of_names in found.values() for counts in of_names.values()))):
        raise ProtocolError("latencies are counts of as many buckets as there are, of a bounded number of workers")
    return found


def _is_buckets(value: Any) -> bool:
    return isinstance(value, list) and len(value) == len(BUCKETS_S) + 1 and all(type(count) is int and count >= 0 for count in value)


@dataclass(slots=True)
class Batch:
    """What one peer says happened since it last spoke."""

    events: list[tuple[float, str, str, dict[str, Any]]]
    counts: dict[str, int]
    ttft_ms: list[float]
    itl_ms: list[float]
    load: dict[str, int] | None
    latencies: dict[str, Counts] | None
    """By worker, all that the peer counts, if it is a processor and has more to tell."""

    @classmethod
    def from_wire(cls, data: Any) -> "Batch":
        """Raises ProtocolError for anything else; unknown fields are ignored."""
        if not isinstance(data, dict) or not isinstance(data.get("events", []), list):
            raise ProtocolError("malformed batch of events")
        events = []
        for item in data.get("events", [])[:MAX_EVENTS]:
            if not isinstance(item, list) or len(item) < 4 or not isinstance(item[1], str) or not isinstance(item[3], dict):
                raise ProtocolError("malformed event")
            events.append((_numbers([item[0]])[0], item[1][:_MAX_TEXT], str(item[2])[:_MAX_TEXT], plain(item[3])))
        load = _counts(data["load"]) if data.get("load") is not None else None
        latencies = _latencies(data["latencies"]) if data.get("latencies") is not None else None
        counts = _counts(data.get("counts", {}))
        return cls(events, counts, _numbers(data.get("ttft_ms", [])), _numbers(data.get("itl_ms", [])), load, latencies)


@dataclass(slots=True)
class _Story:
    forget_s: float
    is_known: bool = False
    is_over: bool = False
    num_tokens: int = 0
    events: list[Event] = field(default_factory=list)


class Merge:
    """Takes the batches of all peers; `take` gives what is new, `now` what a page must know that opens at this moment."""

    def __init__(self, now_s: float) -> None:
        self._began_s = self._point_s = self._second_s = now_s
        self._num_begun = 0
        self._stories: dict[str, _Story] = {}
        self._events: list[Event] = []
        self._loads: dict[str, dict[str, int]] = {}
        self._new_loads: set[str] = set()
        self._by_worker = WorkerLatencies()
        self._latencies: dict[str, Any] = {}
        self._counts: dict[str, dict[str, int]] = {}
        self._sums: dict[str, int] = {}
        self._ttft_ms: list[float] = []
        self._itl_ms: list[float] = []
        self._cached: deque[tuple[int, int]] = deque(maxlen=_CACHED_S)
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY_S)

    def time_ms(self, now_s: float) -> float:
        """Of this feed: since it began."""
        return round((now_s - self._began_s) * 1000, 1)

    # --- what comes in

    def add(self, peer: str, batch: Batch, now_s: float) -> None:
        """One batch of this peer."""
        for age_ms, event, request_id, details in batch.events:
            self._add_event([self.time_ms(now_s - age_ms / 1000), peer, event, request_id, details], now_s)
        counts = self._counts.setdefault(peer, {})
        for name, count in batch.counts.items():
            counts[name] = counts.get(name, 0) + count
            self._sums[name] = self._sums.get(name, 0) + count
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
            if len(self._stories) < _MAX_STORIES:
                self._stories[request_id] = _Story(now_s + _STRAY_S, events=[event])
        elif story.is_known:
            self._keep(story, event)
            if kind == "result":
                story.is_over, story.forget_s = True, now_s + _STRAY_S
        elif len(story.events) < _MAX_KEPT:
            story.events.append(event)

    def _begin(self, story: _Story, submit: Event, now_s: float) -> None:
        early, story.events = story.events, []
        story.is_known, story.forget_s = True, now_s + _SILENT_S
        self._stories[submit[3]] = story
        for event in [submit, *early]:
            self._keep(story, event)

    def _can_begin(self, now_s: float) -> bool:
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
        """It left, or began anew: its load says nothing any more, nor what it counted."""
        self._by_worker.forget(peer)
        self._loads.pop(peer, None)
        self._new_loads.discard(peer)

    # --- what goes out

    def take(self, now_s: float) -> dict[str, Any]:
        """What is new since the last call; empty if nothing is."""
        self._drop_old(now_s)
        events, self._events = sorted(self._events, key=lambda event: float(event[0])), []
        counts, self._counts = {peer: counts for peer, counts in self._counts.items() if counts}, {}
        loads, self._new_loads = {peer: self._loads[peer] for peer in self._new_loads}, set()
        update: dict[str, Any] = {"events": events, "counts": counts, "loads": loads}
        if now_s - self._point_s >= 1.0:
            update["point"] = self._end_point(now_s)
            update["latencies"] = self._end_latencies()
        return {key: value for key, value in update.items() if value}

    def _drop_old(self, now_s: float) -> None:
        for request_id, story in list(self._stories.items()):
            if now_s > story.forget_s:
                del self._stories[request_id]

    def _end_point(self, now_s: float) -> dict[str, Any]:
        """The second that ends now, as the charts show it; None where nothing was measured."""
        elapsed_s, self._point_s = now_s - self._point_s, now_s
        sums, self._sums = self._sums, {}
        point = {
            "t_ms": self.time_ms(now_s),
            "requests_per_s": round(sums.get("submit", 0) / elapsed_s, 1),
            "tokens_per_s": round(sums.get("tokens", 0) / elapsed_s, 1),
            "failed": sums.get("failed", 0),
            "queued": _total(self._loads.values(), "num_waiting", "num_tickets"),
            "running": _total(self._loads.values(), "num_running"),
            "ttft_ms": round(statistics.median(self._ttft_ms), 3) if self._ttft_ms else None,
            "itl_ms": round(statistics.median(self._itl_ms), 3) if self._itl_ms else None,
            "cached": self._cache_hits(sums),
        }
        self._ttft_ms, self._itl_ms = [], []
        self._history.append(point)
        return point

    def _end_latencies(self) -> dict[str, Any]:
        """Of workers whose latencies are others than a second ago."""
        before, self._latencies = self._latencies, self._by_worker.end_second()
        return {worker: found for worker, found in self._latencies.items() if found != before.get(worker)}

    def _cache_hits(self, sums: Mapping[str, int]) -> float | None:
        """Of prompt tokens, over the last seconds: a request is all hit or all miss so often that a second alone says little."""
        self._cached.append((sums.get("cached_tokens", 0), sums.get("prompt_tokens", 0)))
        num_cached, num_prompt = (sum(pair[rank] for pair in self._cached) for rank in (0, 1))
        return round(num_cached / num_prompt, 4) if num_prompt else None

    def now(self) -> dict[str, Any]:
        """The state, for a page that opens: loads, workers' latencies, the past as points, and the requests that are under way."""
        events: list[Event] = []
        for request_id, story in self._stories.items():
            if story.is_known and not story.is_over:
                events += story.events
                if story.num_tokens:
                    events.append([story.events[-1][0], story.events[0][1], "tokens", request_id, {"count": story.num_tokens}])
        events.sort(key=lambda event: float(event[0]))
        return {"loads": self._loads, "latencies": self._latencies, "history": list(self._history), "events": events}


def _total(loads: Iterable[Mapping[str, int]], *names: str) -> int:
    return sum(load.get(name, 0) for load in loads for name in names)
