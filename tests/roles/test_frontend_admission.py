"""Who is let in, who waits and who is turned away: the pure rules, in virtual time."""

import heapq
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.config import FrontendConfig
from meshserve.errors import DeadlineExceeded, MeshserveError, Overloaded, RateLimited
from meshserve.roles.frontend.admission import Admission, Decision, QueueEntry
from meshserve.roles.frontend.admission_slots import share_of, slots_of
from meshserve.wire.routing import WorkerLoad

LIMITS = FrontendConfig()
SWEEP_S = 0.05


@dataclass
class Load:
    """A mesh of `capacity` places, in which each request takes `duration_s`, under requests at given times."""

    capacity: float
    duration_s: float
    limits: FrontendConfig = LIMITS
    is_known: bool = True
    spread: float = 0.0
    """Durations are even within so much of the mean, up and down."""
    waits_s: list[float] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    refused: list[MeshserveError] = field(default_factory=list)
    refused_after_s: list[float] = field(default_factory=list)
    most_waiting: int = 0

    def run(self, arrivals: list[tuple[float, str]]) -> "Load":
        self.admission, self.rng = Admission(self.limits), random.Random(1)
        self.admission.capacity = self.capacity
        self.admission.mean_duration_s = self.duration_s if self.is_known else 0.0
        self.order = itertools.count()
        self.events = [(at_s, next(self.order), client) for at_s, client in arrivals]
        self.ends: list[tuple[float, int, QueueEntry]] = []
        heapq.heapify(self.events)
        sweep_s = SWEEP_S
        while self.events or self.ends or self.admission.num_waiting:
            next_s = min([queue[0][0] for queue in (self.events, self.ends) if queue], default=math.inf)
            if sweep_s <= next_s:
                self._take(self.admission.sweep(sweep_s), sweep_s)
                sweep_s += SWEEP_S
            elif self.ends and self.ends[0][0] == next_s:
                self._take(self.admission.leave(heapq.heappop(self.ends)[2], next_s, is_done=True), next_s)
            else:
                self._arrive(heapq.heappop(self.events)[2], next_s)
            self.most_waiting = max(self.most_waiting, self.admission.num_waiting)
            assert self.admission.num_running <= self.capacity
        return self

    def _arrive(self, client: str, now_s: float) -> None:
        entry = QueueEntry(client, 1, now_s)
        try:
            decisions = self.admission.arrive(entry, now_s)
        except MeshserveError as error:
            self.refused.append(error)
            self.refused_after_s.append(0.0)
            return
        self._take(decisions if entry.is_waiting else [(entry, None)], now_s)

    def _take(self, decisions: list[Decision], now_s: float) -> None:
        for entry, error in decisions:
            if error is None:
                self.waits_s.append(now_s - entry.arrived_s)
                self.served[entry.client] += 1
                duration_s = self.duration_s * self.rng.uniform(1 - self.spread, 1 + self.spread)
                heapq.heappush(self.ends, (now_s + duration_s, next(self.order), entry))
            else:
                self.refused.append(error)
                self.refused_after_s.append(now_s - entry.arrived_s)


def at_rate(per_s: float, until_s: float, client: str = "one", since_s: float = 0.0) -> list[tuple[float, str]]:
    return [(since_s + number / per_s, client) for number in range(int(per_s * (until_s - since_s)))]


