"""A prefill task as its decode worker sees it: a pure state machine.

The decode worker owns the task until the KV is in. Tickets announce the task, a claim assigns it, an
attempt is one assignment. Every input takes the time and returns actions. Inputs that come late or twice,
or for a task that has ended, change nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from meshserve.config import HandoffConfig

_SILENT = ("peer silent", "no longer named")
"""Outcomes of an attempt after which its worker may turn out to be dead."""
LINK_BROKE = "its link broke"
"""Outcome of an attempt whose worker lives and can be reached again, now or soon."""
_MAY_RETURN = (LINK_BROKE, "peer silent")
"""Outcomes after which the same worker may continue, if the attempt brought any bytes."""
_MAX_ATTEMPTS = 32
"""After this many attempts no worker may continue: a link that carries little each time is of no use."""


class TaskState(StrEnum):
    """Where a task stands. The last four are final."""

    QUEUED = "queued"
    """Tickets are out; no worker has claimed."""
    CLAIMED = "claimed"
    """A prefill worker computes; its lease is renewed by its heartbeats."""
    DONE = "done"
    """All blocks are in."""
    LOCAL = "local"
    """No other worker can do it: the decode worker prefills the prompt itself."""
    GAVE_UP = "gave_up"
    """It took too many workers down."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Push:
    """Send a ticket for `attempt` to these peers."""

    peers: tuple[str, ...]
    attempt: int
    is_offer: bool = False
    """Whether the prompt goes along, so that the one peer can begin at once."""


