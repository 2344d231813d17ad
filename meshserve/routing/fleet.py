"""All that a router knows, and what it answers from that. Pure: reports and questions in, rankings out."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from meshserve.kv.pool import PrefixIndex
from meshserve.routing.demand import Regret
from meshserve.routing.kinds import Kind
from meshserve.routing.policies import rank, rank_prefill
from meshserve.routing.workers import CostSettings, LoadForecast, Prompt, Worker
from meshserve.wire.routing import Candidate, InFlightReservation, Share, WorkerLoad, WorkerReport

MAX_CANDIDATES = 8
"""Named in an answer: enough to go on to when the first is lost."""

MAX_SESSIONS = 10_000
"""Whose last worker is remembered. More cost memory, fewer forget a session that pauses."""

_FOLLOW = 0.02
"""Weight of the newest in a running mean: it follows the last fifty."""

RESERVATION_TIMEOUT_S = 2.0
"""A reservation that no report ended by then is dropped."""

_MOST_HELD = 2
"""Times the blocks of its pool that a worker may say it holds: what it evicts may be told later than what it stores."""
_MOST_OUTPUT_TOKENS = 100_000
"""A worker's mean beyond it counts as it: one with a fault must not void the forecast of all others."""
_MOST_REMEMBERED = 1 << 22
"""Evicted blocks, 100 bytes each."""

_MAX_REPORTED = 4096
"""Requests that a worker reported before this router heard of them; beyond it the oldest are forgotten."""


def take_load(worker: Worker, load: WorkerLoad, now_s: float) -> None:
    """Replace the load that a worker reported; in-flight reservations come on top."""
    worker.load, worker.reported_at_s, worker.breakdown = load, now_s, None
    worker.num_sequences = load.num_running + load.num_waiting + worker.num_in_flight


@dataclass(slots=True)
class _Reservation:
    worker: Worker
    num_tokens: int
    num_blocks: int
    until_s: float


class InFlight:
    """Load that routers have sent out and no worker has reported yet, so that two choices in one millisecond
    do not pile onto one worker. Names of requests are counted once for each worker.
    """

    def __init__(self) -> None:
        self.reservations: dict[tuple[str, str], _Reservation] = {}
        """By incarnation and request."""
        self._reported: dict[tuple[str, str], float] = {}
        self.due_s = 0.0
        """Nothing is due before: to find the first of a dict whose first ones are deleted all the time
        takes a microsecond."""

    def reserve(
        self, worker: Worker, request_id: str, num_tokens: int, now_s: float, num_blocks: int = 0
    ) -> None:
        """Count this request on the worker until the worker reports it, or for two seconds.

        `num_tokens` are those that the worker will compute, `num_blocks` those that it will hold.
        """
        key = worker.incarnation, request_id
        if key in self.reservations:
            self.release(*key)
        until_s = now_s + RESERVATION_TIMEOUT_S
        self.reservations[key] = _Reservation(worker, num_tokens, num_blocks, until_s)
        worker.in_flight_tokens += num_tokens
        worker.in_flight_blocks += num_blocks
        worker.num_in_flight += 1
        worker.num_sequences += 1
        worker.breakdown = None

    def hear(
        self, worker: Worker, request_id: str, num_tokens: int, now_s: float, num_blocks: int = 0
    ) -> None:
        """Count another router's reservation, unless the worker's report came before the other router's
        word.
        """
        self.expire(now_s)  # a router that nobody asks hears all the same
        if self._reported.pop((worker.incarnation, request_id), None) is None:
            self.reserve(worker, request_id, num_tokens, now_s, num_blocks)

    def release(self, incarnation: str, request_id: str) -> bool:
        """The worker's own report counts the request, or it went elsewhere. False if nothing was reserved."""
        found = self.reservations.pop((incarnation, request_id), None)
        if found is None:
            return False
        worker = found.worker
        worker.in_flight_tokens -= found.num_tokens
        worker.in_flight_blocks -= found.num_blocks
        worker.num_in_flight -= 1
        worker.num_sequences -= 1
        worker.breakdown = None
        return True

    def reported(self, incarnation: str, request_id: str, now_s: float) -> None:
        """A worker's report counts a request of which this router has not heard yet who sent it there."""
        self._reported[incarnation, request_id] = now_s + RESERVATION_TIMEOUT_S
        if len(self._reported) > _MAX_REPORTED:
            del self._reported[next(iter(self._reported))]

    def expire(self, now_s: float) -> None:
        """Drop what is due. Reservations are made in order of time, so the first that is not due ends the
        search.
        """
        if now_s < self.due_s:
            return
        due, self.due_s = [], now_s + RESERVATION_TIMEOUT_S  # of what is reserved from now on
        for key, found in self.reservations.items():
            if found.until_s > now_s:
                self.due_s = found.until_s
                break
            due.append(key)
        for key in due:
            self.release(*key)
        while self._reported:
            first_s = next(iter(self._reported.values()))
            if first_s > now_s:
                self.due_s = min(self.due_s, first_s)
                break
            del self._reported[next(iter(self._reported))]

    def kept(self, incarnation: str, request_id: str) -> None:
        """This worker computes the prompt itself: what was reserved on others for it is not going to be
        reported by them.
        """
        for key in [key for key in self.reservations if key[1] == request_id and key[0] != incarnation]:
            self.release(*key)


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
    reservation: InFlightReservation | None = None
    """Of the load that is in flight now, for the other routers."""


