"""A prefill worker's prompts, from ticket to delivery: a pure state machine, the other end of :mod:`meshserve.handoff.task`.

A ticket waits until the engine has room, then it is claimed and becomes a job. A granted claim is computed, its blocks are sent until the
decode worker says that it has them all. Every input takes the time; inputs that come late or twice change nothing.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from meshserve.config import HandoffConfig
from meshserve.handoff.blocks import BlockWindow
from meshserve.wire.handoff import Ticket

_ANSWER_S = 0.05
"""A claim that is not answered by then holds up no other: its decode worker may be hung."""
_RATE_WEIGHT = 0.25
"""Of a new measurement in the running average."""

JobKey = tuple[str, str]
"""Decode worker and request: request ids are unique at one decode worker only."""


class JobState(StrEnum):
    """Where a job stands. Before its first state there is only a ticket, which waits in the queue."""

    CLAIMING = "claiming"
    """The claim is on its way; nothing is known but the ticket."""
    COMPUTING = "computing"
    """The engine has the prompt, in its own queue or in a step; blocks leave as they are ready."""
    SENDING = "sending"
    """All is computed; blocks are still on their way."""
    DELIVERED = "delivered"
    """All blocks left with the claim, and none is held here; the answer is to come."""
    OVER = "over"
    """Done, or given up."""


@dataclass(slots=True, eq=False)
class Job:
    """One prompt from its claim, or its beginning on an offer, to its end.

    :class:`~meshserve.handoff.provider.PrefillJob` adds the claim's stream and the engine's run.
    """

    ticket: Ticket
    state: JobState = JobState.CLAIMING
    attempt: int = 0
    """The ticket's, then that of the granted claim."""
    is_granted: bool = False
    """The claim was granted. Until then, the blocks of a prompt that was begun on an offer stay here."""
    prefix_hashes: list[int] = field(default_factory=list)
    """Of the prompt's blocks, see :func:`~meshserve.kv.pool.prefix_hashes`."""
    window: BlockWindow | None = None
    """Blocks that are computed, or on their way; None before the engine got the prompt, and once the decode worker cannot be reached."""
    layout: str = ""
    """Fingerprint of the KV layout that they have."""
    computed_ms: float = 0.0
    """From the beginning to the latest block."""
    is_in_line: bool = False
    """For sending a message."""

    def __post_init__(self) -> None:
        self.attempt = self.ticket.attempt

    def is_running(self, attempt: int) -> bool:
        """Whether this very attempt has begun here and has not ended."""
        return self.attempt == attempt and self.state not in (JobState.CLAIMING, JobState.OVER)

    @property
    def key(self) -> JobKey:
        """Its name in the queue."""
        return self.ticket.decode_peer, self.ticket.request_id


J = TypeVar("J", bound=Job)


class TicketList:
    """Unclaimed tickets, one per request. A newer attempt's replaces an older one's.

    Decode workers take turns by tokens served: next is the worker that got least, so that a thousand long
    prompts of one worker cannot keep one prompt of another waiting (start-time fair queueing, Goyal et al.,
    SIGCOMM 1996). Of one decode worker's tickets, those of later attempts come first: they have waited once
    already. All else is in order of arrival.
    """

    def __init__(self, max_tickets: int) -> None:
        self._max = max_tickets
        self._tickets: dict[str, OrderedDict[str, Ticket]] = {}
        self.num_waiting = 0
        self._served_tokens: dict[str, int] = {}
        self._level_tokens = 0

    def add(self, ticket: Ticket) -> bool:
        """False if the list is full: the sender's hedging finds another worker. An older attempt's ticket is passed over."""
        own = self._tickets.get(ticket.decode_peer)
        known = own.get(ticket.request_id) if own is not None else None
        if known is not None and known.attempt >= ticket.attempt:
            return True
        if known is None and self.num_waiting >= self._max:
            return False
        self.strike(ticket.decode_peer, ticket.request_id)
        own = self._tickets.get(ticket.decode_peer)
        if own is None:
            own = self._tickets[ticket.decode_peer] = OrderedDict()
            # a worker that comes back after a pause starts level with the others, not with a credit
            self._served_tokens[ticket.decode_peer] = max(self._level_tokens, self._served_tokens.get(ticket.decode_peer, 0))
        own[ticket.request_id] = ticket
        if ticket.attempt > 1:
            for waiting in [found.request_id for found in own.values() if found.attempt == 1]:
                own.move_to_end(waiting)
        self.num_waiting += 1
        return True

    def strike(self, decode_peer: str, request_id: str) -> bool:
        """The ticket is void. False if it is not here (any more)."""
        own = self._tickets.get(decode_peer)
        if own is None or own.pop(request_id, None) is None:
            return False
        self.num_waiting -= 1
        if not own:
            del self._tickets[decode_peer]
        return True

    def strike_all_of(self, decode_peer: str) -> None:
        """The decode worker is gone, and its tasks with it."""
        self.num_waiting -= len(self._tickets.pop(decode_peer, ()))
        self._served_tokens.pop(decode_peer, None)

    def peek(self) -> Ticket | None:
        """The next ticket to claim, if any."""
        if not self._tickets:
            return None
        decode_peer = min(self._tickets, key=self._served_tokens.__getitem__)
        return next(iter(self._tickets[decode_peer].values()))

    def take(self) -> Ticket | None:
        """The next ticket to claim, off the list."""
        ticket = self.peek()
        if ticket is not None:
            self._level_tokens = max(self._level_tokens, self._served_tokens[ticket.decode_peer])
            self.strike(ticket.decode_peer, ticket.request_id)
        return ticket

    def serve(self, decode_peer: str, num_tokens: int) -> None:
        """A claim was granted: its decode worker is served so many tokens more."""
        if decode_peer in self._served_tokens:
            self._served_tokens[decode_peer] += num_tokens


