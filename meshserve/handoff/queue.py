"""A prefill worker's prompts, from ticket to delivery: a pure state machine. The other end of :mod:`meshserve.handoff.task`.

A ticket waits until the engine has room, then it is claimed; a granted claim is computed, its blocks are sent until the decode worker says
that it has them all. Every input takes the time; inputs about what is not here (any more) change nothing.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from meshserve.config import HandoffConfig
from meshserve.handoff.claiming import ClaimPace
from meshserve.handoff.tickets import TicketList
from meshserve.wire.handoff import Ticket

JobKey = tuple[str, str]
"""Decode worker and request: ids are unique at one decode worker, and need not be beyond."""


class JobState(StrEnum):
    """Where a claimed prompt stands."""

    CLAIMING = "claiming"
    """The claim is on its way; nothing is known but the ticket."""
    COMPUTING = "computing"
    """The engine has it; blocks leave as they are ready."""
    SENDING = "sending"
    """All is computed; blocks are still on their way."""
    DELIVERED = "delivered"
    """All blocks went with the claim itself. Nothing is held for it here, but its answer is to come."""


@dataclass(slots=True)
class _Job:
    state: JobState
    attempt: int
    """The ticket's, then that of the granted claim."""


class PrefillQueue:
    """Owns what waits and what runs, and decides what is claimed next."""

    def __init__(self, config: HandoffConfig) -> None:
        self._tickets = TicketList(config.max_tickets)
        self._pace = ClaimPace(config)
        self._jobs: dict[JobKey, _Job] = {}
        self._num_delivered = 0
        self._last_offers: dict[str, int] = {}
        """The number of each decode worker's latest offer."""
        self._offer_s = config.hedge_ms / 2000
        """How long an offer is good: half of the time after which its decode worker asks others."""
        self._max_jobs = config.prefill_slots + config.sending_slots

    @property
    def num_waiting(self) -> int:
        """Tickets that are not claimed."""
        return len(self._tickets)

    @property
    def num_claimed(self) -> int:
        """Prompts that are not delivered yet."""
        return len(self._jobs) - self._num_delivered

    @property
    def tokens_per_s(self) -> float | None:
        """How fast this worker computes prompts; None before the first one ended."""
        return self._pace.tokens_per_s

    def state(self, key: JobKey) -> JobState | None:
        """None if it is not claimed here (any more)."""
        job = self._jobs.get(key)
        return job.state if job is not None else None

    def is_running(self, key: JobKey, attempt: int) -> bool:
        """Whether this very attempt was granted to this worker and has not ended."""
        job = self._jobs.get(key)
        return job is not None and job.state is not JobState.CLAIMING and job.attempt == attempt

    def ticket(self, ticket: Ticket, now_s: float) -> bool:
        """There is a prompt to compute. False if the list is full. One for what is claimed already is passed over."""
        if ticket.offer is not None and ticket.offer.number > self._last_offers.get(ticket.decode_peer, 0):
            self._last_offers[ticket.decode_peer] = ticket.offer.number
            ticket.offer.came_s = now_s
        job = self._jobs.get((ticket.decode_peer, ticket.request_id))
        if job is not None and job.attempt >= ticket.attempt:
            return True
        return self._tickets.add(ticket)

    def strike(self, key: JobKey) -> bool:
        """This ticket is void. False if it is not here (any more)."""
        return self._tickets.strike(*key)

    def peer_gone(self, decode_peer: str) -> None:
        """The decode worker is dead: its tickets are void. What runs for it ends with its claim's stream."""
        self._tickets.strike_all_of(decode_peer)
        self._last_offers.pop(decode_peer, None)

    def next_claim(self, now_s: float) -> Ticket | None:
        """The ticket to claim now, if it is time for one: it is `CLAIMING` from here on, until `granted` or `ended`.

        One that :meth:`may_begin` is `granted` its own attempt by who carries this out, and claimed later.
        """
        while (ticket := self._tickets.peek()) is not None and self._pace.may_claim(ticket.num_tokens, len(self._tickets), now_s):
            key = (ticket.decode_peer, ticket.request_id)
            job = self._jobs.get(key)
            if self.num_claimed >= self._max_jobs or (job is not None and job.state is JobState.CLAIMING):
                return None  # the answer to the earlier claim comes first: `ended` is followed by another look
            self._tickets.take()
            if job is not None:
                continue  # an older attempt at it runs here, and its end is on its way: this worker had its try
            self._jobs[key] = _Job(JobState.CLAIMING, ticket.attempt)
            self._pace.claimed(key, ticket.num_tokens, now_s)
            return ticket
        return None

    def may_begin(self, ticket: Ticket, now_s: float) -> bool:
        """Whether its prompt may be computed before it is claimed: what was offered long ago may be somebody else's by now."""
        return ticket.offer is not None and now_s - ticket.offer.came_s < self._offer_s

    def claim_in_s(self, now_s: float) -> float | None:
        """When to ask :meth:`next_claim` again if nothing happens until then; None if nothing waits, or only an event can make room."""
        if not self._tickets:
            return None
        wait_s = self._pace.claim_in_s(now_s)
        return wait_s if 0 < wait_s < math.inf else None

    def granted(self, key: JobKey, attempt: int, num_tokens: int, now_s: float) -> bool:
        """The claim was the first: so many tokens are to be computed. False if it is not wanted (any more)."""
        job = self._jobs.get(key)
        if job is None or job.state is not JobState.CLAIMING:
            return False
        job.state, job.attempt = JobState.COMPUTING, attempt
        self._pace.granted(key, num_tokens, now_s)
        self._tickets.serve(key[0], num_tokens)
        return True

    def granted_otherwise(self, key: JobKey, now_s: float) -> None:
        """What was begun on an offer is claimed now, and its task is another: computed is nothing yet, and `granted` follows."""
        job = self._jobs[key]
        if job.state is JobState.DELIVERED:
            self._num_delivered -= 1
        job.state = JobState.CLAIMING
        self._pace.ended(key, now_s)

    def delivered(self, key: JobKey) -> None:
        """All is computed, and its blocks leave with its claim."""
        job = self._jobs.get(key)
        if job is not None and job.state is JobState.SENDING:
            job.state = JobState.DELIVERED
            self._num_delivered += 1

    def computed(self, key: JobKey, num_tokens: int, now_s: float) -> None:
        """So many more of its tokens are done."""
        self._pace.computed(key, num_tokens, now_s)

    def all_computed(self, key: JobKey, num_cached_tokens: int, now_s: float) -> None:
        """The engine has room again. So many of the tokens had been in its cache."""
        job = self._jobs.get(key)
        self._pace.was_cached(num_cached_tokens)
        if job is not None and job.state is JobState.COMPUTING:
            job.state = JobState.SENDING
            self._pace.ended(key, now_s)

    def ended(self, key: JobKey, now_s: float) -> JobState | None:
        """Delivered, gone, revoked or lost. Returns where it stood; None if it was not here."""
        job = self._jobs.pop(key, None)
        if job is None:
            return None
        if job.state is JobState.DELIVERED:
            self._num_delivered -= 1
        self._pace.ended(key, now_s)
        return job.state
