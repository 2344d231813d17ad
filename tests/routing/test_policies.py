"""Rankings as tables, in-flight reservations, and the index against a naive one."""

import random

from hypothesis import given
from hypothesis import strategies as st

from meshserve.kv.pool import PrefixIndex
from meshserve.routing.fleet import RESERVATION_TIMEOUT_S, InFlight, take_load
from meshserve.routing.policies import POLICIES, rank, rank_prefill
from meshserve.routing.workers import Prompt, Worker
from meshserve.wire.routing import WorkerLoad

PROMPT = Prompt(1600, 16, range(100))
RNG = random.Random(5)


def workers(count: int = 3) -> list[Worker]:
    return [Worker(f"w{number}", f"worker {number}", last_chosen=number) for number in range(count)]


def best(policy: str, found: list[Worker], overlaps: list[int] | None = None) -> str:
    return rank(policy, PROMPT, found, overlaps or [0] * len(found), RNG)[0].incarnation


def test_kv_goes_where_the_prefix_is_unless_that_would_take_longer() -> None:
    found = workers()
    assert best("kv", found, [0, 90, 10]) == "w1"
    take_load(found[1], WorkerLoad(waiting_prefill_tokens=4000), 0.0)
    assert best("kv", found, [0, 90, 10]) == "w2"
    InFlight().reserve(found[2], "r", 4000, 0.0)
    assert best("kv", found, [0, 90, 10]) == "w0"


def test_what_is_about_as_good_goes_to_the_one_chosen_longest_ago() -> None:
    found = workers()
    assert best("kv", found, [2, 1, 0]) == "w0"
    found[0].last_chosen = 9
    assert best("kv", found, [2, 1, 0]) == "w1"


def test_least_loaded_counts_what_is_in_flight() -> None:
    found = workers()
    InFlight().reserve(found[0], "r", 0, 0.0)
    take_load(found[1], WorkerLoad(num_running=1), 0.0)
    assert best("least-loaded", found) == "w2"


def test_round_robin_takes_turns_and_random_takes_all() -> None:
    found, turns = workers(), []
    for number in range(6):
        chosen = best("round-robin", found)
        turns.append(chosen)
        next(worker for worker in found if worker.incarnation == chosen).last_chosen = 10 + number
    assert turns == ["w0", "w1", "w2"] * 2
    assert {best("random", found) for _ in range(50)} == {"w0", "w1", "w2"}


def test_every_candidate_is_named_once_with_a_reason() -> None:
    for policy in POLICIES:
        ranked = rank(policy, PROMPT, workers(), [0, 5, 0], RNG)
        assert sorted(candidate.incarnation for candidate in ranked) == ["w0", "w1", "w2"]
        assert all(candidate.reason for candidate in ranked)
        assert rank(policy, PROMPT, [], [], RNG) == []


def test_prefill_goes_to_the_shorter_queue_or_to_the_prefix() -> None:
    found = workers(2)
    take_load(found[0], WorkerLoad(num_tickets=1), 0.0)
    assert rank_prefill(PROMPT, found, [0, 0])[0].incarnation == "w1"
    assert rank_prefill(PROMPT, found, [95, 0])[0].incarnation == "w0"


@given(st.lists(st.tuples(st.sampled_from(["reserve", "release", "expire"]), st.integers(0, 4), st.integers(0, 1)), max_size=30))
def test_reservations_come_to_nothing_when_all_have_ended(steps: list[tuple[str, int, int]]) -> None:
    found, in_flight, now_s = workers(2), InFlight(), 0.0
    for step, request, which in steps:
        now_s += 0.3
        if step == "reserve":
            in_flight.reserve(found[which], f"r{request}", 100, now_s)
        elif step == "release":
            in_flight.release(found[which].incarnation, f"r{request}")
        else:
            in_flight.expire(now_s)
        assert all(worker.num_in_flight >= 0 and worker.in_flight_tokens == 100 * worker.num_in_flight for worker in found)
    in_flight.expire(now_s + RESERVATION_TIMEOUT_S + 1)
    assert len(in_flight.reservations) == 0 and all(worker.num_in_flight == 0 for worker in found)


HASHES = st.lists(st.integers(0, 12), max_size=6)
OPERATIONS = st.lists(st.tuples(st.sampled_from(["stored", "evicted", "forget"]), st.sampled_from(["a", "b", "c"]), HASHES), max_size=30)


@given(OPERATIONS, HASHES)
def test_the_index_knows_what_a_naive_one_knows(operations: list[tuple[str, str, list[int]]], prompt: list[int]) -> None:
    index, naive = PrefixIndex(), {name: set[int]() for name in "abc"}
    for operation, worker, hashes in operations:
        if operation == "stored":
            index.stored(worker, hashes)
            naive[worker].update(hashes)
        elif operation == "evicted":
            index.evicted(worker, hashes)
            naive[worker].difference_update(hashes)
        else:
            index.forget(worker)
            naive[worker].clear()
    expected = [next((depth for depth, found in enumerate(prompt) if found not in naive[name]), len(prompt)) for name in "abc"]
    assert index.overlaps(prompt, ["a", "b", "c"]) == expected
    assert [index.num_blocks(name) for name in "abc"] == [len(naive[name]) for name in "abc"]
    assert len(index) == len(set().union(*naive.values()))
