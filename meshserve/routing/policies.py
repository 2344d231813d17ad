"""The policies: how decode workers are ranked, and prefill workers.

`kv` estimates, in milliseconds, when a worker could give the first token: its prompt tokens still to be computed, those of requests
sent there that it has not reported yet, the uncached part of this prompt, and a little for every sequence that shares its steps.
Counting cached tokens against waiting work is the idea of Mooncake's cache-aware scheduling (Qin et al., FAST 2025, section 6) and
of Dynamo's KV router. Estimates closer than one `_TIE_MS` are held for equal, and the worker chosen longest ago is taken: a few
tokens of common prefix must not send everything to one place.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshserve.routing.candidates import Candidate, Worker

_PREFILL_MS_PER_TOKEN = 0.05
"""About 20,000 tokens/s, a mid-size model on one current accelerator; only ratios matter."""

_DECODE_MS_PER_SEQUENCE = 1.0
"""What one more sequence in the batch adds to a step, and so to the waiting of all."""

_TIE_MS = 64 * _PREFILL_MS_PER_TOKEN


@dataclass(frozen=True, slots=True)
class Prompt:
    """What routing needs to know of a request."""

    num_tokens: int
    block_size: int
    hashes: Sequence[int] = ()
    """Of its full blocks."""


@dataclass(frozen=True, slots=True)
class _Estimate:
    worker: Worker
    overlap_blocks: int
    wait_ms: float
    cost_ms: float


def _estimate(prompt: Prompt, worker: Worker, overlap_blocks: int) -> _Estimate:
    wait_ms = (worker.load.waiting_prefill_tokens + worker.booked_tokens) * _PREFILL_MS_PER_TOKEN
    uncached = max(1, prompt.num_tokens - overlap_blocks * prompt.block_size)
    cost_ms = wait_ms + uncached * _PREFILL_MS_PER_TOKEN + worker.num_sequences * _DECODE_MS_PER_SEQUENCE
    return _Estimate(worker, overlap_blocks, wait_ms, cost_ms)


def _by_kv(estimates: list[_Estimate], rng: random.Random) -> list[tuple[_Estimate, str]]:
    cheapest_ms = min(estimate.cost_ms for estimate in estimates)
    tied = [estimate for estimate in estimates if estimate.cost_ms < cheapest_ms + _TIE_MS]
    tied.sort(key=lambda estimate: (estimate.worker.num_sequences, estimate.worker.last_chosen))
    rest = sorted((estimate for estimate in estimates if estimate.cost_ms >= cheapest_ms + _TIE_MS), key=lambda estimate: estimate.cost_ms)
    deepest = max(estimate.overlap_blocks for estimate in estimates)
    if len(tied) > 1:
        why = "as good as any, and its turn"
    elif tied[0].overlap_blocks == deepest > 0:
        why = f"holds {deepest} blocks of this prompt"
    else:
        why = "would answer first"
    return (
        [(tied[0], why)] + [(estimate, "about as good") for estimate in tied[1:]] + [(estimate, "would answer later") for estimate in rest]
    )


def _by_load(estimates: list[_Estimate], rng: random.Random) -> list[tuple[_Estimate, str]]:
    ranked = sorted(estimates, key=lambda estimate: (estimate.worker.num_sequences, estimate.worker.last_chosen))
    return [(estimate, "fewest sequences" if rank == 0 else "more sequences, or chosen later") for rank, estimate in enumerate(ranked)]


def _by_turn(estimates: list[_Estimate], rng: random.Random) -> list[tuple[_Estimate, str]]:
    ranked = sorted(estimates, key=lambda estimate: (estimate.worker.last_chosen, estimate.worker.incarnation))
    return [(estimate, "its turn" if rank == 0 else "later turn") for rank, estimate in enumerate(ranked)]


def _by_chance(estimates: list[_Estimate], rng: random.Random) -> list[tuple[_Estimate, str]]:
    shuffled = rng.sample(estimates, len(estimates))
    return [(estimate, "by chance") for estimate in shuffled]


POLICIES: dict[str, Callable[[list[_Estimate], random.Random], list[tuple[_Estimate, str]]]] = {
    "kv": _by_kv,
    "round-robin": _by_turn,
    "random": _by_chance,
    "least-loaded": _by_load,
}


def rank(policy: str, prompt: Prompt, workers: Sequence[Worker], overlaps: Sequence[int], rng: random.Random) -> list[Candidate]:
    """All workers, best first, each with its figures and the reason for its place. KeyError for an unknown policy."""
    order = POLICIES[policy]
    if not workers:
        return []
    estimates = [_estimate(prompt, worker, overlap) for worker, overlap in zip(workers, overlaps, strict=True)]
    return [
        Candidate(
            found.worker.incarnation, found.worker.name, found.overlap_blocks, found.worker.num_sequences, found.wait_ms, found.cost_ms, why
        )
        for found, why in order(estimates, rng)
    ]


def rank_prefill(prompt: Prompt, workers: Sequence[Worker], overlaps: Sequence[int]) -> list[Candidate]:
    """Prefill workers, best first: when each could be done with this prompt, by what is queued there and what it has cached."""
    estimates = [_estimate(prompt, worker, overlap) for worker, overlap in zip(workers, overlaps, strict=True)]

    def key(found: _Estimate) -> tuple[float, int]:
        return found.cost_ms + (found.worker.load.num_tickets + found.worker.num_booked) * _TIE_MS, found.worker.last_chosen

    return [
        Candidate(
            found.worker.incarnation,
            found.worker.name,
            found.overlap_blocks,
            found.worker.load.num_tickets,
            found.wait_ms,
            found.cost_ms,
            "prefill",
        )
        for found in sorted(estimates, key=key)
    ]
