"""The policies: how workers are ranked. What `kv` ranks by stands in :mod:`meshserve.routing.cost`.

`power-of-two` draws two workers and takes the one with fewer sequences: nearly as even as looking at all, where what one knows of
the load is old (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from meshserve.routing.candidates import Candidate, Prompt, Worker
from meshserve.routing.cost import Outlook, estimate_all, estimate_prefill

_WORTH_A_WORD_TOKENS = 256
"""Of equal workers one that holds so much more of a prompt is taken. Lower sends all that begins with the same few words to one worker."""

Ranking = tuple[Sequence[int], Sequence[str]]
"""The workers' places in a :class:`Situation`, best first, and the reasons for the first of them; the last one goes for all that follow."""


@dataclass(slots=True)
class Situation:
    """What a policy may look at: workers, how many blocks of the prompt each holds, and the cost formula's figures for each."""

    prompt: Prompt
    workers: Sequence[Worker]
    overlaps: Sequence[int]
    waits_ms: Sequence[float]
    costs_ms: Sequence[float]
    outlook: Outlook
    rng: random.Random
    now_s: float
    remote_ms: float | None
    """When the best prefill worker could have computed the prompt, if there is one."""
    home: str | None
    """Incarnation of the worker that served the session last, a hint."""

    def load_of(self, place: int) -> tuple[int, int]:
        """Of two workers, the one with less comes first."""
        worker = self.workers[place]
        return worker.num_sequences, worker.last_chosen

    def preference(self, place: int) -> tuple[bool, int, int, int]:
        """Among equals: the session's last worker, who holds more of the prompt, as far as that is worth a word, then load and turns."""
        worker = self.workers[place]
        return worker.incarnation != self.home, -self.words(self.overlaps[place]), worker.num_sequences, worker.last_chosen

    def words(self, overlap_blocks: int) -> int:
        """What so much of the prompt is worth among equals."""
        return overlap_blocks * self.prompt.block_size // _WORTH_A_WORD_TOKENS


def _by_kv(situation: Situation) -> Ranking:
    costs_ms = situation.costs_ms
    cost_of = costs_ms.__getitem__
    ranked = sorted(range(len(costs_ms)), key=cost_of)
    num_tied = bisect_right(ranked, costs_ms[ranked[0]] + situation.outlook.settings.tie_ms, key=cost_of)
    tied = sorted(ranked[:num_tied], key=situation.preference) if num_tied > 1 else ranked[:1]
    best = tied[0]
    found, reasons = tied + ranked[num_tied:], [_why(best, tied, situation), *["about as good"] * (num_tied - 1), "would cost more"]
    second_home = _second_home(best, ranked, situation)
    if second_home is not None:
        place = found.index(second_home)
        found.insert(0, found.pop(place))
        if place < num_tied:
            del reasons[place]
        reasons.insert(0, f"takes a copy of {situation.overlaps[best]} blocks that are in demand")
    return found, reasons


def _why(best: int, tied: Sequence[int], situation: Situation) -> str:
    overlaps = situation.overlaps
    held = overlaps[best]
    if len(tied) > 1:
        if situation.workers[best].incarnation == situation.home:
            return "as good as any, and the session was there"
        if len({situation.words(overlaps[place]) for place in tied}) == 1:
            return "as good as any, and its turn"
        return f"as good as any, and holds {held} blocks of this prompt"
    deepest = max(overlaps)
    if not held:
        return "would answer first" if not deepest else f"computing anew costs less than waiting for {deepest} blocks"
    if held == deepest:
        return f"holds {deepest} blocks of this prompt"
    return f"holds {held} of {deepest} blocks, with less to wait for"


