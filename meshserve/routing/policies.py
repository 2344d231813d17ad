"""The policies: how workers are ranked. What `kv` ranks by stands in :mod:`meshserve.routing.cost`.

`power-of-two` draws two workers and takes the one with fewer sequences: nearly as even as looking at all, where what one knows of
the load is old (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshserve.routing.candidates import Candidate, Prompt, Worker
from meshserve.routing.cost import Estimate, Outlook, estimate_all, estimate_prefill

_WORTH_A_WORD_TOKENS = 256
"""Of equal workers one that holds so much more of a prompt is taken. Lower sends all that begins with the same few words to one worker."""

Ranking = list[tuple[Estimate, str]]


@dataclass(frozen=True, slots=True)
class Situation:
    """What a policy may look at beside the workers."""

    prompt: Prompt
    outlook: Outlook
    rng: random.Random
    now_s: float = 0.0
    remote_ms: float | None = None
    """When the best prefill worker could have computed the prompt, if there is one."""
    home: str | None = None
    """Incarnation of the worker that served the session last, a hint."""

    def estimates(self, workers: Sequence[Worker], overlaps: Sequence[int]) -> list[Estimate]:
        """The cost formula for workers that hold so many blocks of the prompt."""
        return estimate_all(self.prompt, workers, overlaps, self.outlook, self.now_s, self.remote_ms)


def _load_of(estimate: Estimate) -> tuple[int, int]:
    return estimate.worker.num_sequences, estimate.worker.last_chosen


def _overlap_of(estimate: Estimate) -> int:
    return estimate.overlap_blocks


def _preference(estimate: Estimate, situation: Situation) -> tuple[int, int, int]:
    """Among equals: who holds more of the prompt, as far as that is worth a word, then load and turns."""
    return (-(estimate.overlap_blocks * situation.prompt.block_size // _WORTH_A_WORD_TOKENS), *_load_of(estimate))


def _by_kv(estimates: list[Estimate], situation: Situation) -> Ranking:
    home = situation.home
    ranked = sorted(estimates, key=lambda estimate: estimate.cost_ms)
    limit_ms = ranked[0].cost_ms + situation.outlook.settings.tie_ms
    num_tied = next((rank for rank, estimate in enumerate(ranked) if estimate.cost_ms > limit_ms), len(ranked))
    tied = sorted(ranked[:num_tied], key=lambda estimate: (estimate.worker.incarnation != home, *_preference(estimate, situation)))
    best, deepest = tied[0], max(estimate.overlap_blocks for estimate in estimates)
    found = [
        (best, _why(best, tied, deepest, situation)),
        *((estimate, "about as good") for estimate in tied[1:]),
        *((estimate, "would cost more") for estimate in ranked[num_tied:]),
    ]
    second_home = _second_home(best, ranked, situation)
    if second_home is not None:
        why = f"takes a copy of {best.overlap_blocks} blocks that are in demand"
        return [(second_home, why), *(entry for entry in found if entry[0] is not second_home)]
    return found


def _why(best: Estimate, tied: Sequence[Estimate], deepest: int, situation: Situation) -> str:
    if len(tied) > 1:
        if best.worker.incarnation == situation.home:
            return "as good as any, and the session was there"
        most, least = (_preference(found, situation)[0] for found in (max(tied, key=_overlap_of), min(tied, key=_overlap_of)))
        if most == least:
            return "as good as any, and its turn"
        return f"as good as any, and holds {best.overlap_blocks} blocks of this prompt"
    if not best.overlap_blocks:
        return "would answer first" if not deepest else f"computing anew costs less than waiting for {deepest} blocks"
    if best.overlap_blocks == deepest:
        return f"holds {deepest} blocks of this prompt"
    return f"holds {best.overlap_blocks} of {deepest} blocks, with less to wait for"


def _second_home(best: Estimate, ranked: Sequence[Estimate], situation: Situation) -> Estimate | None:
    """The cheapest worker that does not hold what the best one holds, if it is time that it does."""
    if not best.overlap_blocks:
        return None
    other = next((estimate for estimate in ranked if estimate.overlap_blocks < best.overlap_blocks), None)
    if other is None:
        return None
    if_held = situation.estimates([other.worker], [best.overlap_blocks])[0]
    prefix = situation.prompt.hashes[best.overlap_blocks - 1]
    is_due = situation.outlook.replication.is_due(prefix, best.cost_ms - if_held.cost_ms, other.cost_ms - best.cost_ms)
    return other if is_due else None


def _by_load(estimates: list[Estimate], situation: Situation) -> Ranking:
    ranked = sorted(estimates, key=_load_of)
    return [(estimate, "fewest sequences" if rank == 0 else "more sequences, or chosen later") for rank, estimate in enumerate(ranked)]


def _by_two_choices(estimates: list[Estimate], situation: Situation) -> Ranking:
    drawn = situation.rng.sample(estimates, min(2, len(estimates)))
    rest = [estimate for estimate in estimates if estimate not in drawn]
    ranked = sorted(drawn, key=_load_of) + sorted(rest, key=_load_of)
    return [
        (estimate, ("fewer sequences of two drawn", "the other of two")[rank] if rank < 2 else "not drawn")
        for rank, estimate in enumerate(ranked)
    ]


def _by_turn(estimates: list[Estimate], situation: Situation) -> Ranking:
    ranked = sorted(estimates, key=lambda estimate: (estimate.worker.last_chosen, estimate.worker.incarnation))
    return [(estimate, "its turn" if rank == 0 else "later turn") for rank, estimate in enumerate(ranked)]


def _by_chance(estimates: list[Estimate], situation: Situation) -> Ranking:
    return [(estimate, "by chance") for estimate in situation.rng.sample(estimates, len(estimates))]


POLICIES: dict[str, Callable[[list[Estimate], Situation], Ranking]] = {
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
    situation = Situation(prompt, outlook or Outlook(), rng, now_s, remote_ms, home)
    ranked = order(situation.estimates(workers, overlaps), situation)
    return [_candidate(found, found.worker.num_sequences, why) for found, why in ranked[:limit]]


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
    estimates = estimate_prefill(prompt, workers, overlaps, outlook or Outlook(), now_s)
    estimates.sort(key=lambda estimate: (estimate.cost_ms, estimate.worker.num_sequences, estimate.worker.last_prefilled))
    reasons = ("could be done first", "could be done later")
    return [_candidate(found, found.worker.load.num_tickets, reasons[rank > 0]) for rank, found in enumerate(estimates[:limit])]


def _candidate(found: Estimate, load: int, why: str) -> Candidate:
    worker = found.worker
    return Candidate(worker.incarnation, worker.name, found.overlap_blocks, load, found.wait_ms, found.cost_ms, why)
