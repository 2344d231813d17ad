"""Counters, gauges, histograms, an event log: every floor reports to them. Costs next to nothing."""

import errno
import json
import logging
import math
import os
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

_log = logging.getLogger(__name__)

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the histograms' buckets: from a hop on loopback to a prompt of 100,000 tokens on one GPU."""

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


ACCESS_LOGGER = "meshserve.access"
"""Has a line for each HTTP request. None of them is held back as a repeat."""

RequestKey = tuple[str, int, str, str]
"""Route, status, code ("" if all went well) and model of HTTP requests. Each has few values."""
RequestCounts = dict[RequestKey, int]
MAX_REQUEST_COUNTS = 1024
"""Keys that one frontend counts under."""


def log_event(logger: logging.Logger, event: str, text: str, level: int = logging.INFO, **fields: Any) -> None:
    """Logs one line; with `--log-json`, `event` and the fields stand beside the text."""
    logger.log(level, "%s", text, extra={"event": event, "fields": fields})


def printable(text: str) -> str:
    """The text with a question mark for each letter that could steer a terminal: for what others sent."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


class Counters:
    """Named counts since the process started. One instance a peer; cheap enough for every message."""

    def __init__(self) -> None:
        self._values: defaultdict[str, int] = defaultdict(int)
        self._derived: dict[str, Callable[[], int]] = {}

    def derive(self, name: str, count: Callable[[], int]) -> None:
        """Registers a counter whose value is computed when it is read: counting costs nothing then."""
        self._derived[name] = count

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` more of `name`, e.g. `frames_malformed`."""
        self._values[name] += amount

    def snapshot(self) -> Mapping[str, int]:
        """All counters that were ever added to, and the derived ones."""
        return {**self._values, **{name: count() for name, count in self._derived.items()}}


class Gauges:
    """Named gauges of what a peer holds at this moment. Each is computed when it is read, and costs nothing otherwise."""

    def __init__(self) -> None:
        self._derived: dict[str, Callable[[], int]] = {}

    def derive(self, name: str, level: Callable[[], int]) -> None:
        """Registers a gauge, e.g. `connections`, whose value is computed when it is read."""
        self._derived[name] = level

    def snapshot(self) -> dict[str, int]:
        """All gauges."""
        return {name: level() for name, level in self._derived.items()}


