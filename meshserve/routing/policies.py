"""The policies: how workers are ranked. What `kv` ranks by stands in :mod:`meshserve.routing.cost`.

`power-of-two` draws two workers and takes the one with fewer sequences: nearly as even as looking at all, where what one knows of
the load is old (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter

from meshserve.routing.candidates import Prompt, Worker
from meshserve.routing.cost import LoadForecast, estimate_all, estimate_prefill
from meshserve.wire.routing import Candidate
from meshserve.wire.structs import MAX_MS

_WORTH_A_WORD_TOKENS = 256
"""Of equal workers one that holds so much more of a prompt is taken. Lower sends all that begins with the same few words to one worker."""

_LOAD = attrgetter("num_sequences", "last_chosen")

Ranking = tuple[Sequence[int], Sequence[str]]
"""Indexes of the workers of a :class:`RoutingContext`, best first, and the reasons for the first ones; the last reason goes for all that
follow."""


@dataclass(slots=True)
class RoutingContext:
    """What a policy may look at: workers, how many blocks of the prompt each holds, and the cost formula's figures for each."""

    prompt: Prompt
    workers: Sequence[Worker]
    overlaps: Sequence[int]
    waits_ms: Sequence[float]
    costs_ms: Sequence[float]
    forecast: LoadForecast
    rng: random.Random
    now_s: float
    remote_ms: float | None
    """When the best prefill worker could have computed the prompt, if there is one."""
    home: str | None
    """Incarnation of the worker that served the session last, a hint."""

    def load_of(self, place: int) -> tuple[int, int]:
        """Of two workers, the one with less comes first; else the one that was chosen longer ago."""
        load: tuple[int, int] = _LOAD(self.workers[place])
        return load


def _by_kv(context: RoutingContext) -> Ranking:
    costs_ms, overlaps = context.costs_ms, context.overlaps
    by_cost = sorted(range(len(costs_ms)), key=costs_ms.__getitem__)
    num_tied = bisect_right(by_cost, costs_ms[by_cost[0]] + context.forecast.settings.tie_ms, key=costs_ms.__getitem__)
    deepest = max(overlaps)
    if num_tied > 1:
        ranked, why = _by_preference(by_cost[:num_tied], deepest, context)
        reasons = [why, *["about as good"] * (num_tied - 1), "would cost more"]
        ranked += by_cost[num_tied:]
    else:
        ranked, reasons = by_cost, [_why_alone(overlaps[by_cost[0]], deepest), "would cost more"]
    held = overlaps[ranked[0]]
    if held and held > min(overlaps):
        other = next(place for place in by_cost if overlaps[place] < held)
        if _is_copy_due(ranked[0], other, context):
            place = ranked.index(other)
            del ranked[place], reasons[min(place, num_tied)]
            return [other, *ranked], [f"takes a copy of {held} blocks that are in demand", *reasons, "would cost more"]
    return ranked, reasons