class Fleet:
    """The workers that a router follows, the prefixes they hold, and what is on its way to them."""

    def __init__(self, settings: CostSettings | None = None, rng: random.Random | None = None) -> None:
        self.forecast = LoadForecast(settings or CostSettings())
        self._index = PrefixIndex()
        self._workers: dict[str, Worker] = {}
        self._kinds: dict[str, Kind] = {}
        self._in_flight = InFlight()
        self._regret = Regret()
        self._sessions: dict[str, str] = {}
        self._rng = rng or random.Random()
        self._num_choices = 0
        self._num_blocks = 0
        """Of all workers together."""
        self._smallest_pool = 0
        """Blocks of the worker that has the fewest; 0 until a worker says how many it has."""

    # --- what workers say

    def join(self, incarnation: str, name: str, kind: str = "") -> None:
        """Follow a worker. Harmless when that is done already. `kind` names its engine and model."""
        if incarnation not in self._workers:
            worker = self._workers[incarnation] = Worker(incarnation, name, kind)
            self._kinds.setdefault(kind, Kind()).join(worker)

    def rename(self, incarnation: str, name: str) -> None:
        """Call a worker by another name from now on. Harmless for one that is not followed."""
        if incarnation in self._workers:
            self._workers[incarnation].name = name

    def leave(self, incarnation: str) -> None:
        """Forget a worker that is gone, and its blocks. Harmless for one that is not followed."""
        worker = self._workers.pop(incarnation, None)
        if worker is not None:
            self._index.forget(incarnation)
            self._count_blocks()
            self._kinds[worker.kind].leave(incarnation)
            if not self._kinds[worker.kind]:
                del self._kinds[worker.kind]

    def forget_blocks(self, incarnation: str) -> None:
        """The worker's watch begins anew: what it holds comes with the next reports."""
        self._index.forget(incarnation)

    def report(self, incarnation: str, report: WorkerReport, now_s: float) -> bool:
        """Take in a worker's report. Reports of workers that are not followed are ignored. False: the worker says that it holds more
        blocks than it has, and none of them is believed.
        """
        worker = self._workers.get(incarnation)
        if worker is None:
            return True
        in_flight = self._in_flight
        for request_id in report.admitted:
            if not in_flight.release(incarnation, request_id):
                in_flight.reported(incarnation, request_id, now_s)
        if in_flight.reservations:
            for request_id in report.kept:
                in_flight.kept(incarnation, request_id)
        before, load = worker.load, report.load
        take_load(worker, load, now_s)
        if before.num_blocks != load.num_blocks:
            self._count_blocks()
        if load.mean_output_tokens:
            difference = min(load.mean_output_tokens, _MOST_OUTPUT_TOKENS) - self.forecast.mean_output_tokens
            self.forecast.mean_output_tokens += difference * _FOLLOW
        if load.prefill_ns_per_token or load.decode_base_us:  # not of engines without delays
            is_first_prefill = load.prefill_ns_per_token > 0 and not before.prefill_ns_per_token
            is_first_decode = load.decode_base_us > 0 and not before.decode_base_us
            is_first = is_first_prefill or is_first_decode
            self._kinds[worker.kind].measured(worker, is_first, self.forecast, now_s)
        if report.evicted:
            self._take_evictions(worker, report.evicted)
        self._index.stored(incarnation, report.stored)
        if not load.num_blocks or self._index.num_blocks(incarnation) <= _MOST_HELD * load.num_blocks:
            return True
        self._index.forget(incarnation)
        return False

    def _count_blocks(self) -> None:
        pools = [worker.load.num_blocks for worker in self._workers.values() if worker.load.num_blocks]
        self._num_blocks, self._smallest_pool = sum(pools), min(pools, default=0)
        self._regret.capacity = max(2, min(self._num_blocks, _MOST_REMEMBERED))

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

    def num_in_flight(self, now_s: float) -> int:
        """Requests that count on a worker which has not reported them yet."""
        self._in_flight.expire(now_s)
        return len(self._in_flight.reservations)

    def num_in_flight_tokens(self) -> int:
        """Of the workers, by their own books: 0 where nothing is reserved."""
        return sum(worker.in_flight_tokens for worker in self._workers.values())

    def held_by(self, incarnation: str) -> set[int]:
        """Hashes of the blocks that a worker is known to hold. Walks the whole index: for checks, not for routing."""
        return self._index.held_by(incarnation)

    # --- what is asked

    def choose(self, policy: str, question: Question, now_s: float) -> Answer:
        """Rank the workers and reserve the request's load on the best.

        KeyError for an unknown policy, or a worker that is not followed.
        """
        if now_s >= self._in_flight.due_s:
            self._in_flight.expire(now_s)
        prompt, forecast, worker_of = question.prompt, self.forecast, self._workers.__getitem__
        incarnations, prefill_incarnations = self._with_room(question)
        prefill: list[Candidate] = []
        if prefill_incarnations:
            prefill = rank_prefill(
                prompt,
                list(map(worker_of, prefill_incarnations)),
                self._index.overlaps(prompt.hashes, prefill_incarnations),
                forecast=forecast,
                now_s=now_s,
                limit=MAX_CANDIDATES,
            )
        overlaps = self._index.overlaps(prompt.hashes, incarnations)
        decode = rank(
            policy,
            prompt,
            list(map(worker_of, incarnations)),
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
        num_held = max(overlaps)
        if num_held < len(prompt.hashes):
            self._regret.asked(prompt.hashes, num_held)
        return Answer(decode, prefill, self._reserve(question, decode[0], prefill, now_s))

    def _with_room(self, question: Question) -> tuple[Sequence[str], Sequence[str]]:
        """Decode and prefill workers whose pool holds the prompt, or which have not said yet how much it holds."""
        prompt, worker_of = question.prompt, self._workers.__getitem__
        num_blocks = -(-prompt.num_tokens // prompt.block_size)
        if num_blocks <= self._smallest_pool or not self._smallest_pool:  # of nearly all prompts
            return question.decode, question.prefill

        def have_room(incarnations: Sequence[str]) -> list[str]:
            pools = [(incarnation, worker_of(incarnation).load.num_blocks) for incarnation in incarnations]
            return [incarnation for incarnation, pool in pools if not pool or pool >= num_blocks]

        # a prompt that fits nowhere goes to a worker all the same: the worker's refusal says what is too small
        return have_room(question.decode) or question.decode, have_room(question.prefill)

    def _reserve(
        self, question: Question, chosen: Candidate, prefill: list[Candidate], now_s: float
    ) -> InFlightReservation:
        prompt, forecast = question.prompt, self.forecast
        uncached = max(1, prompt.num_tokens - chosen.overlap_blocks * prompt.block_size)
        follow = max(_FOLLOW, 1 / (self._num_choices + 1))
        forecast.mean_uncached_tokens += (uncached - forecast.mean_uncached_tokens) * follow
        num_blocks = -(-prompt.num_tokens // prompt.block_size)
        shares: tuple[Share, ...] = (Share(chosen.incarnation, uncached, num_blocks),)
        # a decode worker that waits as long as the best prefill worker takes is assumed to hand over: the
        # prompt waits in no queue of its own, and another worker computes it
        if prefill and chosen.wait_ms == prefill[0].cost_ms:
            for other in prefill:
                if other.incarnation != chosen.incarnation:
                    remaining = max(1, prompt.num_tokens - other.overlap_blocks * prompt.block_size)
                    decode_share = Share(chosen.incarnation, 1, num_blocks)
                    shares = decode_share, Share(other.incarnation, remaining, num_blocks)
                    break
        for share in shares:
            worker = self._workers[share.incarnation]
            figures = share.num_tokens, now_s, share.num_blocks
            self._in_flight.reserve(worker, question.request_id, *figures)
        reservation = InFlightReservation(question.request_id, shares, question.session)
        self._note_choice(reservation)
        return reservation

    def _note_choice(self, reservation: InFlightReservation) -> None:
        """Turns and sessions, of this router's choices and of the others'."""
        self._num_choices += 1
        shares, session = reservation.shares, reservation.session
        decode = self._workers.get(shares[0].incarnation)
        if decode is not None:
            decode.last_chosen = self._num_choices
            self._kinds[decode.kind].num_choices += 1
        if len(shares) > 1 and (prefill := self._workers.get(shares[1].incarnation)) is not None:
            prefill.last_prefilled = self._num_choices
        if session:
            self._sessions.pop(session, None)
            self._sessions[session] = shares[0].incarnation
            if len(self._sessions) > MAX_SESSIONS:
                del self._sessions[next(iter(self._sessions))]

    # --- what other routers say

    def hear(self, reservation: InFlightReservation, now_s: float) -> None:
        """Count what another router has sent. Workers that are not followed here are passed over."""
        for share in reservation.shares:
            worker = self._workers.get(share.incarnation)
            if worker is not None:
                figures = share.num_tokens, now_s, share.num_blocks
                self._in_flight.hear(worker, reservation.request_id, *figures)
        self._note_choice(reservation)

    def release(self, incarnation: str, request_id: str) -> None:
        """The request went elsewhere. Harmless when nothing is reserved."""
        self._in_flight.release(incarnation, request_id)
