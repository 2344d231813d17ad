"""A prefill task: tables, and all interleavings of what can happen to it."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from meshserve.config import HandoffConfig
from meshserve.handoff.task import LINK_BROKE, Action, Finish, Lose, PrefillTask, Push, Revoke, Strike, TaskState

CONFIG = HandoffConfig()
LEASE_S = 1.5
PEERS = ("p1", "p2", "p3")


def a_task(*candidates: str) -> tuple[PrefillTask, list[Action]]:
    task = PrefillTask("r1", CONFIG, LEASE_S, 0.0)
    return task, task.start(candidates, 0.0)


def test_the_ticket_goes_to_the_best_and_after_the_hedge_time_to_all_others() -> None:
    task, actions = a_task(*PEERS)
    assert actions == [Push(("p1",), 1)]
    assert task.tick(0.019) == []
    assert task.tick(0.021) == [Push(("p2", "p3"), 1)]
    assert task.tick(0.2) == []


def test_tickets_that_nobody_claims_are_sent_again_ever_more_seldom() -> None:
    task, _ = a_task("p1")
    sent_at = [step / 100 for step in range(500) if task.tick(step / 100)]
    assert sent_at == [0.25, 0.5, 1.0, 2.0, 4.0]


def test_a_ticket_that_cannot_be_sent_is_hedged_at_once() -> None:
    task, _ = a_task(*PEERS)
    assert task.push_failed("p1", 0.0) == [Push(("p2", "p3"), 1)]
    assert task.tick(0.3) == [Push(PEERS, 1)], "and tried again later"
    assert task.push_failed("p2", 0.3) == task.push_failed("p3", 0.3) == [], "who fails again is not asked again in the same moment"
    alone, _ = a_task("p1")
    assert alone.push_failed("p1", 0.0) == [] and alone.tick(0.021) == [Push(("p1",), 1)]


def test_the_first_claim_wins_and_late_ones_are_gone() -> None:
    task, _ = a_task(*PEERS)
    assert task.claim("p2", 0.01)
    assert not task.claim("p1", 0.01) and not task.claim("p2", 0.01)
    assert task.complete(0.5) == [Strike(("p1",)), Finish(TaskState.DONE)]
    assert not task.claim("p3", 0.6)


def test_without_anybody_to_ask_it_is_local_at_once() -> None:
    assert a_task()[1] == [Finish(TaskState.LOCAL)]


def test_a_short_prompt_is_offered_to_one_worker_and_never_a_second_time() -> None:
    task = PrefillTask("r1", CONFIG, LEASE_S, 0.0)
    assert task.start(PEERS, 0.0, is_short=True) == [Push(("p1",), 1, is_offer=True)]
    assert task.tick(0.021) == [Push(("p2", "p3"), 1)] and task.tick(0.3) == [Push(PEERS, 1)]
    several = PrefillTask("r1", CONFIG, LEASE_S, 0.0)
    assert several.start(PEERS, 0.0, 2, is_short=True) == [Push(("p1", "p2"), 1)], "one of them would compute it in vain"


def test_who_dies_with_an_offer_may_have_died_of_it() -> None:
    task = PrefillTask("r1", CONFIG, LEASE_S, 0.0)
    task.start(PEERS, 0.0, is_short=True)
    assert task.peer_gone("p1", 0.001, is_dead=True) == [Lose("p1"), Push(("p2", "p3"), 1)]
    assert task.claim("p2", 0.002)
    assert task.peer_gone("p2", 0.003, is_dead=True)[-1] == Finish(TaskState.GAVE_UP)


def test_as_long_as_it_is_not_known_whether_the_first_died_of_an_offer_no_third_gets_it() -> None:
    task = PrefillTask("r1", CONFIG, LEASE_S, 0.0)
    task.start(PEERS, 0.0, is_short=True)
    assert task.tick(0.021) == [Push(("p2", "p3"), 1)]
    assert task.claim("p2", 0.022)
    assert task.peer_gone("p2", 0.03, is_dead=True) == [Revoke("p2", 1), Lose("p2"), Push(("p1",), 2)]
    assert task.tick(0.5) == [Push(("p1",), 2)]
    assert task.peer_gone("p1", 0.6, is_dead=True)[-1] == Finish(TaskState.GAVE_UP)


def test_who_was_never_sent_the_offer_did_not_die_of_it() -> None:
    task = PrefillTask("r1", CONFIG, LEASE_S, 0.0)
    task.start(PEERS, 0.0, is_short=True)
    assert task.push_failed("p1", 0.0, was_offer=True) == [Push(("p2", "p3"), 1)]
    assert task.peer_gone("p1", 0.001, is_dead=True) == [] and not task.lost_peers


def test_an_attempt_that_is_no_longer_named_is_made_elsewhere() -> None:
    task, _ = a_task("p1", "p2")
    assert task.claim("p1", 0.0)
    task.renew("p1", 1, 1.0)
    assert task.tick(2.4) == []
    assert task.tick(2.6) == [Revoke("p1", 1), Push(("p2",), 2)]
    assert not task.claim("p1", 2.7), "it had its try"
    assert task.claim("p2", 2.7) and task.is_current("p2", 2) and not task.is_current("p1", 1)


def test_when_all_workers_die_it_is_local() -> None:
    task, _ = a_task("p1")
    assert task.peer_gone("p1", 0.1, is_dead=True)[-1] == Finish(TaskState.LOCAL)


def test_two_workers_lost_are_enough() -> None:
    task, _ = a_task(*PEERS)
    assert task.claim("p1", 0.0)
    assert task.peer_gone("p1", 0.1, is_dead=True) == [Revoke("p1", 1), Lose("p1"), Push(("p2", "p3"), 2)]
    assert task.claim("p2", 0.2)
    assert task.peer_gone("p2", 0.3, is_dead=True)[-1] == Finish(TaskState.GAVE_UP)
    assert task.lost_peers == ["p1", "p2"] and not task.claim("p3", 0.4)


def test_a_request_that_took_a_worker_down_before_may_take_one_more() -> None:
    task = PrefillTask("r1", CONFIG, LEASE_S, 0.0, num_lost_before=1)
    task.start(PEERS, 0.0)
    assert task.claim("p1", 0.0)
    assert task.peer_gone("p1", 0.1, is_dead=True)[-1] == Finish(TaskState.GAVE_UP)


def test_a_second_attempt_asks_everybody_at_once_and_is_local_when_the_deadline_is_nearer_than_another_failure() -> None:
    for deadline_s, follows in ((60.0, Push(("p2", "p3"), 2)), (3.0, Finish(TaskState.LOCAL))):
        task = PrefillTask("r1", CONFIG, LEASE_S, 0.0, deadline_s)
        task.start(PEERS, 0.0)
        assert task.claim("p1", 0.0)
        actions = task.tick(1.6)
        assert actions[0] == Revoke("p1", 1) and follows in actions


def test_a_claim_is_waited_for_until_half_of_the_time_that_is_left() -> None:
    task = PrefillTask("r1", CONFIG, LEASE_S, 0.0, 4.0)
    task.start(PEERS, 0.0)
    task.tick(1.0)
    task.tick(1.9)
    assert not task.is_final and task.tick(2.1)[-1] == Finish(TaskState.LOCAL)


def test_all_that_are_preferred_are_asked_at_first_and_the_others_later() -> None:
    task = PrefillTask("r1", CONFIG, LEASE_S, 0.0)
    assert task.start(PEERS, 0.0, num_preferred=2) == [Push(("p1", "p2"), 1)]
    assert task.tick(0.021) == [Push(("p3",), 1)] and task.num_hedges == 1
    everybody = PrefillTask("r1", CONFIG, LEASE_S, 0.0)
    assert everybody.start(PEERS, 0.0, num_preferred=3) == [Push(PEERS, 1)]
    assert everybody.tick(0.021) == [] and everybody.num_hedges == 0


def test_progress_that_is_overdue_counts_against_the_lease() -> None:
    task, _ = a_task("p1")
    assert task.claim("p1", 0.0)
    for now_s, overdue_s in ((0.3, 0.0), (0.6, 0.3), (0.9, 0.6), (1.2, 0.9), (1.5, 1.2)):
        task.renew("p1", 1, now_s - overdue_s)
    assert task.tick(1.79) == [] and task.tick(1.81)[0] == Revoke("p1", 1)


def test_who_stood_still_itself_does_not_blame_others() -> None:
    task, _ = a_task("p1")
    assert task.claim("p1", 0.0)
    task.stalled(3.0)
    assert task.tick(4.4) == [] and task.tick(4.6) != []


def test_a_worker_that_falls_silent_and_then_dies_counts_as_lost() -> None:
    task, _ = a_task(*PEERS)
    assert task.claim("p1", 0.0)
    task.peer_gone("p1", 1.5, is_dead=False)
    task.peer_gone("p1", 6.5, is_dead=True)
    assert task.lost_peers == ["p1"]


def test_a_queued_ticket_at_a_draining_worker_goes_to_others_and_a_running_one_stays() -> None:
    task, _ = a_task("p1", "p2")
    assert task.peer_draining("p1", 0.0) == [Push(("p2",), 1)]
    assert task.claim("p2", 0.1)
    assert task.peer_draining("p2", 0.2) == [] and task.state is TaskState.CLAIMED


def test_an_unclaimed_task_is_local_in_the_end() -> None:
    task, _ = a_task("p1")
    assert task.tick(CONFIG.claim_timeout_s + 0.1)[-1] == Finish(TaskState.LOCAL)


def test_a_worker_whose_connection_broke_goes_on_with_the_next_attempt() -> None:
    task, _ = a_task("p1")
    assert task.claim("p1", 0.0)
    task.received(1, 100)
    assert task.resume("p1", 2, 0.1) == task.resume("p2", 1, 0.1) == [], "it is not theirs"
    assert task.resume("p1", 1, 0.2) == [Revoke("p1", 1)] and task.claim("p1", 0.2)
    assert task.is_current("p1", 2) and not task.is_current("p1", 1)
    assert [attempt.outcome for attempt in task.attempts] == [LINK_BROKE, "running"]
    assert task.resume("p1", 2, 0.3)[-1] == Finish(TaskState.LOCAL), "a connection that brings nothing is no use"


def test_a_worker_that_can_be_reached_again_is_asked_again_if_blocks_of_it_came() -> None:
    for num_bytes, follows in ((100, Push(("p1", "p2"), 2)), (0, Push(("p2",), 2))):
        task, _ = a_task("p1", "p2")
        assert task.claim("p1", 0.0)
        task.received(0, num_bytes)
        assert task.attempt_failed("p1", 1, LINK_BROKE, 0.1) == [Revoke("p1", 1), follows]
        assert task.claim("p1", 0.2) == bool(num_bytes)


def test_a_worker_that_was_silent_for_a_while_may_go_on_when_it_is_back_unless_it_died() -> None:
    for is_dead in (False, True):
        task, _ = a_task("p1", "p2")
        assert task.claim("p1", 0.0)
        task.received(1, 100)
        assert task.peer_gone("p1", 1.5, is_dead=False) == [Revoke("p1", 1), Push(("p2",), 2)]
        if is_dead:
            task.peer_gone("p1", 1.6, is_dead=True)
        task.peer_joined("p1", 1.7)
        assert any(isinstance(action, Push) and "p1" in action.peers for action in task.tick(1.8)) == (not is_dead)
        assert task.claim("p1", 1.9) == (not is_dead)


def test_links_that_break_for_ever_end_the_attempts() -> None:
    task, _ = a_task("p1")
    num_claims = 0
    while task.claim("p1", num_claims):
        num_claims += 1
        task.received(0, 1)
        task.resume("p1", task.attempt, num_claims)
    assert num_claims == 32 and task.state is TaskState.LOCAL


def test_what_comes_after_its_attempt_is_counted_for_that_attempt() -> None:
    task, _ = a_task("p1", "p2")
    assert task.claim("p1", 0.0)
    task.attempt_failed("p1", 1, "block refused", 0.1)
    for peer, attempt in (("p1", 1), ("p2", 1), ("p1", 0), ("p1", 2), ("p1", -1)):
        task.came_late(peer, attempt, 1, 100)
    assert [(past.num_blocks, past.num_bytes) for past in task.attempts] == [(1, 100)]


class TaskMachine(RuleBasedStateMachine):
    """Anything in any order."""

    peers = st.sampled_from(PEERS)

    @initialize(count=st.integers(1, 3))
    def start(self, count: int) -> None:
        self.now_s = 0.0
        self.task = PrefillTask("r", CONFIG, LEASE_S, 0.0)
        self.finishes = 0
        self.claims: list[str] = []
        self.dead: set[str] = set()
        self.carry_out(self.task.start(PEERS[:count], 0.0))

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            assert not (self.finishes and not isinstance(action, Finish)), "nothing follows the end"
            self.finishes += isinstance(action, Finish)
            if isinstance(action, Push):
                assert action.peers and action.attempt == self.task.attempt

    @rule(peer=peers)
    def claim(self, peer: str) -> None:
        was_queued = self.task.state is TaskState.QUEUED
        is_granted = self.task.claim(peer, self.now_s)
        assert not is_granted or (was_queued and peer not in self.task.lost_peers)
        if is_granted:
            self.claims.append(peer)

    @rule(peer=peers, attempt=st.integers(1, 3))
    def renew(self, peer: str, attempt: int) -> None:
        self.task.renew(peer, attempt, self.now_s)

    @rule(peer=peers)
    def push_failed(self, peer: str) -> None:
        self.carry_out(self.task.push_failed(peer, self.now_s))

    @rule()
    def receive(self) -> None:
        if self.task.state is TaskState.CLAIMED:
            self.task.received(1, 100)

    @rule(peer=peers, attempt=st.integers(1, 3))
    def resume(self, peer: str, attempt: int) -> None:
        self.carry_out(self.task.resume(peer, attempt, self.now_s))

    @rule(peer=peers, attempt=st.integers(1, 3))
    def lose_link(self, peer: str, attempt: int) -> None:
        self.carry_out(self.task.attempt_failed(peer, attempt, LINK_BROKE, self.now_s))

    @rule()
    def complete(self) -> None:
        self.carry_out(self.task.complete(self.now_s))

    @rule(peer=peers, attempt=st.integers(1, 3), is_dead=st.booleans())
    def fail(self, peer: str, attempt: int, is_dead: bool) -> None:
        self.carry_out(self.task.attempt_failed(peer, attempt, "test", self.now_s, is_peer_dead=is_dead))

    @rule(peer=peers, is_dead=st.booleans())
    def gone(self, peer: str, is_dead: bool) -> None:
        self.carry_out(self.task.peer_gone(peer, self.now_s, is_dead=is_dead))

    @rule(peer=peers)
    def drain(self, peer: str) -> None:
        self.carry_out(self.task.peer_draining(peer, self.now_s))

    @rule(peer=peers)
    def join(self, peer: str) -> None:
        self.task.peer_joined(peer, self.now_s)

    @rule()
    def cancel(self) -> None:
        self.carry_out(self.task.cancel(self.now_s))

    @rule()
    def fall_back(self) -> None:
        self.carry_out(self.task.fall_back(self.now_s))

    @rule(seconds=st.sampled_from((0.001, 0.03, 1.0, 2.0, 11.0)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.carry_out(self.task.tick(self.now_s))

    @invariant()
    def it_ends_once_and_runs_once(self) -> None:
        if not hasattr(self, "task"):
            return
        assert self.finishes == self.task.is_final
        assert len(self.task.lost_peers) <= CONFIG.max_lost_peers
        assert sum(attempt.outcome == "running" for attempt in self.task.attempts) == (self.task.state is TaskState.CLAIMED)
        returned = [past.peer for past in self.task.attempts if past.outcome in (LINK_BROKE, "peer silent") and past.num_bytes]
        for peer in PEERS:
            assert self.claims.count(peer) <= 1 + returned.count(peer), "nobody gets the same task twice, unless it was the link"

    def teardown(self) -> None:
        if hasattr(self, "task") and not self.task.is_final:
            self.now_s += 60
            for _ in range(8):
                self.carry_out(self.task.tick(self.now_s))
                self.now_s += 60
            assert self.task.is_final, "time alone ends every task"


TestTaskMachine = TaskMachine.TestCase
TestTaskMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
