"""What a run showed: histograms, rates, errors by kind, seconds as they passed. Pure."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from meshserve.cli.bench.requests import RequestRecord
from meshserve.telemetry import Histogram

TIMES = ("ttft", "itl", "tpot", "e2e", "queue")
MAX_SECONDS = 24 * 3600
_BOUNDS_S = tuple(1e-7 * 1.001**rank for rank in range(27_500))
"""From 0.1 us to 24 hours, each bucket 0.1 % wide. The PyPI package `hdrhistogram` does as much, and has no wheel for Linux on ARM,
needs pbr and setuptools at run time and ships no types."""


def fine_histogram(seconds: Iterable[float] = ()) -> Histogram:
    """Of these times; its quantiles are exact to 0.1 %."""
    made = Histogram(_BOUNDS_S)
    for value in seconds:
        made.observe(value)
    return made


@dataclass(frozen=True, slots=True)
class Goal:
    """When a request counts for goodput; None asks nothing."""

    ttft_s: float | None = None
    itl_s: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether anything is asked."""
        return self.ttft_s is not None or self.itl_s is not None

    def is_met(self, record: RequestRecord) -> bool:
        """The first token in time, and the others in time on average: what a reader at this pace never notices."""
        ttft_s, tpot_s = record.ttft_s, record.tpot_s
        if self.ttft_s is not None and (ttft_s is None or ttft_s > self.ttft_s):
            return False
        return self.itl_s is None or tpot_s is None or tpot_s <= self.itl_s


@dataclass(slots=True)
class Second:
    """One second of a run, by when things happened."""

    num_due: int = 0
    num_done: int = 0
    num_errors: int = 0
    num_pieces: int = 0
    ttft: Histogram = field(default_factory=fine_histogram)
    e2e: Histogram = field(default_factory=fine_histogram)


