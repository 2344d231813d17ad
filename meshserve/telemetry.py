"""What every floor may report to: counts, durations, stopwatches, an event log. It knows nobody, and costs next to nothing."""

import json
import logging
import os
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import add
from typing import Any, Protocol

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histograms' buckets: from a hop on loopback to a prompt of 100,000 tokens on one GPU."""

_NOTED_AT_ONCE = 256
"""Durations: to sort so many takes 0.1 ms. More take more memory, fewer more time."""


def log_event(logger: logging.Logger, event: str, text: str, **fields: Any) -> None:
    """One line at level info on something worth a person's time; with `--log-json`, `event` and the fields stand beside the text."""
    logger.info("%s", text, extra={"event": event, "fields": fields})


class Counters:
    """Named counts since the process started. One instance a peer; cheap enough for every message."""

    def __init__(self) -> None:
        self._values: defaultdict[str, int] = defaultdict(int)
        self._derived: dict[str, Callable[[], int]] = {}

    def derive(self, name: str, count: Callable[[], int]) -> None:
        """Whoever counts `name` anyway is asked for it when somebody looks: counting costs nothing then."""
        self._derived[name] = count

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` more of `name`, e.g. `frames_malformed`."""
        self._values[name] += amount

    def snapshot(self) -> Mapping[str, int]:
        """All counts that were ever added to, and those derived."""
        return {**self._values, **{name: count() for name, count in self._derived.items()}}


class Gauges:
    """What is held at this moment, by name: whoever holds it is asked when somebody looks, and pays nothing otherwise."""

    def __init__(self) -> None:
        self._levels: dict[str, Callable[[], int]] = {}

    def derive(self, name: str, level: Callable[[], int]) -> None:
        """So many of `name`, e.g. `bookings`, are held now."""
        self._levels[name] = level

    def snapshot(self) -> dict[str, int]:
        """All levels."""
        return {name: level() for name, level in self._levels.items()}


class Histograms:
    """Named distributions of durations since the process started. One instance a peer.

    Durations are noted as they come and sorted into buckets many at a time: one at a time takes ten times as long. What is noted in a
    part is in the whole too: they are added up when somebody looks, so that keeping them apart costs nothing until then.
    """

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._sums_s: defaultdict[str, float] = defaultdict(float)
        self._noted: defaultdict[tuple[str, ...], list[Any]] = defaultdict(list)
        """By names: durations, or what a reader finds one of each name in."""
        self._readers: dict[tuple[str, ...], Callable[[Any], tuple[float, ...]]] = {}
        self._parts: dict[str, Histograms] = {}
        self._told_s: defaultdict[str, float] = defaultdict(float)
        """The sums when somebody last looked."""

    def observe(self, name: str, duration_s: float) -> None:
        """One more duration of `name`, e.g. `prefill_wait`."""
        self._note((name,), duration_s)

    def read_from(self, names: tuple[str, ...], durations_s: Callable[[Any], tuple[float, ...]]) -> Callable[[Any], None]:
        """A function that notes objects which hold one duration of each of these; to be called once for these names. The objects are read
        when they are counted, so nobody may change them any more.
        """
        assert names not in self._readers and names not in self._noted
        self._readers[names] = durations_s
        return partial(self._note, names)

    def _note(self, names: tuple[str, ...], noting: Any) -> None:
        noted = self._noted[names]
        noted.append(noting)
        if len(noted) >= _NOTED_AT_ONCE:
            self._count(names)

    def _count(self, names: tuple[str, ...]) -> None:
        noted, self._noted[names] = self._noted[names], []
        read = self._readers.get(names)
        columns = zip(*map(read, noted), strict=True) if read is not None else (noted,)
        for name, durations_s in zip(names, map(sorted, columns), strict=False):
            counts, num_counted = self.counts_of(name), 0
            self._sums_s[name] += sum(durations_s)
            for bucket, bound_s in enumerate(BUCKETS_S):
                num_below = bisect_right(durations_s, bound_s)
                counts[bucket] += num_below - num_counted
                num_counted = num_below
            counts[-1] += len(durations_s) - num_counted

    def counts_of(self, name: str) -> list[int]:
        """The counts between the bounds, for who adds to them where an `observe` would cost too much, and then to the sum."""
        counts = self._counts.get(name)
        if counts is None:
            counts = self._counts[name] = [0] * (len(BUCKETS_S) + 1)
        return counts

    def add_to_sum(self, name: str, duration_s: float) -> None:
        """What was added to the counts took so long in all."""
        self._sums_s[name] += duration_s

    def part(self, of: str) -> "Histograms":
        """Of one alone, e.g. of one worker's requests; made when it is first asked for."""
        part = self._parts.get(of)
        if part is None:
            part = self._parts[of] = Histograms()
        return part

    def fold(self, of: str) -> None:
        """There is no such part any more; what was noted in it stays in the whole. Nobody may note anything in it afterwards."""
        part = self._parts.pop(of, None)
        for name, (sum_s, counts) in (part.snapshot() if part is not None else {}).items():
            own = self.counts_of(name)
            own[:] = map(add, own, counts)
            self._sums_s[name] += sum_s

    def snapshot(self) -> dict[str, Any]:
        """By name: the sum in seconds, and the counts between the bounds of `BUCKETS_S`, the last one above all of them. Neither ever
        falls, whatever is folded.
        """
        for names in list(self._noted):
            self._count(names)
        own = {name: [self._sums_s[name], counts[:]] for name, counts in self._counts.items()}
        whole = added_up([own, *self.parts().values()])
        for name, found in whole.items():  # after a fold the same sum, added up in another order, may round to less
            found[0] = self._told_s[name] = max(found[0], self._told_s[name])
        return whole

    def parts(self) -> dict[str, dict[str, Any]]:
        """The same of each part."""
        return {of: part.snapshot() for of, part in self._parts.items()}


def added_up(snapshots: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Several snapshots of histograms as one: as if all durations had been noted in one place."""
    total: dict[str, Any] = {}
    for snapshot in snapshots:
        for name, (sum_s, counts) in snapshot.items():
            known_s, known = total.get(name, (0.0, [0] * len(counts)))
            total[name] = [known_s + sum_s, list(map(add, known, counts))]
    return total


class Listener(Protocol):
    """Who is told of an event log's events as they happen. It must not block."""

    def heard(self, event: str, request_id: str, details: dict[str, Any]) -> None:
        """One event of a request."""

    def follows(self, request_id: str) -> bool:
        """Whether every step of this request is wanted, or only its beginning and its end."""


class EventLog:
    """What happened to each request on this peer: for tests, for people who look for a fault, and for those who watch the mesh.

    It has two consumers, a file and a listener; with neither it is off and keeps nothing: callers ask `is_on` before they make up an
    event. In the file an event is one line of JSON, and is there when `note` returns, so that a killed process takes none with it.
    Times are of the host's monotonic clock, which all its processes share.
    """

    def __init__(self, path: str | None = None) -> None:
        self.is_on = path is not None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if path is not None else -1
        self._listener: Listener | None = None
        self._peer = ""

    def begin(self, peer: str) -> None:
        """All events from now on are this peer's (an incarnation)."""
        self._peer = peer

    def listen(self, listener: Listener | None) -> None:
        """Tell this one of every event from now on; None: nobody any more."""
        self._listener = listener
        self.is_on = listener is not None or self._descriptor >= 0

    def follows(self, request_id: str) -> bool:
        """Whether anybody wants the steps of this request too. Asked once its beginning was noted; most requests under load are not
        followed, and need not pay for it."""
        return self.is_on and (self._descriptor >= 0 or (self._listener is not None and self._listener.follows(request_id)))

    def note(self, event: str, request_id: str, **details: Any) -> None:
        """One event, e.g. `ticket` or `block`, of a request."""
        if self._listener is not None:
            self._listener.heard(event, request_id, details)
        if self._descriptor >= 0:
            line = json.dumps({"at_s": time.monotonic(), "peer": self._peer, "event": event, "request": request_id, **details})
            os.write(self._descriptor, line.encode() + b"\n")

    def close(self) -> None:
        """No more events."""
        self.is_on, self._listener = False, None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Phases:
    """The phases of one request on this peer's monotonic clock: each ends where the next begins, so that they partition the time."""

    __slots__ = ("began_s", "last_s")

    def __init__(self) -> None:
        self.began_s = self.last_s = time.monotonic()
        """When the request came, and when its last phase ended."""

    def end(self) -> float:
        """Everything since the last call was one phase; returns its milliseconds."""
        last_s, self.last_s = self.last_s, time.monotonic()
        return (self.last_s - last_s) * 1000

    def total_ms(self) -> float:
        """Since the request came."""
        return (time.monotonic() - self.began_s) * 1000
