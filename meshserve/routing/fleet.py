"""All that a router knows, and what it answers from that. Pure: reports and questions in, rankings out."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from meshserve.kv.index import PrefixIndex
from meshserve.routing.bookings import Bookings
from meshserve.routing.candidates import Prompt, Rates, Worker
from meshserve.routing.cost import CostSettings, LoadForecast
from meshserve.routing.policies import rank, rank_prefill
from meshserve.routing.regret import Regret
from meshserve.wire.booking import Booking, Share
from meshserve.wire.routing import Candidate, WorkerLoad, WorkerReport

MAX_CANDIDATES = 8
"""Named in an answer: enough to go on to when the first is lost."""

MAX_SESSIONS = 10_000
"""Whose last worker is remembered. More cost memory, fewer forget a session that pauses."""

_FOLLOW = 0.02
"""Weight of the newest in a running mean: it follows the last fifty."""

_REFRESH_REPORTS = 64


@dataclass(slots=True)
class Question:
    """A request to be placed."""

    request_id: str
    prompt: Prompt
    decode: Sequence[str]
    """Incarnations of the workers that could take it."""
    prefill: Sequence[str] = ()
    """Those of the prefill workers that work with them."""
    session: str = ""
    """Requests of one session like to go to one worker; empty for none."""


@dataclass(slots=True)
class Answer:
    """The best candidates, first come first. Empty where there are no workers."""

    decode: list[Candidate]
    prefill: list[Candidate]
    booking: Booking | None = None
    """What was booked for it, for the other routers."""


class Fleet:
    """The workers that a router follows, the prefixes they hold, and what is on its way to them."""

    def __init__(self, settings: CostSettings | None = None, rng: random.Random | None = None) -> None:
        self.forecast = LoadForecast(settings or CostSettings())
        self._index = PrefixIndex()
        self._workers: dict[str, Worker] = {}
        self._bookings = Bookings()
        self._regret = Regret()
        self._sessions: dict[str, str] = {}
        self._rng = rng or random.Random()
        self._num_choices = 0
        self._num_measured = 0
        self._has_prefill_rate = self._has_decode_rate = False
        """Whether a worker ever measured that: what stood for it before was a guess."""
        self._num_blocks = 0

    # --- what workers say

    def join(self, incarnation: str, name: str) -> None:
        """Follow a worker. Harmless when that is done already."""
        if incarnation not in self._workers:
            self._workers[incarnation] = Worker(incarnation, name)

    def leave(self, incarnation: str) -> None:
        """The worker is gone, and its blocks with it. Harmless when nobody followed it."""
        worker = self._workers.pop(incarnation, None)
        if worker is not None:
            self._index.forget(incarnation)
            self._num_blocks -= worker.load.num_blocks

    def forget_blocks(self, incarnation: str) -> None:
        """The worker's watch begins anew: what it holds comes with the next reports."""
        self._index.forget(incarnation)

    def report(self, incarnation: str, report: WorkerReport, now_s: float) -> None:
        """A worker says how it is. Reports of workers that nobody follows are ignored."""
        worker = self._workers.get(incarnation)
        if worker is None:
            return
        for request_id in report.admitted:
            self._bookings.reported(incarnation, request_id, now_s)
        for request_id in report.kept:
            self._bookings.kept(incarnation, request_id)
        if worker.load.num_blocks != report.load.num_blocks:
            self._num_blocks += report.load.num_blocks - worker.load.num_blocks
            self._regret.capacity = max(2, self._num_blocks)
        worker.take_load(report.load, now_s)
        self._measure(worker)
        if report.evicted:
            self._take_evictions(worker, report.evicted)
        self._index.stored(incarnation, report.stored)

    def _measure(self, worker: Worker) -> None:
        """Follow how fast workers are and how much they write. Cost breakdowns are forgotten from time to time, as idle workers report
        nothing."""
        load, forecast = worker.load, self.forecast
        if load.mean_output_tokens:
            forecast.mean_output_tokens += (load.mean_output_tokens - forecast.mean_output_tokens) * _FOLLOW
        found = Rates.reported(load, forecast.rates)
        if found is None:
            return
        self._num_measured += 1
        if self._ends_a_guess(load, found):
            for other in self._workers.values():
                self._compare(other)
        elif self._compare(worker):
            forecast.rates = forecast.rates.towards(found, _FOLLOW)
        if self._num_measured % _REFRESH_REPORTS == 0:
            for other in self._workers.values():
                other.breakdown = None

    def _ends_a_guess(self, load: WorkerLoad, found: Rates) -> bool:
        """Whether a worker is the first that measured its prefill, or its decode steps: its figures stand for all that have none."""
        is_first_prefill = load.prefill_ns_per_token > 0 and not self._has_prefill_rate
        is_first_decode = load.decode_base_us > 0 and not self._has_decode_rate
        rates = self.forecast.rates
        if is_first_prefill:
            self._has_prefill_rate = True
            rates = replace(rates, prefill_base_ms=found.prefill_base_ms, prefill_ms_per_token=found.prefill_ms_per_token)
        if is_first_decode:
            self._has_decode_rate = True
            rates = replace(rates, decode_base_ms=found.decode_base_ms, decode_ms_per_block=found.decode_ms_per_block)
        if is_first_prefill or is_first_decode:
            self.forecast.rates = replace(rates, handoff_ms_per_token=found.handoff_ms_per_token)
        return is_first_prefill or is_first_decode

    def _compare(self, worker: Worker) -> bool:
        """Note whether a worker has rates of its own. True if it measured some, and they are like the others'."""
        found = Rates.reported(worker.load, self.forecast.rates)
        worker.breakdown = None
        worker.rates = None if found is None or found.is_like(self.forecast.rates, worker.load.num_blocks) else found
        return found is not None and worker.rates is None

    def _take_evictions(self, worker: Worker, evicted: Sequence[int]) -> None:
        lost = self._index.evicted(worker.incarnation, evicted)
        self._regret.evicted(lost, len(evicted) - len(lost))
        self.forecast.regret = self._regret.share
        if not self._num_blocks:
            return
        self.forecast.replication.evicted(len(evicted) / self._num_blocks)
        # old evictions fade as new ones come, not with time: half of them count when a quarter of all blocks has been replaced
        keep = 0.5 ** (4 * len(evicted) / self._num_blocks)
        total = 0.0
        for other in self._workers.values():
            other.recent_evictions *= keep
            total += other.recent_evictions
        worker.recent_evictions += len(evicted)
        worker.breakdown = None
        self.forecast.mean_turnover = (total + len(evicted)) / self._num_blocks

    def num_bookings(self, now_s: float) -> int:
        """Requests that count on a worker which has not reported them yet."""
        self._bookings.expire(now_s)
        return len(self._bookings)

    def num_booked_tokens(self) -> int:
        """Of the workers, by their own books: 0 where there is no booking."""
        return sum(worker.booked_tokens for worker in self._workers.values())

    def held_by(self, incarnation: str) -> set[int]:
        """Hashes of the blocks that a worker is known to hold. Walks the whole index: for checks, not for routing."""
        return self._index.held_by(incarnation)

    # --- what is asked

    def choose(self, policy: str, question: Question, now_s: float) -> Answer:
        """Rank the workers and book the request on the best. KeyError for an unknown policy, or a worker that is not followed."""
        self._bookings.expire(now_s)
        prompt, forecast, followed = question.prompt, self.forecast, self._workers
        prefill = self._rank_prefill(question, now_s) if question.prefill else []
        overlaps = self._index.overlaps(prompt.hashes, question.decode)
        decode = rank(
            policy,
            prompt,
            list(map(followed.__getitem__, question.decode)),
            overlaps,
            self._rng,
            forecast=forecast,
            now_s=now_s,
            remote_ms=prefill[0].cost_ms if prefill else None,
            home=self._sessions.get(question.session) if question.session else None,
            limit=MAX_CANDIDATES,
        )
        if not decode:
            return Answer(decode, prefill)
        self._regret.asked(prompt.hashes, max(overlaps))
        booking = self._booking_for(question, decode[0], prefill)
        for share in booking.shares:
            self._bookings.book(followed[share.incarnation], booking.request_id, share.num_tokens, now_s, share.num_blocks)
        self._note_choice(booking)
        return Answer(decode, prefill, booking)

    def _rank_prefill(self, question: Question, now_s: float) -> list[Candidate]:
        workers = [self._workers[incarnation] for incarnation in question.prefill]
        overlaps = self._index.overlaps(question.prompt.hashes, question.prefill)
        return rank_prefill(question.prompt, workers, overlaps, forecast=self.forecast, now_s=now_s, limit=MAX_CANDIDATES)

    def _booking_for(self, question: Question, chosen: Candidate, prefill: list[Candidate]) -> Booking:
        prompt, forecast = question.prompt, self.forecast
        uncached = max(1, prompt.num_tokens - chosen.overlap_blocks * prompt.block_size)
        forecast.mean_uncached_tokens += (uncached - forecast.mean_uncached_tokens) * _FOLLOW
        num_blocks = -(-prompt.num_tokens // prompt.block_size)
        if prefill and chosen.wait_ms == prefill[0].cost_ms:  # it is assumed to hand over: it waits for no queue of its own
            other = next((found for found in prefill if found.incarnation != chosen.incarnation), None)  # nobody hands over to himself
            if other is not None:
                remaining = max(1, prompt.num_tokens - other.overlap_blocks * prompt.block_size)
                shares = Share(chosen.incarnation, 1, num_blocks), Share(other.incarnation, remaining, num_blocks)
                return Booking(question.request_id, shares, question.session)
        return Booking(question.request_id, (Share(chosen.incarnation, uncached, num_blocks),), question.session)

    def _note_choice(self, booking: Booking) -> None:
        """Turns and sessions, of this router's choices and of the others'."""
        self._num_choices += 1
        shares = booking.shares
        decode = self._workers.get(shares[0].incarnation)
        if decode is not None:
            decode.last_chosen = self._num_choices
        if len(shares) > 1 and (prefill := self._workers.get(shares[1].incarnation)) is not None:
            prefill.last_prefilled = self._num_choices
        if booking.session:
            self._sessions.pop(booking.session, None)
            self._sessions[booking.session] = shares[0].incarnation
            if len(self._sessions) > MAX_SESSIONS:
                del self._sessions[next(iter(self._sessions))]

    # --- what other routers say

    def hear(self, booking: Booking, now_s: float) -> None:
        """Another router has sent a request. Workers that nobody follows here are passed over."""
        for share in booking.shares:
            worker = self._workers.get(share.incarnation)
            if worker is not None:
                self._bookings.hear(worker, booking.request_id, share.num_tokens, now_s, share.num_blocks)
        self._note_choice(booking)

    def unbook(self, incarnation: str, request_id: str) -> None:
        """It went elsewhere. Harmless when it is not booked."""
        self._bookings.end(incarnation, request_id)