def test_row_21_five_times_the_load_fills_every_place_and_whoever_is_served_waited_for_half_a_request_at_most() -> None:
    load = Load(capacity=8, duration_s=1.0).run(at_rate(40, 60))
    assert len(load.waits_s) >= 0.98 * 8 * 60, "no place stays empty"
    assert max(load.waits_s) <= 0.5 + 2 * SWEEP_S
    assert load.most_waiting <= 40 * (LIMITS.standing_s + 1.0), "bounded by time, whatever the count"
    assert all(isinstance(error, Overloaded) for error in load.refused)
    soon = load.refused_after_s[len(load.refused) // 2 :]
    assert max(soon) <= 0.5 + 2 * SWEEP_S, "once the queue stands, nobody waits in vain for long"


def test_retry_after_is_the_time_that_all_who_were_refused_lately_would_take() -> None:
    load = Load(capacity=8, duration_s=1.0).run(at_rate(40, 60))
    last = load.refused[-1]
    assert isinstance(last, Overloaded) and 15 <= last.retry_after_s <= 25, "32 a second are refused, remembered for 5 s, 8 a second served"
    alone = Load(capacity=8, duration_s=0.1, limits=replace(LIMITS, max_queued=0)).run([(0.0, "one")] * 9)
    assert isinstance(alone.refused[0], Overloaded) and alone.refused[0].retry_after_s == 1.0


def test_a_burst_is_served_to_the_last_request() -> None:
    load = Load(capacity=256, duration_s=0.25).run([(number / 1000, "one") for number in range(2000)])
    assert len(load.waits_s) == 2000 and not load.refused


def test_waiting_is_bounded_for_requests_of_unknown_duration_too() -> None:
    load = Load(capacity=1, duration_s=100.0, is_known=False).run(at_rate(10, 5))
    assert len(load.waits_s) == 1 and max(load.refused_after_s) <= LIMITS.max_wait_s + 2 * SWEEP_S


def test_overload_that_ended_is_forgotten() -> None:
    arrivals = at_rate(40, 10) + [(20.0, "one")] * 24
    load = Load(capacity=8, duration_s=1.0).run(arrivals)
    assert sum(wait_s > 1.5 for wait_s in load.waits_s) == 8, (
        "a burst of three times the places is served, though the last wait for two rounds"
    )


def test_a_client_alone_may_use_everything() -> None:
    load = Load(capacity=8, duration_s=1.0).run([(0.0, "one")] * 16)
    assert load.served == {"one": 16} and not load.refused


def test_several_clients_that_wait_get_equal_shares_however_much_they_ask() -> None:
    arrivals = at_rate(40, 60, "greedy") + at_rate(8, 60, "keen") + at_rate(8, 60, "other")
    load = Load(capacity=9, duration_s=1.0, spread=0.5).run(arrivals)
    assert max(load.served.values()) - min(load.served.values()) <= 0.1 * 9 * 60


def test_whoever_asks_for_less_than_a_share_gets_all_of_it_and_waits_little() -> None:
    arrivals = at_rate(80, 60, "greedy") + at_rate(2, 60, "modest", since_s=0.01)
    load = Load(capacity=8, duration_s=1.0).run(arrivals)
    assert load.served["modest"] == 2 * 60 - 1
    assert {error.code for error in load.refused} == {"overloaded", "rate_limit_exceeded"}


def test_more_than_a_share_is_429_only_while_others_wait() -> None:
    admission = Admission(replace(LIMITS, max_queued=4))
    admission.capacity = 2
    for _ in range(6):
        admission.arrive(QueueEntry("greedy", 1, 0.0), 0.0)
    with pytest.raises(Overloaded):
        admission.arrive(QueueEntry("greedy", 1, 0.0), 0.0)
    modest = QueueEntry("modest", 1, 0.0)
    ((_, made_room),) = admission.arrive(modest, 0.0)
    assert modest.is_waiting and isinstance(made_room, Overloaded), "nobody waited when it was refused for the other"
    with pytest.raises(RateLimited):
        admission.arrive(QueueEntry("greedy", 1, 0.0), 0.0)


def test_the_next_place_goes_to_whoever_has_least() -> None:
    admission = Admission(LIMITS)
    admission.capacity = 2
    running = [QueueEntry("greedy", 1, 0.0) for _ in range(2)]
    for entry in [*running, QueueEntry("greedy", 1, 0.0), QueueEntry("modest", 1, 0.1)]:
        admission.arrive(entry, 0.1)
    ((entry, error),) = admission.leave(running[0], 0.2, is_done=True)
    assert (entry.client, error) == ("modest", None)


def test_a_ticket_past_its_requests_deadline_is_refused_for_that() -> None:
    admission = Admission(LIMITS)
    admission.capacity = 1
    admission.arrive(QueueEntry("one", 1, 0.0), 0.0)
    admission.arrive(QueueEntry("one", 1, 0.0, deadline_s=0.3), 0.0)
    assert admission.sweep(0.29) == []
    ((_, error),) = admission.sweep(0.3)
    assert isinstance(error, DeadlineExceeded)


def test_what_wants_more_places_than_there_are_runs_alone() -> None:
    admission = Admission(LIMITS)
    admission.capacity = 4
    heavy, light = QueueEntry("one", 9, 0.0), QueueEntry("two", 1, 0.0)
    admission.arrive(heavy, 0.0)
    admission.arrive(light, 0.0)
    assert not heavy.is_waiting and light.is_waiting
    assert admission.leave(heavy, 1.0, is_done=True) == [(light, None)]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.sampled_from("abc"), st.integers(1, 3)),
        st.tuples(st.just("leave"), st.integers(0, 50), st.booleans()),
        st.tuples(st.just("capacity"), st.integers(0, 6), st.none()),
        st.tuples(st.just("sweep"), st.integers(0, 5), st.none()),
    ),
    max_size=120,
)


