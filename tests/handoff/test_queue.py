"""When a prefill worker claims, as tables."""

from meshserve.config import HandoffConfig
from meshserve.handoff.claiming import ClaimPace
from meshserve.handoff.queue import JobState, PrefillQueue
from meshserve.handoff.tickets import Ticket

CONFIG = HandoffConfig(prefill_slots=4, prefill_batch_tokens=2000, claim_ahead_ms=5.0)


def measured(tokens_per_s: int) -> ClaimPace:
    """A worker that computed one prompt at this rate."""
    pace = ClaimPace(CONFIG)
    pace.claimed("first", tokens_per_s, 0.0)
    pace.granted("first", tokens_per_s, 0.0)
    pace.computed("first", tokens_per_s)
    pace.ended("first", 1.0)
    assert pace.tokens_per_s == tokens_per_s
    return pace


def test_an_idle_worker_claims_whatever_the_size() -> None:
    assert ClaimPace(CONFIG).may_claim(1_000_000, 1)


def test_a_busy_worker_claims_the_next_prompt_when_it_is_about_to_be_idle() -> None:
    pace = measured(10_000)
    pace.claimed("a", 1000, 2.0)
    pace.granted("a", 1000, 2.0)
    for computed, may in ((0, False), (900, False), (949, False), (950, True), (1000, True)):
        remaining = ClaimPace(CONFIG)
        remaining.tokens_per_s = pace.tokens_per_s
        remaining.granted("a", 1000, 2.0)
        remaining.computed("a", computed)
        assert remaining.may_claim(1000, 1) is may, computed


def test_a_worker_that_does_not_know_its_rate_takes_one_at_a_time() -> None:
    pace = ClaimPace(CONFIG)
    pace.claimed("a", 100, 0.0)
    pace.computed("a", 99)
    assert not pace.may_claim(100, 1)


def test_small_prompts_are_batched_only_where_many_wait() -> None:
    pace = measured(1000)
    pace.claimed("a", 600, 2.0)
    assert not pace.may_claim(600, num_waiting=4), "another worker may come free"
    assert pace.may_claim(600, num_waiting=5) and not pace.may_claim(1500, num_waiting=5)
    for key in "bcd":
        pace.claimed(key, 100, 2.0)
    assert not pace.may_claim(100, num_waiting=50), "no more than the slots"


def test_a_prompt_goes_from_ticket_to_delivery_and_what_comes_twice_changes_nothing() -> None:
    queue, key = PrefillQueue(CONFIG), ("d", "r")
    ticket = Ticket("d", "r", 1, 100)
    assert queue.ticket(ticket) and queue.next_claim(0.0) == ticket and queue.next_claim(0.0) is None
    assert queue.state(key) is JobState.CLAIMING and queue.ticket(ticket) and queue.num_waiting == 0
    assert queue.granted(key, 1, 96, 0.0) and not queue.granted(key, 1, 96, 0.0)
    assert queue.is_running(key, 1) and not queue.is_running(key, 2)
    queue.computed(key, 96)
    queue.all_computed(key, 0.1)
    assert queue.state(key) is JobState.SENDING
    assert queue.ended(key, 0.2) is JobState.SENDING and queue.ended(key, 0.2) is None
    assert queue.num_claimed == 0


def test_tickets_of_a_dead_decode_worker_are_void() -> None:
    queue = PrefillQueue(CONFIG)
    queue.ticket(Ticket("dead", "r1", 1, 100))
    queue.ticket(Ticket("other", "r2", 1, 100))
    queue.peer_gone("dead")
    claimed = queue.next_claim(0.0)
    assert claimed is not None and claimed.decode_peer == "other" and queue.num_waiting == 0
