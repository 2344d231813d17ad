"""What a router knows: reports, in-flight reservations of its own and of others, sessions, prefixes that go and come."""

import random

from meshserve.routing.fleet import Fleet, InFlight, Question
from meshserve.routing.workers import Prompt, Worker
from meshserve.wire.routing import InFlightReservation, Share, WorkerLoad, WorkerReport

HASHES = list(range(100, 200))
PROMPT = Prompt(1605, 16, HASHES)
WORKERS = ["w0", "w1", "w2"]
LOAD = WorkerLoad(num_blocks=1000)


def fleet(names: list[str] = WORKERS) -> Fleet:
    made = Fleet(rng=random.Random(3))
    for name in names:
        made.join(name, name.upper())
        made.report(name, WorkerReport(LOAD), 0.0)
    return made


def ask(found: Fleet, request_id: str = "r", session: str = "", now_s: float = 0.0, prefill: list[str] | None = None) -> str:
    return found.choose("kv", Question(request_id, PROMPT, WORKERS, prefill or [], session), now_s).decode[0].incarnation


def test_choices_of_one_moment_do_not_pile_onto_one_worker() -> None:
    found = fleet()
    assert {ask(found, f"r{number}") for number in range(3)} == set(WORKERS)


def test_another_routers_reservations_count_like_ones_own() -> None:
    found = fleet()
    for number, worker in enumerate(("w0", "w1")):
        found.hear(InFlightReservation(f"x{number}", (Share(worker, 1600, 101),)), 0.0)
    assert ask(found) == "w2"


def test_a_reservation_ends_with_the_workers_report_whichever_comes_first() -> None:
    for is_report_first in (True, False):
        found = fleet()
        reservation, report = InFlightReservation("x", (Share("w0", 1600, 101),)), WorkerReport(LOAD, admitted=("x",))
        if is_report_first:
            found.report("w0", report, 0.0)
            found.hear(reservation, 0.001)
        else:
            found.hear(reservation, 0.0)
            found.report("w0", report, 0.001)
        loads = {
            found.choose("least-loaded", Question(f"r{turn}", PROMPT, [worker]), 0.01).decode[0].load for turn, worker in enumerate(WORKERS)
        }
        assert loads == {0}


def test_a_reservation_that_no_report_ends_is_over_after_two_seconds() -> None:
    found = fleet()
    found.hear(InFlightReservation("x", (Share("w0", 1600, 101),)), 0.0)
    load = [found.choose("least-loaded", Question("r", PROMPT, ["w0"]), now_s).decode[0].load for now_s in (1.9, 4.0)]
    assert load == [1, 0]


def test_a_prompt_that_its_decode_worker_keeps_is_not_waited_for_at_a_prefill_worker() -> None:
    found = fleet()
    reservation = found.choose("kv", Question("r", PROMPT, ["w0", "w1"], ["w2"]), 0.0).reservation
    assert reservation is not None and [share.incarnation for share in reservation.shares][1:] == ["w2"]
    found.report(reservation.shares[0].incarnation, WorkerReport(LOAD, admitted=("r",)), 0.0)
    assert found.num_in_flight_tokens() == reservation.shares[1].num_tokens, "it is expected to be handed over"
    found.report(reservation.shares[0].incarnation, WorkerReport(LOAD, kept=("r",)), 0.0)
    assert found.num_in_flight_tokens() == 0


def test_a_router_that_only_hears_of_reservations_keeps_none_beyond_two_seconds() -> None:
    found, worker = InFlight(), Worker("w0", "W0")
    for number in range(1000):
        found.hear(worker, f"x{number}", 1, number * 0.1)
    assert len(found.reservations) <= 20 and worker.num_in_flight == len(found.reservations)


def test_a_session_goes_back_to_its_worker_where_that_costs_nothing_whoever_sent_it_there() -> None:
    found = fleet()
    found.hear(InFlightReservation("x", (Share("w2", 1, 1),), "alice"), 0.0)
    found.report("w2", WorkerReport(LOAD, admitted=("x",)), 0.0)
    assert ask(found, session="alice") == "w2"
    busy = WorkerLoad(num_blocks=1000, num_running=8, waiting_prefill_tokens=50_000)
    found.report("w2", WorkerReport(busy, admitted=("r",)), 0.0)
    assert ask(found, "r2", session="alice") != "w2"


