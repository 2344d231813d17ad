"""The policies: how workers are ranked. What `kv` ranks by stands in :mod:`meshserve.routing.cost`.

`power-of-two` draws two workers and takes the one with fewer sequences: nearly as even as looking at all, where what one knows of
the load is old (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).
"""

import random
from collections.abc import Callable, Sequence

from meshserve.routing.candidates import Candidate, Prompt, Worker
from meshserve.routing.cost import Estimate, Outlook, estimate_all, estimate_prefill

Ranking = list[tuple[Estimate, str]]


def _load_of(estimate: Estimate) -> tuple[int, int]:
    return estimate.worker.num_sequences, estimate.worker.last_chosen


def _by_kv(estimates: list[Estimate], outlook: Outlook, home: str | None, rng: random.Random) -> Ranking:
    ranked = sorted(estimates, key=lambda estimate: estimate.cost_ms)
    limit_ms = ranked[0].cost_ms + outlook.settings.tie_ms
    num_tied = next((rank for rank, estimate in enumerate(ranked) if estimate.cost_ms > limit_ms), len(ranked))
    tied = sorted(ranked[:num_tied], key=lambda estimate: (estimate.worker.incarnation != home, *_load_of(estimate)))
    best, deepest = tied[0], max(estimate.overlap_blocks for estimate in estimates)
    if num_tied > 1:
        why = "as good as any, and the session was there" if best.worker.incarnation == home else "as good as any, and its turn"
    elif not best.overlap_blocks:
        why = "would answer first" if not deepest else f"computing anew costs less than waiting for {deepest} blocks"
    elif best.overlap_blocks == deepest:
        why = f"holds {deepest} blocks of this prompt"
    else:
        why = f"holds {best.overlap_blocks} of {deepest} blocks, with less to wait for"
    return [
        (best, why),
        *((estimate, "about as good") for estimate in tied[1:]),
        *((estimate, "would cost more") for estimate in ranked[num_tied:]),
    ]


def _by_load(estimates: list[Estimate], outlook: Outlook, home: str | None, rng: random.Random) -> Ranking:
    ranked = sorted(estimates, key=_load_of)
    return [(estimate, "fewest sequences" if rank == 0 else "more sequences, or chosen later") for rank, estimate in enumerate(ranked)]


def _by_two_choices(estimates: list[Estimate], outlook: Outlook, home: str | None, rng: random.Random) -> Ranking:
    drawn = rng.sample(estimates, min(2, len(estimates)))
    rest = [estimate for estimate in estimates if estimate not in drawn]
    ranked = sorted(drawn, key=_load_of) + sorted(rest, key=_load_of)
    return [
        (estimate, ("fewer sequences of two drawn", "the other of two")[rank] if rank < 2 else "not drawn")
        for rank, estimate in enumerate(ranked)
    ]


def _by_turn(estimates: list[Estimate], outlook: Outlook, home: str | None, rng: random.Random) -> Ranking:
    ranked = sorted(estimates, key=lambda estimate: (estimate.worker.last_chosen, estimate.worker.incarnation))
    return [(estimate, "its turn" if rank == 0 else "later turn") for rank, estimate in enumerate(ranked)]


def _by_chance(estimates: list[Estimate], outlook: Outlook, home: str | None, rng: random.Random) -> Ranking:
    return [(estimate, "by chance") for estimate in rng.sample(estimates, len(estimates))]


POLICIES: dict[str, Callable[[list[Estimate], Outlook, str | None, random.Random], Ranking]] = {
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

    `home` is the incarnation of the worker that served the session last, a hint; `remote_ms` is when a prefill worker could be done.
    """
    order = POLICIES[policy]
    if not workers:
        return []
    outlook = outlook or Outlook()
    ranked = order(estimate_all(prompt, workers, overlaps, outlook, now_s, remote_ms), outlook, home, rng)
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
    estimates.sort(key=lambda estimate: (estimate.cost_ms, *_load_of(estimate)))
    return [_candidate(found, found.worker.load.num_tickets, "prefill") for found in estimates[:limit]]


def _candidate(found: Estimate, load: int, why: str) -> Candidate:
    worker = found.worker
    return Candidate(worker.incarnation, worker.name, found.overlap_blocks, load, found.wait_ms, found.cost_ms, why)