class Histogram:
    """Durations in seconds, counted in buckets: one up to each of `bounds_s`, and one for what is longer than the last bound.

    The sum and the longest duration are exact. A quantile is as exact as its bucket is narrow: benchmarks have buckets of 0.1 %.
    """

    __slots__ = ("bounds_s", "counts", "most_s", "sum_s")

    def __init__(self, bounds_s: Sequence[float] = BUCKETS_S) -> None:
        self.bounds_s = bounds_s
        self.counts: defaultdict[int, int] = defaultdict(int)
        """By bucket. A hot loop may add to them in line, and to the sum afterwards."""
        self.sum_s = self.most_s = 0.0

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> "Histogram":
        """From :meth:`to_row` of another peer, which lacks the longest duration: a longer one counts as the last bound."""
        made = cls()
        made.sum_s, counts = row
        made.counts.update({bucket: count for bucket, count in enumerate(counts) if count})
        made.most_s = BUCKETS_S[-1]
        return made

    def to_row(self) -> list[Any]:
        """The sum, and the counts of all buckets in order."""
        return [self.sum_s, [self.counts.get(bucket, 0) for bucket in range(len(self.bounds_s) + 1)]]

    def observe(self, duration_s: float) -> None:
        """One more duration; a negative one counts as 0."""
        duration_s = duration_s if duration_s > 0 else 0.0
        self.counts[bisect_left(self.bounds_s, duration_s)] += 1
        self.sum_s += duration_s
        if duration_s > self.most_s:
            self.most_s = duration_s

    def observe_all(self, durations_s: Sequence[float]) -> None:
        """Several at once, none of them negative."""
        for bucket, count in Counter(map(bisect_left, repeat(self.bounds_s), durations_s)).items():
            self.counts[bucket] += count
        self.sum_s += sum(durations_s)
        self.most_s = max((self.most_s, *durations_s))

    def add(self, other: "Histogram") -> None:
        """All that the other one counted, between the same bounds."""
        for bucket, count in other.counts.items():
            self.counts[bucket] += count
        self.sum_s += other.sum_s
        self.most_s = max(self.most_s, other.most_s)

    @property
    def count(self) -> int:
        """How many durations."""
        return sum(self.counts.values())

    @property
    def mean_ms(self) -> float:
        """NaN if there are none."""
        return self.sum_s * 1000 / self.count if self.counts else math.nan

    def quantile_ms(self, share: float) -> float:
        """What `share` of the durations do not exceed, as if those of each bucket lay evenly in it; NaN if there are none."""
        num_left = share * self.count - 1e-9  # such as 0.999 of 1000, which is a little more than 999 as a float
        for bucket, count in sorted(self.counts.items()):
            num_left -= count
            if num_left <= 0:
                low_s, high_s = self._bounds_of(bucket)
                return min(high_s, self.most_s, low_s + (high_s - low_s) * (1 + num_left / count)) * 1000
        return math.nan

    def since(self, before: "Histogram | None") -> "Histogram":
        """What was counted since this was `before`; all of it if there is no such difference."""
        if before is None:
            return self
        changes = [self.counts.get(bucket, 0) - before.counts.get(bucket, 0) for bucket in range(len(self.bounds_s) + 1)]
        return Histogram.of_row((self.sum_s - before.sum_s, changes)) if any(changes) and min(changes) >= 0 else self

    def _bounds_of(self, bucket: int) -> tuple[float, float]:
        low_s = self.bounds_s[bucket - 1] if bucket else 0.0
        return low_s, self.bounds_s[bucket] if bucket < len(self.bounds_s) else low_s

    def steps(self) -> Iterator[tuple[float, float]]:
        """The cumulative distribution: (milliseconds, share of durations up to that), rising."""
        num_seen, total = 0, self.count
        for bucket, count in sorted(self.counts.items()):
            num_seen += count
            yield min(self._bounds_of(bucket)[1], self.most_s) * 1000, num_seen / total

    def to_dict(self) -> dict[str, float | int]:
        """For people: the count, and figures in milliseconds if it is not 0."""
        if not self.counts:
            return {"count": 0}
        found: dict[str, float | int] = {"count": self.count, "mean": round(self.mean_ms, 4)}
        found.update({name: round(self.quantile_ms(share), 4) for name, share in QUANTILES.items()})
        return {**found, "max": round(self.most_s * 1000, 4)}


class Histograms:
    """Histograms by name, of all durations since the process started. One instance a peer.

    The whole includes its parts: they are added up when they are read, so that parts cost nothing until then.
    """

    def __init__(self) -> None:
        self.named: defaultdict[str, Histogram] = defaultdict(Histogram)
        """Such as `prefill_wait`; made when first asked for."""
        self.parts: defaultdict[str, Histograms] = defaultdict(Histograms)
        """Subsets, e.g. of one worker's requests; made when first asked for."""
        self.before_reading: list[Callable[[], None]] = []
        """Count what was put aside, so that no request waits for it."""
        self._told_s: defaultdict[str, float] = defaultdict(float)
        """The sums as they were last read."""

    def fold(self, of: str) -> None:
        """End this part; its counts stay in the whole. Nobody may add to it afterwards."""
        part = self.parts.pop(of, None)
        for name, histogram in part.named.items() if part is not None else ():
            self.named[name].add(histogram)

    def snapshot(self) -> dict[str, Any]:
        """By name: the row of each that counted something. Neither sums nor counts ever fall."""
        for count_rest in self.before_reading:
            count_rest()
        whole: defaultdict[str, Histogram] = defaultdict(Histogram)
        for histograms in (self, *self.parts.values()):
            for name, histogram in histograms.named.items():
                whole[name].add(histogram)
        rows = _rows(whole)
        for name, row in rows.items():  # after a fold the same sum, added up in another order, may round to less
            row[0] = self._told_s[name] = max(row[0], self._told_s[name])
        return rows

    def snapshot_parts(self) -> dict[str, dict[str, Any]]:
        """The same of each part."""
        return {of: _rows(part.named) for of, part in self.parts.items()}


