"""Both state machines of the handoff joined in memory by a network that reorders, doubles and loses: all interleavings keep the laws.

Messages wait in a bag and are delivered in any order, some twice, tickets perhaps never; calls and blocks between live peers do arrive, as
streams do, unless their attempt is over. Peers die; the decode worker cancels; time passes. A short prompt is offered: who gets it computes
before it claims, and claims when all is computed, or when it takes too long.
"""

from array import array
from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshserve.config import HandoffConfig
from meshserve.handoff.queue import Job, JobState, PrefillQueue
from meshserve.handoff.task import Action, Finish, Lose, PrefillTask, Push, Revoke, Strike, TaskState
from meshserve.wire.handoff import Offer, Ticket

CONFIG = HandoffConfig()
LEASE_S = 1.5
PEERS = ("p1", "p2", "p3")
NUM_BLOCKS, BLOCK_TOKENS = 3, 16
KEY = ("d", "r")


@dataclass(frozen=True)
class Letter:
    """On its way to a prefill worker, or from one."""

    kind: str
    peer: str
    attempt: int = 0
    index: int = 0
    is_offer: bool = False
    brings_all: bool = False
    """A claim with all blocks."""


class BothEnds(RuleBasedStateMachine):
    """One prompt of one decode worker, three prefill workers."""

    @initialize(count=st.integers(1, 3), num_preferred=st.integers(1, 3), is_short=st.booleans())
    def start(self, count: int, num_preferred: int, is_short: bool) -> None:
        self.now_s = 0.0
        self.bag: list[Letter] = []
        self.queues = {peer: PrefillQueue(CONFIG, Job) for peer in PEERS}
        self.running: dict[str, tuple[int, int]] = {}  # by worker: attempt, next block
        self.unclaimed: dict[str, list[int]] = {}  # by worker: blocks that it computed on an offer and keeps
        self.asked: set[str] = set()  # those of them whose claim is on its way
        self.num_begun = dict.fromkeys(PEERS, 0)
        self.task = PrefillTask("r", CONFIG, LEASE_S, 0.0)
        self.missing = set(range(NUM_BLOCKS))
        self.taken: list[int] = []
        self.ends: list[TaskState] = []
        self.num_lost = 0
        self.carry_out(self.task.start(PEERS[:count], 0.0, num_preferred, is_short))

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Push):
                self.bag += [Letter("ticket", peer, action.attempt, is_offer=action.is_offer) for peer in action.peers]
            elif isinstance(action, Strike):
                self.bag += [Letter("strike", peer) for peer in action.peers]
            elif isinstance(action, Revoke):
                self.bag.append(Letter("over", action.peer, action.attempt))
            elif isinstance(action, Lose):
                self.num_lost += 1
            elif isinstance(action, Finish):
                self.ends.append(action.state)
                claimed = [(peer, attempt) for peer, (attempt, _) in self.running.items() if peer not in self.unclaimed]
                self.bag += [Letter("over", peer, attempt) for peer, attempt in claimed]

    @precondition(lambda self: self.bag)
    @rule(data=st.data(), is_doubled=st.booleans())
    def deliver(self, data: Any, is_doubled: bool) -> None:
        letter = data.draw(st.sampled_from(self.bag))
        if not is_doubled or letter.kind in ("claim", "over"):
            self.bag.remove(letter)
        if letter.peer in self.queues:
            getattr(self, f"on_{letter.kind}")(letter)

    @precondition(lambda self: any(letter.kind == "ticket" for letter in self.bag))
    @rule()
    def lose_a_ticket(self) -> None:
        self.bag.remove(next(letter for letter in self.bag if letter.kind == "ticket"))

    # what a prefill worker does

    def on_ticket(self, letter: Letter) -> None:
        queue = self.queues[letter.peer]
        offer = Offer(1, 0, array("I")) if letter.is_offer else None
        queue.ticket(Ticket(*KEY, letter.attempt, NUM_BLOCKS * BLOCK_TOKENS, offer), self.now_s)
        self.pump(letter.peer)

    def pump(self, peer: str) -> None:
        queue = self.queues[peer]
        while (job := queue.next_claim(self.now_s)) is not None:
            if queue.may_begin(job.ticket, self.now_s):
                assert queue.granted(job, job.ticket.attempt, NUM_BLOCKS * BLOCK_TOKENS, self.now_s)
                self.running[peer], self.unclaimed[peer] = (job.ticket.attempt, 0), []
                self.num_begun[peer] += 1
            else:
                self.bag.append(Letter("claim", peer))

    def on_strike(self, letter: Letter) -> None:
        self.queues[letter.peer].strike(KEY)
        if letter.peer in self.unclaimed and letter.peer not in self.asked:
            self.forget(letter.peer)

    def forget(self, peer: str) -> None:
        """Struck, or its claim was answered that it is gone."""
        self.running.pop(peer, None)
        self.unclaimed.pop(peer, None)
        self.asked.discard(peer)
        self.job_ended(peer)

    def job_ended(self, peer: str) -> None:
        job = self.queues[peer].jobs.get(KEY)
        if job is not None:
            self.queues[peer].ended(job, self.now_s)
        self.pump(peer)

    @rule(peer=st.sampled_from(PEERS))
    def an_offer_takes_long(self, peer: str) -> None:
        if peer in self.unclaimed and peer not in self.asked:
            self.asked.add(peer)
            self.bag.append(Letter("claim", peer, self.running[peer][0]))

    def on_over(self, letter: Letter) -> None:
        """The claim's stream ended: revoked, gone or delivered."""
        if letter.attempt == 0 or self.running.get(letter.peer, (letter.attempt, 0))[0] == letter.attempt:
            self.running.pop(letter.peer, None)
            self.job_ended(letter.peer)

    @rule(peer=st.sampled_from(PEERS))
    def compute_a_block(self, peer: str) -> None:
        if peer in self.running and self.running[peer][1] < NUM_BLOCKS:
            attempt, index = self.running[peer]
            if peer in self.unclaimed:
                self.unclaimed[peer].append(index)
            else:
                self.bag.append(Letter("block", peer, attempt, index))
            self.running[peer] = (attempt, index + 1)
            self.queues[peer].computed(self.queues[peer].jobs[KEY], BLOCK_TOKENS, self.now_s)
            if index + 1 == NUM_BLOCKS:
                self.all_computed(peer, attempt)

    def all_computed(self, peer: str, attempt: int) -> None:
        job = self.queues[peer].jobs[KEY]
        self.queues[peer].all_computed(job, 0, self.now_s)
        if peer in self.unclaimed and peer not in self.asked:
            self.asked.add(peer)
            self.queues[peer].delivered(job)
            self.bag.append(Letter("claim", peer, attempt, brings_all=True))

    # what the decode worker hears

    def on_claim(self, letter: Letter) -> None:
        queue = self.queues[letter.peer]
        if not self.task.claim(letter.peer, self.now_s):
            self.forget(letter.peer)
            return
        attempt = self.task.attempt
        self.asked.discard(letter.peer)
        kept = self.unclaimed.pop(letter.peer, None)
        if letter.brings_all and letter.attempt == attempt:
            for index in range(NUM_BLOCKS):
                self.on_block(Letter("block", letter.peer, attempt, index))
            assert self.task.is_final, "all came"
            return
        if kept is not None and not letter.brings_all and letter.attempt == attempt:
            self.bag += [Letter("block", letter.peer, attempt, index) for index in kept]
            return
        job = queue.jobs.get(KEY)
        if job is not None and kept is not None:
            queue.granted_otherwise(job, self.now_s)
        if job is not None and queue.granted(job, attempt, NUM_BLOCKS * BLOCK_TOKENS, self.now_s):
            self.running[letter.peer] = (attempt, 0)

    def on_block(self, letter: Letter) -> None:
        if not self.task.is_current(letter.peer, letter.attempt) or letter.index not in self.missing:
            return
        self.missing.discard(letter.index)
        self.taken.append(letter.index)
        self.task.renew(letter.peer, letter.attempt, self.now_s)
        if not self.missing:
            self.carry_out(self.task.complete(self.now_s))

    @rule(peer=st.sampled_from(PEERS))
    def renewal(self, peer: str) -> None:
        if peer in self.running:
            self.task.renew(peer, self.running[peer][0], self.now_s)

    @rule(peer=st.sampled_from(PEERS), is_killed=st.booleans())
    def a_worker_is_gone(self, peer: str, is_killed: bool) -> None:
        if is_killed and peer in self.queues and len(self.queues) > 1:
            del self.queues[peer]
            self.running.pop(peer, None)
            self.unclaimed.pop(peer, None)
            self.carry_out(self.task.peer_gone(peer, self.now_s, is_dead=True))
        elif not is_killed:
            self.carry_out(self.task.peer_gone(peer, self.now_s, is_dead=False))

    @rule()
    def the_client_leaves(self) -> None:
        self.carry_out(self.task.cancel(self.now_s))

    @rule(seconds=st.sampled_from((0.001, 0.03, 0.3, 1.0, 2.0)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.carry_out(self.task.tick(self.now_s))

    @invariant()
    def laws(self) -> None:
        if not hasattr(self, "task"):
            return
        assert len(self.ends) == self.task.is_final, "it ends once"
        assert len(set(self.taken)) == len(self.taken), "no block is taken twice"
        assert (TaskState.DONE in self.ends) == (not self.missing)
        assert self.num_lost <= CONFIG.max_lost_peers
        for peer, queue in self.queues.items():
            assert queue.num_claimed <= 1 and queue.num_waiting <= 1
            assert self.num_begun[peer] <= 1, "an offer that comes twice is begun once"
            if peer in self.running:
                job = queue.jobs[KEY]
                assert job.is_running(self.running[peer][0])
                is_all = self.running[peer][1] == NUM_BLOCKS
                assert job.state in ((JobState.SENDING, JobState.DELIVERED) if is_all else (JobState.COMPUTING,))
                assert queue.num_claimed == (job.state is not JobState.DELIVERED)

    def teardown(self) -> None:
        """In the end all is delivered, and nobody holds anything."""
        if not hasattr(self, "task"):
            return
        for _ in range(12):
            self.now_s += 30.0
            self.carry_out(self.task.tick(self.now_s))
        assert self.task.is_final, "time alone ends every task"
        for peer in PEERS:
            self.an_offer_takes_long(peer)
        while self.bag:
            letter = self.bag.pop(0)
            if letter.peer in self.queues:
                getattr(self, f"on_{letter.kind}")(letter)
                self.an_offer_takes_long(letter.peer)  # one that came now, after its strike, is claimed in vain
        for queue in self.queues.values():
            assert not queue.num_claimed and not queue.num_waiting, "nothing is left behind"


TestBothEnds = BothEnds.TestCase
TestBothEnds.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