def test_blocks_of_a_worker_that_left_or_whose_watch_begins_anew_are_not_counted() -> None:
    for forget in (Fleet.leave, Fleet.forget_blocks):
        found = fleet()
        found.report("w1", WorkerReport(LOAD, tuple(HASHES)), 0.0)
        assert found.held_by("w1") == set(HASHES)
        forget(found, "w1")
        found.join("w1", "W1")
        assert not found.held_by("w1")
        assert found.choose("kv", Question("r", PROMPT, WORKERS), 0.0).decode[0].overlap_blocks == 0


def test_a_worker_that_is_renamed_has_its_new_name_in_the_next_answer() -> None:
    found = fleet()
    found.rename("w1", "worker")
    found.rename("nobody", "worker")
    answer = found.choose("round-robin", Question("r", PROMPT, WORKERS), 0.0)
    names = {candidate.incarnation: candidate.peer for candidate in answer.decode}
    assert names == {"w0": "W0", "w1": "worker", "w2": "W2"}


def test_a_hot_prefix_gets_homes_on_several_workers_and_says_why() -> None:
    found = fleet()
    found.report("w0", WorkerReport(WorkerLoad(num_blocks=1000, num_running=6), tuple(HASHES)), 0.0)
    answers = [found.choose("kv", Question(f"r{number}", PROMPT, WORKERS), number / 1000) for number in range(40)]
    homes = {answer.decode[0].incarnation for answer in answers}
    assert len(homes) > 1
    assert any("in demand" in answer.decode[0].reason or "waiting" in answer.decode[0].reason for answer in answers)


def test_prefill_is_reserved_where_it_is_computed_and_never_where_the_prompt_is_decoded() -> None:
    found = fleet([*WORKERS, "p0"])
    answer = found.choose("kv", Question("r", PROMPT, ["w0"], ["p0", "w0"]), 0.0)
    assert answer.reservation is not None
    assert [share.incarnation for share in answer.reservation.shares] == ["w0", "p0"]
    assert InFlightReservation.from_wire(answer.reservation.to_wire()) == answer.reservation


def test_peers_that_decode_and_prefill_take_turns_in_both() -> None:
    for policy in ("round-robin", "least-loaded", "kv"):
        found, both = fleet(["w0", "w1"]), ["w0", "w1"]
        shares = []
        for number in range(6):
            answer = found.choose(policy, Question(f"r{number}", PROMPT, both, both), number * 3.0)
            assert answer.reservation is not None
            shares.append([share.incarnation for share in answer.reservation.shares])
        assert shares == [["w0", "w1"], ["w1", "w0"]] * 3, policy


def test_every_candidate_says_what_it_holds_how_long_one_waits_there_and_why_it_ranks_so() -> None:
    found = fleet([*WORKERS, "p0", "p1"])
    answer = found.choose("kv", Question("r", PROMPT, WORKERS, ["p0", "p1"]), 0.0)
    assert len(answer.decode) == 3 and len(answer.prefill) == 2
    for candidate in answer.decode + answer.prefill:
        shown = candidate.for_receipt()
        assert (
            shown["reason"] and shown["cost_ms"] >= 0 and shown.keys() == {"peer", "overlap_blocks", "load", "wait_ms", "cost_ms", "reason"}
        )


def test_a_worker_that_measured_no_prefill_counts_as_fast_as_one_that_did() -> None:
    found = fleet()
    found.report("w0", WorkerReport(WorkerLoad(num_blocks=1000, decode_base_us=40_000)), 0.0)
    found.report("w1", WorkerReport(WorkerLoad(num_blocks=1000, decode_base_us=40_000, prefill_ns_per_token=10_000_000)), 0.0)
    costs = [candidate.cost_ms for candidate in found.choose("kv", Question("r", PROMPT, WORKERS), 0.0).decode]
    assert max(costs) < 1.01 * min(costs)