class ClaimPace:
    """When a prefill worker claims its next prompt, by the prompts that it has claimed and not yet computed.

    Too late, and the worker is idle for a round trip between two prompts. Too early, and a prompt is bound
    to a worker that still computes a long one, while another comes free. So a worker claims when it has
    nothing, and when it is about to have nothing. Keys are the caller's; times are seconds of one clock.
    """

    def __init__(self, config: HandoffConfig) -> None:
        self._config = config
        self._remaining: dict[Hashable, int] = {}
        """Tokens of each prompt that are not computed yet."""
        self._unanswered_since_s: dict[Hashable, float] = {}
        self._computed_tokens = 0
        self._marked_s = 0.0
        self._progressed_s = 0.0
        self.tokens_per_s: float | None = None
        """How fast this worker computes prompts; None before the first one ended."""

    def may_claim(self, num_tokens: int, num_waiting: int, now_s: float) -> bool:
        """Whether to claim the next prompt now, which has `num_tokens`, while `num_waiting` tickets wait."""
        if len(self._remaining) >= self._config.prefill_slots:
            return False
        unanswered = [since_s for since_s in self._unanswered_since_s.values() if now_s - since_s > _ANSWER_S]
        if len(self._remaining) == len(unanswered):
            return True
        # where so many wait that no worker comes free, a batch is computed in less time than its prompts one by one
        batch_tokens = sum(self._remaining.values()) + num_tokens
        if num_waiting > self._config.prefill_slots and batch_tokens <= self._config.prefill_batch_tokens:
            return True
        return self.claim_in_s(now_s) <= 0

    def claim_in_s(self, now_s: float) -> float:
        """Until the claimed prompts take no longer than `claim_ahead_ms` at the measured rate. Infinite
        where no rate was measured yet, or where all slots are taken.
        """
        if self.tokens_per_s is None or len(self._remaining) >= self._config.prefill_slots:
            return math.inf
        ends_s = self._progressed_s + sum(self._remaining.values()) / self.tokens_per_s
        return ends_s - self._config.claim_ahead_ms / 1000 - now_s

    def claimed(self, key: Hashable, num_tokens: int, now_s: float) -> None:
        """A claim goes out for a prompt of so many tokens."""
        if not self._remaining:
            self._computed_tokens, self._marked_s, self._progressed_s = 0, now_s, now_s
        self._remaining[key] = num_tokens
        self._unanswered_since_s[key] = now_s

    def granted(self, key: Hashable, num_tokens: int, now_s: float) -> None:
        """The claim was granted; `num_tokens` are left to compute."""
        self._unanswered_since_s.pop(key, None)
        if len(self._remaining) == 1:
            self._computed_tokens, self._marked_s, self._progressed_s = 0, now_s, now_s  # nothing ran while it was on its way
        self._remaining[key] = num_tokens

    def computed(self, key: Hashable, num_tokens: int, now_s: float) -> None:
        """So many of its tokens are computed."""
        remaining = self._remaining.get(key)
        if remaining is not None:
            done = min(num_tokens, remaining)
            self._remaining[key] = remaining - done
            self._computed_tokens += done
            self._progressed_s = now_s

    def was_cached(self, num_tokens: int) -> None:
        """So many of the computed tokens were prefix hits, which say nothing about the rate."""
        self._computed_tokens = max(0, self._computed_tokens - num_tokens)

    def ended(self, key: Hashable, now_s: float) -> None:
        """Computed, or given up."""
        self._unanswered_since_s.pop(key, None)
        if self._remaining.pop(key, None) is not None and self._computed_tokens and now_s > self._marked_s:
            rate = self._computed_tokens / (now_s - self._marked_s)
            self.tokens_per_s = rate if self.tokens_per_s is None else self.tokens_per_s + _RATE_WEIGHT * (rate - self.tokens_per_s)
            self._computed_tokens, self._marked_s = 0, now_s