def _rows(named: Mapping[str, Histogram]) -> dict[str, Any]:
    return {name: histogram.to_row() for name, histogram in named.items() if histogram.counts}


def added_up(snapshots: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Several snapshots of histograms as one: as if all durations had been counted in one place."""
    total: defaultdict[str, Histogram] = defaultdict(Histogram)
    for snapshot in snapshots:
        for name, row in snapshot.items():
            total[name].add(Histogram.of_row(row))
    return _rows(total)


class EventLog:
    """What happened to each request on this peer: for tests, for people who look for a fault, and for the event feed.

    The log has two consumers, a file and a listener. Without either it is off: callers ask `is_on` before
    they make an event. In the file an event is one line of JSON, written when `note` returns, so that a
    killed process loses none. Times are of the monotonic clock that all processes of a host share.

    A file that takes no more (a full disk, a FIFO that nobody reads) ends the recording, with one warning, and nothing else.
    """

    def __init__(self, path: str | None = None) -> None:
        """Raises OSError if the file cannot be opened."""
        self.is_on = path is not None
        self._path, self._descriptor = path, -1
        self._heard: Callable[[str, str, dict[str, Any]], None] | None = None
        self._follows: Callable[[str], bool] | None = None
        self._peer = ""
        if path is not None:
            # non-blocking, which means nothing for files on disk: a FIFO is neither waited for here nor at a write
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK
            try:
                self._descriptor = os.open(path, flags, 0o644)
            except OSError as error:
                if error.errno != errno.ENXIO:  # a FIFO that nobody has opened for reading
                    raise
                self._stop_recording("nobody reads it")

    def begin(self, peer: str) -> None:
        """All events from now on are this peer's (an incarnation)."""
        self._peer = peer

    def listen(self, heard: Callable[[str, str, dict[str, Any]], None] | None, follows: Callable[[str], bool] | None) -> None:
        """Every event from now on goes to `heard`, with the request and its details; None: to nobody.

        `follows` says whether every step of a request is wanted, or only its beginning and its end.
        """
        self._heard, self._follows = heard, follows
        self.is_on = heard is not None or self._descriptor >= 0

    def follows(self, request_id: str) -> bool:
        """Whether the steps of this request are wanted. To be asked after its beginning was noted: under load
        most requests are not followed, and need not make events of their steps."""
        return self.is_on and (self._descriptor >= 0 or (self._follows is not None and self._follows(request_id)))

    def note(self, event: str, request_id: str, **details: Any) -> None:
        """One event, e.g. `ticket` or `block`, of a request."""
        if self._heard is not None:
            self._heard(event, request_id, details)
        if self._descriptor >= 0:
            line = json.dumps({"at_s": time.monotonic(), "peer": self._peer, "event": event, "request": request_id, **details})
            self._write(line.encode() + b"\n")

    def _write(self, line: bytes) -> None:
        try:
            is_whole = os.write(self._descriptor, line) == len(line)
        except BlockingIOError:
            self._stop_recording("nobody reads it")
        except OSError as error:
            self._stop_recording(error.strerror or type(error).__name__)
        else:
            if not is_whole:  # nothing may follow half a line
                self._stop_recording("it takes no more")

    def _stop_recording(self, reason: str) -> None:
        self._close_file()
        self.is_on = self._heard is not None
        log_event(_log, "record_stopped", f"--record {self._path}: {reason}; nothing is recorded from now on", logging.WARNING)

    def _close_file(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def close(self) -> None:
        """No more events."""
        self.is_on, self._heard = False, None
        self._close_file()
