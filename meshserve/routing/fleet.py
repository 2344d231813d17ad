"""All that a router knows, and what it answers from that. Pure: reports and questions in, rankings out."""

import random
from collections.abc import Sequence

from meshserve.kv.index import PrefixIndex
from meshserve.routing.bookings import Bookings
from meshserve.routing.candidates import Candidate, Worker
from meshserve.routing.policies import Prompt, rank
from meshserve.wire.load import WorkerReport


class Fleet:
    """The workers that a router follows, the prefixes they hold, and what is on its way to them."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._index = PrefixIndex()
        self._workers: dict[str, Worker] = {}
        self._bookings = Bookings()
        self._rng = rng or random.Random()
        self._num_choices = 0

    def join(self, incarnation: str, name: str) -> None:
        """Follow a worker. Harmless when that is done already."""
        self._workers.setdefault(incarnation, Worker(incarnation, name))

    def leave(self, incarnation: str) -> None:
        """The worker is gone, and its blocks with it."""
        self._workers.pop(incarnation, None)
        self._index.forget(incarnation)

    def forget_blocks(self, incarnation: str) -> None:
        """The worker's watch begins anew: what it holds comes with the next reports."""
        self._index.forget(incarnation)

    def report(self, incarnation: str, report: WorkerReport, now_s: float) -> None:
        """A worker says how it is. Reports of workers that nobody follows are ignored."""
        worker = self._workers.get(incarnation)
        if worker is None:
            return
        worker.load = report.load
        self._index.evicted(incarnation, report.evicted)
        self._index.stored(incarnation, report.stored)
        for request_id in report.admitted:
            self._bookings.end(incarnation, request_id)

    def choose(self, policy: str, request_id: str, prompt: Prompt, incarnations: Sequence[str], now_s: float) -> list[Candidate]:
        """Rank these workers, best first, and book the request on the best."""
        self._bookings.expire(now_s)
        workers = [self._workers[incarnation] for incarnation in incarnations]
        ranked = rank(policy, prompt, workers, self._index.overlaps(prompt.hashes, incarnations), self._rng)
        if ranked:
            self._num_choices += 1
            worker = self._workers[ranked[0].incarnation]
            worker.last_chosen = self._num_choices
            uncached = max(1, prompt.num_tokens - ranked[0].overlap_blocks * prompt.block_size)
            self._bookings.book(worker, request_id, uncached, now_s)
        return ranked