def _second_home(best: int, ranked: Sequence[int], situation: Situation) -> int | None:
    """The cheapest worker that does not hold what the best one holds, if it is time that it does."""
    overlaps, costs_ms, prompt, outlook = situation.overlaps, situation.costs_ms, situation.prompt, situation.outlook
    held = overlaps[best]
    if held <= min(overlaps):
        return None
    other = next(place for place in ranked if overlaps[place] < held)
    if_held_ms = estimate_all(prompt, [situation.workers[other]], [held], outlook, situation.now_s, situation.remote_ms)[1][0]
    prefix = prompt.hashes[held - 1]
    is_due = outlook.replication.is_due(prefix, costs_ms[best] - if_held_ms, costs_ms[other] - costs_ms[best])
    return other if is_due else None


def _by_load(situation: Situation) -> Ranking:
    return sorted(range(len(situation.workers)), key=situation.load_of), ("fewest sequences", "more sequences, or chosen later")


def _by_two_choices(situation: Situation) -> Ranking:
    places = range(len(situation.workers))
    drawn = situation.rng.sample(places, min(2, len(places)))
    rest = [place for place in places if place not in drawn]
    ranked = sorted(drawn, key=situation.load_of) + sorted(rest, key=situation.load_of)
    return ranked, ("fewer sequences of two drawn", "the other of two", "not drawn")


def _by_turn(situation: Situation) -> Ranking:
    workers = situation.workers
    ranked = sorted(range(len(workers)), key=lambda place: (workers[place].last_chosen, workers[place].incarnation))
    return ranked, ("its turn", "later turn")


def _by_chance(situation: Situation) -> Ranking:
    places = range(len(situation.workers))
    return situation.rng.sample(places, len(places)), ("by chance",)


POLICIES: dict[str, Callable[[Situation], Ranking]] = {
    "kv": _by_kv,
    "round-robin": _by_turn,
    "random": _by_chance,
    "least-loaded": _by_load,
    "power-of-two": _by_two_choices,
}


def rank(
    policy: str,
    prompt: Prompt,
    workers: Sequence[Worker],
    overlaps: Sequence[int],
    rng: random.Random,
    *,
    outlook: Outlook | None = None,
    now_s: float = 0.0,
    remote_ms: float | None = None,
    home: str | None = None,
    limit: int | None = None,
) -> list[Candidate]:
    """The best `limit` of the workers, or all, each with its figures and the reason for its place. KeyError for an unknown policy.

    `home` and `remote_ms` are those of :class:`Situation`.
    """
    order = POLICIES[policy]
    if not workers:
        return []
    outlook = outlook or Outlook()
    waits_ms, costs_ms = estimate_all(prompt, workers, overlaps, outlook, now_s, remote_ms)
    ranked, reasons = order(Situation(prompt, workers, overlaps, waits_ms, costs_ms, outlook, rng, now_s, remote_ms, home))
    found = []
    for place, why in zip(ranked[:limit], chain(reasons, repeat(reasons[-1])), strict=False):
        worker = workers[place]
        found.append(
            Candidate(worker.incarnation, worker.name, overlaps[place], worker.num_sequences, waits_ms[place], costs_ms[place], why)
        )
    return found


def rank_prefill(
    prompt: Prompt,
    workers: Sequence[Worker],
    overlaps: Sequence[int],
    *,
    outlook: Outlook | None = None,
    now_s: float = 0.0,
    limit: int | None = None,
) -> list[Candidate]:
    """Prefill workers, best first: when each could be done with this prompt, and what that would push out of its cache."""
    waits_ms, costs_ms = estimate_prefill(prompt, workers, overlaps, outlook or Outlook(), now_s)
    ranked = sorted(zip(costs_ms, workers, overlaps, waits_ms, strict=True), key=_prefill_order)
    reasons = chain(("could be done first",), repeat("could be done later"))
    return [
        Candidate(worker.incarnation, worker.name, overlap, worker.load.num_tickets, wait_ms, cost_ms, why)
        for (cost_ms, worker, overlap, wait_ms), why in zip(ranked[:limit], reasons, strict=False)
    ]


def _prefill_order(found: tuple[float, Worker, int, float]) -> tuple[float, int, int]:
    return found[0], found[1].num_sequences, found[1].last_prefilled