class Tally:
    """Takes records as they end. The window is what rates are measured in: from the end of the warm-up until no more was sent."""

    def __init__(self, goal: Goal, is_keeping_records: bool = False) -> None:
        self.goal = goal
        self.records: list[RequestRecord] | None = [] if is_keeping_records else None
        """The measured ones, if they were to be kept."""
        self.times = {name: fine_histogram() for name in TIMES}
        self.errors: Counter[str] = Counter()
        self.num_done = self.num_good = self.num_pieces = 0
        self.num_prompt_tokens = self.num_cached_tokens = self.num_output_tokens = 0
        self.num_uncounted = 0
        """Answers of which the target did not say how many tokens they have."""
        self.stated_tokens: Counter[str] = Counter()
        """Of a trace: `prompt` and `output` as the trace states them, `prompt_seen` and `output_seen` as the target counted the same."""
        self.num_delayed = self.num_unsent = 0
        """Requests that had to wait for others to end, and requests that were due and never sent."""
        self.seconds: defaultdict[int, Second] = defaultdict(Second)
        self.phases_ms: Counter[str] = Counter()
        self.num_receipts = 0
        self.began_s: float | None = None
        self.ends_s: float | None = None
        """When the window ends; None: with the last answer."""
        self.last_s = 0.0
        self._num_ended_within = self._num_pieces_within = self._num_good_within = 0

    def open_window(self, now_s: float, duration_s: float | None) -> None:
        """The warm-up is over."""
        self.began_s = now_s
        self.ends_s = None if duration_s is None else now_s + duration_s

    def close_window(self, now_s: float) -> None:
        """Before its time."""
        if self.began_s is not None and (self.ends_s is None or self.ends_s > now_s):
            self.ends_s = now_s

    def ended(self, record: RequestRecord) -> None:
        """One more record, measured or not: what was under way when the window opened counts for its rates."""
        self._count_within(record)
        if not record.is_measured:
            return
        assert record.ended_s is not None
        if self.records is not None:
            self.records.append(record)
        self.last_s = max(self.last_s, record.ended_s)
        self.seconds[max(0, self._number(record.due_s))].num_due += 1
        second = self.seconds[max(0, self._number(record.ended_s))]
        if record.error is not None:
            self.errors[record.error] += 1
            second.num_errors += 1
            return
        self._measure(record, second, record.ended_s)

    def _measure(self, record: RequestRecord, second: Second, ended_s: float) -> None:
        times, stamps = self.times, record.times_s
        ttft_s = stamps[0] - record.due_s
        e2e_s = ended_s - record.due_s
        times["ttft"].observe(ttft_s)
        times["e2e"].observe(e2e_s)
        if record.sent_s is not None:
            times["queue"].observe(record.sent_s - record.due_s)
        record_gap = times["itl"].observe
        for before, after in pairwise(stamps):
            record_gap(after - before)
        if record.tpot_s is not None:
            times["tpot"].observe(record.tpot_s)
        self.num_done += 1
        self.num_good += self.goal.is_met(record)
        self.num_pieces += len(stamps)
        second.num_done += 1
        second.ttft.observe(ttft_s)
        second.e2e.observe(e2e_s)
        self._count_tokens(record)

    def _count_tokens(self, record: RequestRecord) -> None:
        ending = record.ending
        self.num_output_tokens += record.num_tokens
        self.num_prompt_tokens += ending.num_prompt_tokens or 0
        self.num_cached_tokens += ending.num_cached_tokens or 0
        self.num_uncounted += ending.num_completion_tokens is None
        request = record.request
        if request.num_prompt_tokens is not None and ending.num_prompt_tokens is not None and ending.num_completion_tokens is not None:
            stated = {"prompt": request.num_prompt_tokens, "output": request.max_tokens}
            seen = {"prompt_seen": ending.num_prompt_tokens, "output_seen": ending.num_completion_tokens}
            self.stated_tokens.update(stated | seen)
        if ending.receipt is not None:
            self.num_receipts += 1
            for phase, milliseconds in ending.receipt.get("phases_ms", {}).items():
                self.phases_ms[phase] += milliseconds

    def _count_within(self, record: RequestRecord) -> None:
        began_s, ends_s, stamps = self.began_s, self.ends_s, record.times_s
        if began_s is None or not stamps:
            return
        num_within = len(stamps)
        if stamps[0] < began_s or (ends_s is not None and stamps[-1] > ends_s):
            num_within = sum(began_s <= stamp and (ends_s is None or stamp <= ends_s) for stamp in stamps)
        self._num_pieces_within += num_within
        self._note_seconds(stamps)
        ended_s = record.ended_s or 0.0
        is_counted = ended_s >= began_s and (record.is_measured if ends_s is None else ended_s <= ends_s)
        if record.error is None and is_counted:
            self._num_ended_within += 1
            self._num_good_within += self.goal.is_met(record)

    def _note_seconds(self, stamps: Sequence[float]) -> None:
        first, last = self._number(stamps[0]), self._number(stamps[-1])
        # most answers are within one second: then no piece is looked at
        counts = {first: len(stamps)} if first == last else Counter(map(self._number, stamps))
        for number, count in counts.items():
            if number >= 0:
                self.seconds[number].num_pieces += count

    def _number(self, now_s: float) -> int:
        """Of the second of the window; negative before it."""
        return min(MAX_SECONDS, int((now_s - (self.began_s or now_s)) // 1))

    # --- figures

    @property
    def window_s(self) -> float:
        """How long rates were measured."""
        if self.began_s is None:
            return 0.0
        return max(1e-9, (self.last_s if self.ends_s is None else self.ends_s) - self.began_s)

    @property
    def requests_per_s(self) -> float:
        """Answers that were completed within the window."""
        return self._num_ended_within / self.window_s if self.window_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Output tokens that came within the window."""
        per_piece = self.num_output_tokens / self.num_pieces if self.num_pieces else 1.0
        return self._num_pieces_within * per_piece / self.window_s if self.window_s else 0.0

    @property
    def goodput(self) -> float:
        """Requests per second that met the goal."""
        return self._num_good_within / self.window_s if self.window_s else 0.0

    @property
    def good_share(self) -> float:
        """Of all requests, failed ones included, that met the goal."""
        return self.num_good / max(1, self.num_done + self.num_errors)

    @property
    def num_errors(self) -> int:
        """Of all kinds."""
        return sum(self.errors.values())

    @property
    def mean_phases_ms(self) -> dict[str, float]:
        """Of a request, by its receipt; empty if there were none."""
        return {phase: total / self.num_receipts for phase, total in self.phases_ms.items()} if self.num_receipts else {}

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        found: dict[str, Any] = {
            "requests": self.num_done,
            "errors": dict(self.errors.most_common()),
            "window_s": round(self.window_s, 4),
            "requests_per_s": round(self.requests_per_s, 3),
            "output_tokens_per_s": round(self.tokens_per_s, 2),
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "output_tokens": self.num_output_tokens,
            "delayed": self.num_delayed,
            "unsent": self.num_unsent,
        }
        found.update({f"{name}_ms": histogram.to_dict() for name, histogram in self.times.items()})
        if self.goal.is_set:
            found["goodput_per_s"] = round(self.goodput, 3)
            found["good_share"] = round(self.good_share, 5)
        if self.num_receipts:
            found["phases_ms"] = {phase: round(value, 4) for phase, value in self.mean_phases_ms.items()}
            found["receipts"] = self.num_receipts
        return found