@given(STEPS)
def test_whatever_happens_the_books_are_right_and_end_at_zero(steps: list[tuple[str, object, object]]) -> None:
    admission = Admission(replace(LIMITS, max_queued=5, max_wait_s=3.0))
    admission.capacity = 3
    running: list[QueueEntry] = []
    waiting: list[QueueEntry] = []
    now_s = 0.0

    def take(decisions: list[Decision]) -> None:
        for entry, error in decisions:
            waiting.remove(entry)
            if error is None:
                running.append(entry)

    for kind, one, other in steps:
        now_s += 0.1
        if kind == "arrive":
            entry = QueueEntry(str(one), int(str(other)), now_s)
            try:
                decisions = admission.arrive(entry, now_s)
            except (Overloaded, RateLimited):
                continue
            (waiting if entry.is_waiting else running).append(entry)
            take(decisions)
        elif kind == "leave" and running + waiting:
            entry = (running + waiting)[int(str(one)) % len(running + waiting)]
            (running if entry in running else waiting).remove(entry)
            take(admission.leave(entry, now_s, bool(other)))
        elif kind == "capacity":
            take(admission.set_capacity(float(str(one)), now_s))
        elif kind == "sweep":
            now_s += float(str(one))
            take(admission.sweep(now_s))
        assert admission.num_running == sum(entry.weight for entry in running)
        assert admission.num_waiting == len(waiting) <= 5
    for entry in running + waiting[:]:
        take(admission.leave(entry, now_s, True))
    for entry in running[:]:
        take(admission.leave(entry, now_s, True))
    assert not admission.num_running and not admission.num_waiting and not admission._clients and not admission._waiting


@pytest.mark.parametrize(
    ("loads", "own_peak", "num_frontends", "share"),
    [
        ([WorkerLoad(max_running=8), WorkerLoad(max_running=8)], 0, 1, 16),
        ([WorkerLoad(num_running=8, max_running=8), None], 0, 1, math.inf),
        ([WorkerLoad(num_running=8)], 8, 1, math.inf),
        ([WorkerLoad(num_running=6, max_running=8)], 6, 1, 8),
        ([WorkerLoad(num_running=6, max_running=8)], 2, 1, 4),
        ([WorkerLoad(num_running=8, num_waiting=8, max_running=8)], 0, 3, 2),
        ([WorkerLoad(num_running=2, num_waiting=9, max_running=8)], 11, 1, 10),
        ([], 0, 1, 1),
    ],
)
def test_a_frontend_may_give_what_others_do_not_use_and_an_equal_part_at_least(
    loads: list[WorkerLoad | None], own_peak: int, num_frontends: int, share: float
) -> None:
    assert share_of(loads, own_peak, num_frontends) == share


def test_a_worker_that_lets_many_wait_beside_an_empty_batch_has_no_places_for_more() -> None:
    assert slots_of(WorkerLoad(num_running=3, num_waiting=100, max_running=256)) == 3 + 64
