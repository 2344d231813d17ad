"""When a prefill worker claims, as tables."""

import math

import pytest

from meshserve.config import HandoffConfig
from meshserve.handoff.queue import ClaimPace, Job, JobState, PrefillQueue
from meshserve.wire.handoff import Ticket

CONFIG = HandoffConfig(prefill_slots=4, prefill_batch_tokens=2000, claim_ahead_ms=5.0)


def measured(tokens_per_s: int) -> ClaimPace:
    """A worker that computed one prompt at this rate."""
    pace = ClaimPace(CONFIG)
    pace.claimed("first", tokens_per_s, 0.0)
    pace.granted("first", tokens_per_s, 0.0)
    pace.computed("first", tokens_per_s, 1.0)
    pace.ended("first", 1.0)
    assert pace.tokens_per_s == tokens_per_s
    return pace


def test_an_idle_worker_claims_whatever_the_size() -> None:
    assert ClaimPace(CONFIG).may_claim(1_000_000, 1, 0.0)


def test_a_busy_worker_claims_the_next_prompt_when_it_is_about_to_be_idle() -> None:
    pace = measured(10_000)
    pace.claimed("a", 1000, 2.0)
    pace.granted("a", 1000, 2.0)
    assert not pace.may_claim(1000, 1, 2.0) and pace.claim_in_s(2.0) == pytest.approx(0.095)
    assert not pace.may_claim(1000, 1, 2.094) and pace.may_claim(1000, 1, 2.096), "by the rate, before the last block is out"
    pace.computed("a", 500, 2.10)  # slower than it was
    assert not pace.may_claim(1000, 1, 2.11) and pace.may_claim(1000, 1, 2.146)
    pace.computed("a", 500, 2.12)
    assert pace.may_claim(1000, 1, 2.12)


def test_a_worker_that_does_not_know_its_rate_takes_one_at_a_time() -> None:
    pace = ClaimPace(CONFIG)
    pace.claimed("a", 100, 0.0)
    assert not pace.may_claim(100, 1, 0.04) and pace.may_claim(100, 1, 0.06), "unless its decode worker does not answer"
    pace.granted("a", 100, 0.0)
    pace.computed("a", 99, 0.1)
    assert not pace.may_claim(100, 1, 9.0) and pace.claim_in_s(9.0) == math.inf


def test_what_came_from_the_cache_says_nothing_about_the_rate() -> None:
    pace = measured(8000)
    pace.claimed("cached", 8000, 2.0)
    pace.granted("cached", 8000, 2.0)
    pace.computed("cached", 8000, 2.001)
    pace.was_cached(8000)
    pace.ended("cached", 2.001)
    assert pace.tokens_per_s == 8000


def test_small_prompts_are_batched_only_where_many_wait() -> None:
    pace = measured(1000)
    pace.claimed("a", 600, 2.0)
    assert not pace.may_claim(600, 4, 2.0), "another worker may come free"
    assert pace.may_claim(600, 5, 2.0) and not pace.may_claim(1500, 5, 2.0)
    for key in "bcd":
        pace.claimed(key, 100, 2.0)
    assert not pace.may_claim(100, 50, 9.0), "no more than the slots"


def new_queue(config: HandoffConfig = CONFIG) -> PrefillQueue[Job]:
    return PrefillQueue(config, Job)


def test_a_prompt_goes_from_ticket_to_delivery_and_what_comes_twice_changes_nothing() -> None:
    queue, ticket = new_queue(), Ticket("d", "r", 1, 100)
    assert queue.ticket(ticket, 0.0)
    job = queue.next_claim(0.0)
    assert job is not None and job.ticket == ticket and queue.next_claim(0.0) is None
    assert queue.jobs == {("d", "r"): job}
    assert job.state is JobState.CLAIMING and queue.ticket(ticket, 0.0) and queue.num_waiting == 0
    assert queue.granted(job, 1, 96, 0.0) and not queue.granted(job, 1, 96, 0.0)
    assert job.is_running(1) and not job.is_running(2)
    queue.computed(job, 96, 0.1)
    queue.all_computed(job, 0, 0.1)
    assert queue.jobs["d", "r"].state is JobState.SENDING
    assert queue.ended(job, 0.2) is JobState.SENDING and queue.ended(job, 0.2) is JobState.OVER
    assert queue.num_claimed == 0 and not queue.jobs


def test_no_more_is_claimed_while_too_much_is_still_on_its_way_out() -> None:
    queue = new_queue(HandoffConfig(prefill_slots=2, sending_slots=1))
    for number in range(5):
        queue.ticket(Ticket("d", f"r{number}", 1, 100), 0.0)
    for _ in range(3):
        job = queue.next_claim(0.0)
        assert job is not None
        queue.granted(job, 1, 96, 0.0)
        queue.all_computed(job, 0, 0.1)
    assert queue.next_claim(0.2) is None
    queue.ended(queue.jobs["d", "r0"], 0.3)
    assert queue.next_claim(0.3) is not None


def test_tickets_of_a_dead_decode_worker_are_void() -> None:
    queue = new_queue()
    queue.ticket(Ticket("dead", "r1", 1, 100), 0.0)
    queue.ticket(Ticket("other", "r2", 1, 100), 0.0)
    queue.peer_gone("dead")
    claimed = queue.next_claim(0.0)
    assert claimed is not None and claimed.ticket.decode_peer == "other" and queue.num_waiting == 0