class PrefillQueue(Generic[J]):
    """Owns waiting tickets and jobs, and decides which ticket is claimed next, for which `make_job` makes the job."""

    def __init__(self, config: HandoffConfig, make_job: Callable[[Ticket], J]) -> None:
        self._tickets = TicketList(config.max_tickets)
        self._pace = ClaimPace(config)
        self._make_job = make_job
        self.jobs: dict[JobKey, J] = {}
        """Those that are not over."""
        self._num_delivered = 0
        self._last_offers: dict[str, int] = {}
        """The number of each decode worker's latest offer."""
        self._offer_s = config.hedge_ms / 2000
        """How long an offer is good: half of the time after which its decode worker asks others."""
        self._max_jobs = config.prefill_slots + config.sending_slots

    @property
    def num_waiting(self) -> int:
        """Tickets that are not claimed."""
        return self._tickets.num_waiting

    @property
    def num_queued(self) -> int:
        """Prompts that wait here, claimed or not."""
        return self._tickets.num_waiting + len(self.jobs) - self._num_delivered

    @property
    def num_claimed(self) -> int:
        """Prompts that are not delivered yet."""
        return len(self.jobs) - self._num_delivered

    def ticket(self, ticket: Ticket, now_s: float) -> bool:
        """There is a prompt to compute. False if the list is full. A ticket for a claimed prompt is ignored."""
        offer, decode_peer = ticket.offer, ticket.decode_peer
        if offer is not None and offer.number > self._last_offers.get(decode_peer, 0):
            # an offer that comes again keeps its time of -inf: it is an ordinary ticket
            self._last_offers[decode_peer], offer.came_s = offer.number, now_s
        job = self.jobs.get((decode_peer, ticket.request_id))
        if job is not None and job.attempt >= ticket.attempt:
            return True
        return self._tickets.add(ticket)

    def strike(self, key: JobKey) -> bool:
        """This ticket is void. False if it is not here (any more)."""
        return self._tickets.strike(*key)

    def peer_gone(self, decode_peer: str) -> None:
        """The decode worker is dead: its tickets are void. Its running jobs end with their claims' streams."""
        self._tickets.strike_all_of(decode_peer)
        self._last_offers.pop(decode_peer, None)

    def next_claim(self, now_s: float) -> J | None:
        """The job to claim now, if it is time for one: it is `CLAIMING` from here on, until `granted` or `ended`.

        A job that :meth:`may_begin` is `granted` its own attempt by the caller, and claimed later.
        """
        while (ticket := self._tickets.peek()) is not None:
            if not self._pace.may_claim(ticket.num_tokens, self._tickets.num_waiting, now_s):
                return None
            known = self.jobs.get((ticket.decode_peer, ticket.request_id))
            if self.num_claimed >= self._max_jobs or (known is not None and known.state is JobState.CLAIMING):
                return None  # the answer to the earlier claim comes first: `ended` is followed by another look
            self._tickets.take()
            if known is not None:
                continue  # an older attempt at it runs here, and its end is on its way: this worker had its try
            job = self._make_job(ticket)
            self.jobs[job.key] = job
            self._pace.claimed(job.key, ticket.num_tokens, now_s)
            return job
        return None

    def may_begin(self, ticket: Ticket, now_s: float) -> bool:
        """Whether its prompt may be computed before it is claimed: by now, an old offer may be another worker's."""
        return ticket.offer is not None and now_s - ticket.offer.came_s < self._offer_s

    def claim_in_s(self, now_s: float) -> float | None:
        """When to call :meth:`next_claim` again if nothing happens; None if only an event can make room."""
        if not self._tickets.num_waiting:
            return None
        wait_s = self._pace.claim_in_s(now_s)
        return wait_s if 0 < wait_s < math.inf else None

    def granted(self, job: J, attempt: int, num_tokens: int, now_s: float) -> bool:
        """The claim was the first: `num_tokens` are to be computed. False if they are not wanted (any more)."""
        if job.state is not JobState.CLAIMING:
            return False
        job.state, job.attempt = JobState.COMPUTING, attempt
        self._pace.granted(job.key, num_tokens, now_s)
        self._tickets.serve(job.ticket.decode_peer, num_tokens)
        return True

    def granted_otherwise(self, job: J, now_s: float) -> None:
        """The granted task is another than was begun on the offer: nothing of it is computed, `granted` follows."""
        if job.state is JobState.DELIVERED:
            self._num_delivered -= 1
        job.state = JobState.CLAIMING
        self._pace.ended(job.key, now_s)

    def delivered(self, job: J) -> None:
        """The whole prompt is computed, and its blocks leave with its claim."""
        if job.state is JobState.SENDING:
            job.state = JobState.DELIVERED
            self._num_delivered += 1

    def computed(self, job: J, num_tokens: int, now_s: float) -> None:
        """`num_tokens` more are computed."""
        self._pace.computed(job.key, num_tokens, now_s)

    def all_computed(self, job: J, num_cached_tokens: int, now_s: float) -> None:
        """The engine has room again. `num_cached_tokens` of the prompt were prefix hits."""
        self._pace.was_cached(num_cached_tokens)
        if job.state is JobState.COMPUTING:
            job.state = JobState.SENDING
            self._pace.ended(job.key, now_s)

    def ended(self, job: J, now_s: float) -> JobState:
        """Delivered, gone, revoked or lost. Returns the state before: `OVER` if the job had ended already."""
        stood, job.state = job.state, JobState.OVER
        if stood is not JobState.OVER:
            del self.jobs[job.key]
            self._num_delivered -= stood is JobState.DELIVERED
            self._pace.ended(job.key, now_s)
        return stood