def _by_preference(tied: list[int], deepest: int, context: RoutingContext) -> tuple[list[int], str]:
    """Among equals: the session's last worker, who holds more of the prompt, as far as that is worth a word, then load and turns."""
    workers, overlaps, size, home = context.workers, context.overlaps, context.prompt.block_size, context.home
    loads = dict(zip(tied, map(_LOAD, map(workers.__getitem__, tied)), strict=True))
    tied.sort(key=loads.__getitem__)
    why = "as good as any, and its turn"
    if deepest * size >= _WORTH_A_WORD_TOKENS:
        words = {place: -(overlaps[place] * size // _WORTH_A_WORD_TOKENS) for place in tied}
        tied.sort(key=words.__getitem__)
        if words[tied[0]] != words[tied[-1]]:
            why = f"as good as any, and holds {overlaps[tied[0]]} blocks of this prompt"
    if home is not None:
        at_home = [place for place in tied if workers[place].incarnation == home]
        if at_home:
            return at_home + [place for place in tied if place not in at_home], "as good as any, and the session was there"
    return tied, why


def _why_alone(held: int, deepest: int) -> str:
    if not held:
        return "would answer first" if not deepest else f"computing anew costs less than waiting for {deepest} blocks"
    if held == deepest:
        return f"holds {deepest} blocks of this prompt"
    return f"holds {held} of {deepest} blocks, with less to wait for"


def _is_copy_due(best: int, other: int, context: RoutingContext) -> bool:
    """Whether it is time that the cheapest worker that does not hold what the best one holds does so too."""
    prompt, forecast, costs_ms, held = context.prompt, context.forecast, context.costs_ms, context.overlaps[best]
    if_held_ms = estimate_all(prompt, [context.workers[other]], [held], forecast, context.now_s, context.remote_ms)[1][0]
    prefix = prompt.hashes[held - 1]
    return forecast.replication.is_due(prefix, costs_ms[best] - if_held_ms, costs_ms[other] - costs_ms[best])


def _by_load(context: RoutingContext) -> Ranking:
    return sorted(range(len(context.workers)), key=context.load_of), ("fewest sequences", "more sequences, or chosen later")


def _by_two_choices(context: RoutingContext) -> Ranking:
    places = range(len(context.workers))
    drawn = context.rng.sample(places, min(2, len(places)))
    rest = [place for place in places if place not in drawn]
    ranked = sorted(drawn, key=context.load_of) + sorted(rest, key=context.load_of)
    return ranked, ("fewer sequences of two drawn", "the other of two", "not drawn")


def _by_turn(context: RoutingContext) -> Ranking:
    workers = context.workers
    ranked = sorted(range(len(workers)), key=lambda place: (workers[place].last_chosen, workers[place].incarnation))
    return ranked, ("its turn", "later turn")


def _by_chance(context: RoutingContext) -> Ranking:
    places = range(len(context.workers))
    return context.rng.sample(places, len(places)), ("by chance",)


POLICIES: dict[str, Callable[[RoutingContext], Ranking]] = {
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
    forecast: LoadForecast | None = None,
    now_s: float = 0.0,
    remote_ms: float | None = None,
    home: str | None = None,
    limit: int | None = None,
) -> list[Candidate]:
    """The best `limit` of the workers, or all, each with its figures and the reason for its place. KeyError for an unknown policy.

    `home` and `remote_ms` are those of :class:`RoutingContext`.
    """
    order = POLICIES[policy]
    if not workers:
        return []
    forecast = forecast or LoadForecast()
    waits_ms, costs_ms = estimate_all(prompt, workers, overlaps, forecast, now_s, remote_ms)
    ranked, reasons = order(RoutingContext(prompt, workers, overlaps, waits_ms, costs_ms, forecast, rng, now_s, remote_ms, home))
    found = []
    for place, why in zip(ranked[:limit], chain(reasons, repeat(reasons[-1])), strict=False):
        worker = workers[place]
        load = worker.num_sequences
        found.append(Candidate(worker.incarnation, worker.name, overlaps[place], load, waits_ms[place], costs_ms[place], why))
    return found


def rank_prefill(
    prompt: Prompt,
    workers: Sequence[Worker],
    overlaps: Sequence[int],
    *,
    forecast: LoadForecast | None = None,
    now_s: float = 0.0,
    limit: int | None = None,
) -> list[Candidate]:
    """Prefill workers, best first: when each could be done with this prompt, and what that would push out of its cache."""
    waits_ms, costs_ms = estimate_prefill(prompt, workers, overlaps, forecast or LoadForecast(), now_s)
    ranked = sorted(zip(costs_ms, workers, overlaps, waits_ms, strict=True), key=_prefill_order)
    reasons = chain(("could be done first",), repeat("could be done later"))
    found = []
    for (cost_ms, worker, overlap, wait_ms), why in zip(ranked[:limit], reasons, strict=False):
        compute_ms = worker.measured_prefill_ms(max(1, prompt.num_tokens - overlap * prompt.block_size))
        ready_ms = 0.0 if compute_ms is None else min(wait_ms + compute_ms, MAX_MS)
        found.append(Candidate(worker.incarnation, worker.name, overlap, worker.load.num_tickets, wait_ms, cost_ms, why, ready_ms))
    return found


def _prefill_order(found: tuple[float, Worker, int, float]) -> tuple[float, int, int]:
    return found[0], found[1].num_sequences, found[1].last_prefilled