@dataclass(frozen=True, slots=True)
class Revoke:
    """Tell the peer of this attempt to stop, and take no more blocks from it."""

    peer: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Strike:
    """Tell these peers that their tickets are void."""

    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The task came to its end in this state."""

    state: TaskState


@dataclass(frozen=True, slots=True)
class Lose:
    """This peer died while it had the task; the next worker that tries the request must know."""

    peer: str


Action = Lose | Push | Revoke | Strike | Finish


@dataclass(slots=True)
class Attempt:
    """One assignment, for the receipt."""

    number: int
    peer: str
    queued_s: float
    claimed_s: float
    is_hedged: bool
    """Whether others than the preferred peers had been asked by then."""
    outcome: str = "running"
    ended_s: float = 0.0
    num_blocks: int = 0
    num_bytes: int = 0
    """Of all KV that came, refused blocks included: what crossed the network."""

    @property
    def took_s(self) -> float:
        """From the claim to its end."""
        return self.ended_s - self.claimed_s

    def to_wire(self, name_of: Callable[[str], str]) -> dict[str, Any]:
        """For the receipt."""
        return {
            "attempt": self.number,
            "peer": name_of(self.peer),
            "outcome": self.outcome,
            "waited_ms": round((self.claimed_s - self.queued_s) * 1000, 3),
            "ms": round(self.took_s * 1000, 3) if self.ended_s else None,
            "hedged": self.is_hedged,
            "blocks": self.num_blocks,
            "bytes": self.num_bytes,
        }


@dataclass(slots=True)
class PrefillTask:
    """One prompt to be prefilled elsewhere."""

    request_id: str
    config: HandoffConfig
    lease_s: float
    """How long an attempt lives without a renewal."""
    created_s: float
    deadline_s: float = float("inf")
    """Of the request, on the same clock."""
    state: TaskState = TaskState.QUEUED
    attempt: int = 1
    """The one that is queued or running now; blocks of any other are refused."""
    peer: str | None = None
    """The peer that claimed the task."""
    attempts: list[Attempt] = field(default_factory=list)
    num_lost_before: int = 0
    """Workers that this request took down before this task began."""
    lost_peers: list[str] = field(default_factory=list)
    num_hedges: int = 0
    queued_s: float = 0.0
    """When the attempt that is queued or running now was put out."""
    _candidates: list[str] = field(default_factory=list)
    _ticketed: list[str] = field(default_factory=list)
    _asked: set[str] = field(default_factory=set)
    _tried: set[str] = field(default_factory=set)
    _renewed_s: float = 0.0
    _is_hedged: bool = False
    _offered_to: str | None = None
    _reminder_s: float = 0.0
    """From the queueing to the next reminder."""

    @property
    def is_final(self) -> bool:
        """Nothing changes any more."""
        return self.state not in (TaskState.QUEUED, TaskState.CLAIMED)

    def start(self, candidates: Sequence[str], now_s: float, num_preferred: int = 1, is_short: bool = False) -> list[Action]:
        """Send tickets to the first `num_preferred` of these peers, best first; to the others if none of
        the preferred claims in time.
        """
        self._candidates = list(candidates)
        # a short prompt is offered if one peer is asked: of several peers, all but one would compute in vain
        if is_short and num_preferred == 1 and self._candidates:
            self._offered_to = self._candidates[0]
        return self._queue(now_s, num_preferred, is_offer=self._offered_to is not None)

    def _queue(self, now_s: float, num_preferred: int, is_offer: bool = False) -> list[Action]:
        if not self._candidates:
            return self._finish(TaskState.LOCAL)
        self.state, self.peer, self.queued_s = TaskState.QUEUED, None, now_s
        self._is_hedged = num_preferred >= len(self._candidates)
        self._reminder_s = self.config.reminder_ms / 1000
        self._asked.clear()
        return [self._push(self._candidates[:num_preferred], is_offer)]

    def _retry(self, now_s: float) -> list[Action]:
        """Elsewhere, or locally if another failure would only show after the deadline."""
        longest_s = max([self.lease_s, *(attempt.took_s for attempt in self.attempts)])
        if self.deadline_s - now_s < longest_s:
            return self._finish(TaskState.LOCAL)
        return self._queue(now_s, len(self._candidates))  # all at once, as it is late already

    def _push(self, peers: Sequence[str], is_offer: bool = False) -> Push:
        self._ticketed += [peer for peer in peers if peer not in self._ticketed]
        self._asked.update(peers)
        return Push(tuple(peers), self.attempt, is_offer)

    def push_failed(self, peer: str, now_s: float, was_offer: bool = False) -> list[Action]:
        """The ticket could not be sent: the other peers are asked at once; if there is none, this peer again soon."""
        self._asked.discard(peer)
        if was_offer:
            self._offered_to = None
        if self.state is TaskState.QUEUED and not self._is_hedged and self._unasked(besides=peer):
            return self._hedge(besides=peer)
        self._remind_soon(now_s)
        return []

    def claim(self, peer: str, now_s: float, began_s: float | None = None) -> bool:
        """Whether this peer gets the task. False is "gone": claimed by another, ended, or failed there before.

        `began_s` is when the peer began on an offer, if it did.
        """
        if peer == self._offered_to:
            self._offered_to = None
        if self.state is not TaskState.QUEUED or peer in self._tried:
            return False
        self.state, self.peer, self._renewed_s = TaskState.CLAIMED, peer, now_s
        claimed_s = now_s if began_s is None else began_s
        self.attempts.append(Attempt(self.attempt, peer, self.queued_s, claimed_s, is_hedged=self.num_hedges > 0))
        return True

    def renew(self, peer: str, attempt: int, seen_s: float) -> None:
        """This attempt made progress at `seen_s`: the peer's heartbeat says so, or a block of it came."""
        if self.is_current(peer, attempt):
            self._renewed_s = max(self._renewed_s, seen_s)

    def received(self, num_blocks: int, num_bytes: int) -> None:
        """Blocks of the running attempt came, right or wrong."""
        self.attempts[-1].num_blocks += num_blocks
        self.attempts[-1].num_bytes += num_bytes

    def came_late(self, peer: str, attempt: int, num_blocks: int, num_bytes: int) -> None:
        """Count blocks that arrived after the end of their attempt, and were refused."""
        past = self.attempts[attempt - 1] if 0 < attempt <= len(self.attempts) else None
        if past is not None and past.peer == peer:
            past.num_blocks += num_blocks
            past.num_bytes += num_bytes

    def stalled(self, stall_s: float) -> None:
        """This process itself stood still for so long: its peers are given as much more time."""
        self._renewed_s += stall_s
        self.queued_s += stall_s

    def is_current(self, peer: str, attempt: int) -> bool:
        """Whether this is the attempt that runs."""
        return self.state is TaskState.CLAIMED and self.peer == peer and self.attempt == attempt

    def is_offered_to(self, peer: str) -> bool:
        """Whether this peer may have begun on an offer, and has not claimed yet."""
        return peer == self._offered_to

    def complete(self, now_s: float) -> list[Action]:
        """All blocks are in."""
        if self.state is not TaskState.CLAIMED:
            return []
        self._close_attempt("done", now_s)
        return self._finish(TaskState.DONE)

    def attempt_failed(self, peer: str, attempt: int, reason: str, now_s: float, *, is_peer_dead: bool = False) -> list[Action]:
        """The running attempt failed: the worker died, fell silent or gave up, or a block was refused."""
        if not self.is_current(peer, attempt):
            return []
        self._close_attempt(reason, now_s)
        may_return = self._may_return()
        if not may_return:
            self._tried.add(peer)
        if not may_return or reason != LINK_BROKE:
            self._candidates = [candidate for candidate in self._candidates if candidate != peer]
        actions: list[Action] = [Revoke(peer, attempt)]
        if is_peer_dead:
            actions.append(self._lose(peer))
            if self._has_lost_too_many():
                return [*actions, *self._finish(TaskState.GAVE_UP)]
            if self._offered_to in self._candidates:
                # the peer with the offer may be dying of this prompt too: a third peer must not get it
                self._candidates = [self._offered_to]
        self.attempt += 1
        return [*actions, *self._retry(now_s)]

    def _may_return(self) -> bool:
        last = self.attempts[-1]
        return last.outcome in _MAY_RETURN and last.num_bytes > 0 and len(self.attempts) < _MAX_ATTEMPTS

    def resume(self, peer: str, attempt: int, now_s: float) -> list[Action]:
        """The running attempt lost blocks with their connection, and its worker claims the task again: :meth:`claim` follows."""
        if not self.is_current(peer, attempt):
            return []
        self._close_attempt(LINK_BROKE, now_s)
        if not self._may_return():
            return self.attempt_failed(peer, attempt, LINK_BROKE, now_s)
        self.attempt += 1
        self.state, self.peer, self.queued_s = TaskState.QUEUED, None, now_s
        return [Revoke(peer, attempt)]

    def peer_gone(self, peer: str, now_s: float, *, is_dead: bool) -> list[Action]:
        """A prefill worker is suspect or dead."""
        if self.state is TaskState.CLAIMED and self.peer == peer:
            return self.attempt_failed(peer, self.attempt, "peer died" if is_dead else "peer silent", now_s, is_peer_dead=is_dead)
        # a peer that fell silent and then died took that attempt down too; a peer that was offered the prompt may have begun unheard
        is_suspect = peer == self._offered_to or any(past.peer == peer and past.outcome in _SILENT for past in self.attempts)
        if is_dead and is_suspect and not self.is_final and peer not in self.lost_peers:
            lost = self._lose(peer)
            if self._has_lost_too_many():
                return [lost, *self._revoke_running("gave up", now_s), *self._finish(TaskState.GAVE_UP)]
            return [lost, *self._ask_others(peer)]
        return self._ask_others(peer)

    def _ask_others(self, peer: str) -> list[Action]:
        if self.is_final or peer not in self._candidates:
            return []
        self._candidates.remove(peer)
        if self.state is TaskState.QUEUED and not self._candidates:
            return self._finish(TaskState.LOCAL)
        return self._hedge() if self.state is TaskState.QUEUED and peer in self._asked else []

    def peer_draining(self, peer: str, now_s: float) -> list[Action]:
        """A prefill worker takes no new work: it finishes running attempts; tickets that wait there go elsewhere."""
        is_running_there = self.state is TaskState.CLAIMED and self.peer == peer
        return [] if is_running_there else self.peer_gone(peer, now_s, is_dead=False)

    def _lose(self, peer: str) -> Lose:
        self.lost_peers.append(peer)
        self._tried.add(peer)
        return Lose(peer)

    def _has_lost_too_many(self) -> bool:
        return self.num_lost_before + len(self.lost_peers) >= self.config.max_lost_peers

    def _revoke_running(self, outcome: str, now_s: float) -> list[Action]:
        if self.state is not TaskState.CLAIMED:
            return []
        assert self.peer is not None
        self._close_attempt(outcome, now_s)
        return [Revoke(self.peer, self.attempt)]

    def peer_joined(self, peer: str, now_s: float) -> None:
        """A prefill worker came, or came back: one more to ask."""
        if not self.is_final and peer not in self._candidates and peer not in self._tried:
            self._candidates.append(peer)
            self._remind_soon(now_s)

    def _remind_soon(self, now_s: float) -> None:
        """Not now: the connection for tickets to a peer that has just come must come up first."""
        if self.state is TaskState.QUEUED:
            self._reminder_s = min(self._reminder_s, now_s - self.queued_s + self.config.hedge_ms / 1000)

    def fall_back(self, now_s: float, outcome: str = "no room") -> list[Action]:
        """The decode worker has no room for blocks: it prefills the prompt itself when its engine has room."""
        if self.is_final:
            return []
        if self.state is TaskState.CLAIMED:
            self._close_attempt(outcome, now_s)
        return self._finish(TaskState.LOCAL)

    def cancel(self, now_s: float) -> list[Action]:
        """The request was cancelled."""
        if self.is_final:
            return []
        return [*self._revoke_running("cancelled", now_s), *self._finish(TaskState.CANCELLED)]

    def tick(self, now_s: float) -> list[Action]:
        """Hedging, a lease that ran out, a claim that never came. To be called every few milliseconds."""
        if self.state is TaskState.CLAIMED and now_s - self._renewed_s > self.lease_s:
            assert self.peer is not None
            return self.attempt_failed(self.peer, self.attempt, "no longer named", now_s)
        if self.state is not TaskState.QUEUED:
            return []
        waited_s = now_s - self.queued_s
        # half of what the request has left stays for prefilling it here
        if waited_s > min(self.config.claim_timeout_s, (self.deadline_s - self.queued_s) / 2):
            return self._finish(TaskState.LOCAL)
        if not self._is_hedged and waited_s >= self.config.hedge_ms / 1000:
            return self._hedge()
        if waited_s >= self._reminder_s:
            # tickets are not acknowledged: all are sent again, ever more seldom, in case some were lost; one that arrived changes nothing
            self._reminder_s = max(2 * self._reminder_s, self.config.reminder_ms / 1000)
            self._is_hedged = True
            return [self._push(self._candidates)]
        return []

    def _hedge(self, besides: str | None = None) -> list[Action]:
        self._is_hedged = True
        others = self._unasked(besides)
        if not others:
            return []
        self.num_hedges += 1
        return [self._push(others)]

    def _unasked(self, besides: str | None) -> list[str]:
        return [peer for peer in self._candidates if peer not in self._asked and peer != besides]

    def _close_attempt(self, outcome: str, now_s: float) -> None:
        self.attempts[-1].outcome, self.attempts[-1].ended_s = outcome, now_s

    def _finish(self, state: TaskState) -> list[Action]:
        holder, self.state = self.peer, state
        void = tuple(peer for peer in self._ticketed if peer != holder)
        struck: list[Action] = [Strike(void)] if void else []
        return [*struck, Finish(state)]
