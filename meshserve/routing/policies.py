"""The policies, which rank workers; the cost by which the policy `kv` does so; and the rule by which a prompt is handed over.

`power-of-two` draws two workers and takes the one with fewer sequences: nearly as even as looking at all, where what one knows of
the load is old (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).

`kv` ranks by what it costs to send a request to a worker, in milliseconds:

    cost = wait + step + prefill + w * prefill * n                    time to the first token, and how long it holds up streams
         + w * L * b * (used + n * B)                                 decoding slowly where memory is full, and slowing others
         + regret * turnover * evicted * block_ms                     computing again what this placement pushes out

wait       until the prompts queued and in flight to the worker are computed, less what has passed since it said so; with sequences
           running at least half a step. Mooncake's scheduler estimates the same queueing time (Qin et al., FAST 2025, section 6.1).
step       one decode step, if sequences run there: the first token shares its step with them.
prefill    base + (prompt - overlap) * ms per token: the prompt's tokens that are not in the worker's cache. Cached tokens against
           queued work is the cost of Dynamo's KV router and of Mooncake; both count them in blocks, we in measured time, so that
           workers of unequal speed compare. Where there are prefill workers and the worker is going to hand the prompt over, by its own
           rule (:func:`decide_handoff`): until the best of them is done, the handoff of what is missing, and the prompt's last
           token, which is always computed here.
n          sequences there. While the new prompt is computed none of them gets a token (Agrawal et al., Sarathi-Serve, OSDI 2024):
           Preble (Srivatsa et al., 2024, section 3.2) adds the same delay to its load cost.
L, b, B    expected output (the mean of what workers finished; nobody knows it beforehand), milliseconds that one more block held
           adds to a decode step, and the blocks that this request will hold. The new sequence is slowed by the blocks `used`
           there, and slows the n others by its own. Dynamo counts active decode blocks with a fixed weight; this is their time.
w          what a millisecond of a stream's delay counts against one of waiting for the first token.
evicted    blocks that must go from the worker's cache to make room: blocks needed less overlap less free ones.
regret     share of evicted blocks that were asked for again within one more lifetime of the cache, measured with a ghost list as
           ARC keeps one (Megiddo and Modha, FAST 2003). Preble's eviction cost has the hit rate in this place. It falls to 0 where
           nothing is shared, so that only load counts there.
turnover   how fast the worker's cache turns over, relative to the others': by Little's law the inverse of how long a block lives.
           Sending what is new to where blocks live longest makes the many caches age alike, as one pooled LRU cache would.

A prefix is replicated as soon as waiting for it, and what that delays, costs more than computing it again
and what that evicts; or, where many wait a little each, once all their waiting has cost as much
(:class:`~meshserve.routing.demand.Replication`). Workers within `tie_ms` of the cheapest count as equal:
the choice goes to the session's last worker, then to one that holds clearly more of the prompt (its blocks
need not cross the network, whatever that costs), then to the least loaded, then to the one chosen longest
ago.

What was measured and left out stands in bench/README.md.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter

from meshserve.routing.workers import CostBreakdown, LoadForecast, Prompt, Worker
from meshserve.wire.routing import Candidate
from meshserve.wire.structs import MAX_MS

UNMEASURED_LOCAL_TOKENS = 256
"""Uncached prompt tokens up to which a decode worker prefills itself while expected times say nothing."""

ALIKE_MS = 20.0
"""Expected times that differ by less than this decide nothing. Means over other prompts, the operating system and the network are wrong
by as much, and nobody notices it in a first token; so a prompt's length decides as it does before rates are measured, and what is long
leaves this worker's steps to streams that begin meanwhile. Lower follows figures to the last digit; an engine without delays, which has
nothing but such figures, would then hand over at random."""

_WORTH_A_WORD_TOKENS = 256
"""Of equal workers one that holds so much more of a prompt is taken. Lower sends all that begins with the same few words to one worker."""

_PREFILL_ORDER = attrgetter("num_sequences", "last_prefilled")
_LOAD = attrgetter("num_sequences", "last_chosen")

Estimates = tuple[list[float], list[float]]
"""How long each worker keeps one request waiting, and what it costs to send it there: milliseconds, in the workers' order."""

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


HandoffRule = tuple[bool, str]
"""Whether to hand over, and the reason. They are made once, since routers ask for each decode worker of each request."""

_CACHED, _FLOOR, _SHORT, _FASTER_HERE = (False, "cached"), (False, "floor"), (False, "short"), (False, "faster-here")
_LONG, _FASTER_THERE, _STREAMS_RUN_HERE = (True, "long"), (True, "faster-there"), (True, "streams-run-here")
NO_PEER, QUEUE_FULL = (False, "no-peer"), (False, "queue-full")


def decide_handoff(
    num_uncached: int,
    max_local_tokens: int | None,
    local_ms: float | None,
    remote_ms: float | None,
    is_busy: bool,
) -> HandoffRule:
    """Whether a decode worker has a prompt with so many uncached tokens, less its last one, prefilled
    elsewhere. Decode workers decide by it, and routers assume by it what a decode worker is going to decide.

    Expected times to the first token are None where a rate they need is not measured. `max_local_tokens` is
    what a user set: prompts with at most so many uncached tokens are never handed over. `is_busy` says that
    sequences run here: computing the prompt here holds them up, which is worth a first token that comes
    later.
    """
    if num_uncached < 1:
        return _CACHED
    if max_local_tokens is not None and num_uncached <= max_local_tokens:
        return _FLOOR
    if local_ms is None or remote_ms is None or -ALIKE_MS < remote_ms - local_ms < ALIKE_MS:
        return _LONG if max_local_tokens is not None or num_uncached > UNMEASURED_LOCAL_TOKENS else _SHORT
    if remote_ms <= local_ms:
        return _FASTER_THERE
    return _STREAMS_RUN_HERE if is_busy and remote_ms <= 2 * local_ms else _FASTER_HERE


# --- the cost of a worker


def breakdown_of(worker: Worker, forecast: LoadForecast) -> CostBreakdown:
    """Work out the parts of a worker's cost, and keep them in the worker."""
    load, rates, settings = worker.load, worker.rates, forecast.settings
    num_sequences, weight = worker.num_sequences, settings.stream_weight
    base_ms, token_ms = rates.prefill_base_ms, rates.prefill_ms_per_token
    used, queued = load.used_blocks + worker.in_flight_blocks, load.waiting_prefill_tokens
    step_ms = rates.decode_base_ms + rates.decode_ms_per_block * used if num_sequences else 0.0
    slowing_ms = weight * forecast.mean_output_tokens * rates.decode_ms_per_block
    turnover = 1.0
    if forecast.mean_turnover and load.num_blocks:
        turnover = worker.recent_evictions / load.num_blocks / forecast.mean_turnover
        turnover = min(settings.max_turnover, max(1 / settings.max_turnover, turnover))
    burden, fixed_ms = 1 + weight * num_sequences, step_ms + slowing_ms * used
    queued_ms = base_ms + token_ms * queued if queued else 0.0
    in_flight_ms = base_ms + token_ms * worker.in_flight_tokens if worker.in_flight_tokens else 0.0
    free_blocks = load.num_blocks - load.used_blocks - load.cached_blocks - worker.in_flight_blocks
    worker.breakdown = breakdown = (
        # when all its prompts should be computed, queued and in flight; and the least one waits
        worker.reported_at_s * 1000 + queued_ms + in_flight_ms,
        step_ms / 2 + in_flight_ms,
        base_ms * burden + fixed_ms,  # base * (1 + w n) + step + w L b used
        token_ms * burden,  # ms per token * (1 + w n)
        rates.handoff_ms_per_token,
        slowing_ms * num_sequences,  # w L b n: per block that the request will hold
        max(0, free_blocks),
        settings.regret_weight * forecast.regret * turnover * token_ms,
    )
    return breakdown


def estimate_all(
    prompt: Prompt,
    workers: Sequence[Worker],
    overlaps: Sequence[int],
    forecast: LoadForecast,
    now_s: float,
    remote_ms: float | None = None,
) -> Estimates:
    """Apply the formula to every worker. `remote_ms` is when the best prefill worker could have computed
    the prompt, if there is one.
    """
    num_tokens, size, now_ms = prompt.num_tokens, prompt.block_size, now_s * 1000
    num_blocks = int(num_tokens + forecast.mean_output_tokens) // size + 1
    waits_ms, costs_ms = [], []
    for worker, overlap in zip(workers, overlaps, strict=True):
        parts = worker.breakdown or breakdown_of(worker, forecast)
        ready_at_ms, wait_ms, fixed_ms, token_ms, handed_ms, held_ms, free_blocks, evicted_ms = parts
        # comparisons instead of `max`: half of this loop's time was those calls
        if wait_ms < ready_at_ms - now_ms:
            wait_ms = ready_at_ms - now_ms
        uncached = num_tokens - overlap * size
        cost_ms = fixed_ms + held_ms * num_blocks
        if remote_ms is not None and _assumes_handoff(worker, uncached, wait_ms, remote_ms, forecast):
            wait_ms = remote_ms
            cost_ms += remote_ms + handed_ms * uncached + token_ms
        else:
            cost_ms += wait_ms + token_ms * (uncached if uncached > 0 else 1)
        evicted = num_blocks - overlap - free_blocks
        if evicted > 0:
            cost_ms += evicted_ms * size * evicted
        waits_ms.append(wait_ms)
        costs_ms.append(cost_ms)
    return waits_ms, costs_ms


def _assumes_handoff(
    worker: Worker, uncached: int, wait_ms: float, remote_ms: float, forecast: LoadForecast
) -> bool:
    """Whether this decode worker is going to hand over a prompt of which so many tokens are not there: the
    worker's own rule, by what routers know. `wait_ms` is what the prompt waits for at the decode worker.
    """
    load, local_ms = worker.load, None
    if load.prefill_ns_per_token:
        local_ms = wait_ms + load.prefill_base_us / 1e3 + load.prefill_ns_per_token / 1e6 * uncached
    there_ms = remote_ms + load.handoff_ns_per_token / 1e6 * uncached
    floor = forecast.settings.max_local_prefill_tokens
    return decide_handoff(uncached - 1, floor, local_ms, there_ms, load.num_running > 0)[0]


# --- policies


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
    if held and held > min(overlaps):  # a prefix of which some workers lack blocks: a copy may be worth it
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
    """Prefill workers, best first: when each could be done with this prompt, and what that would push out
    of its cache. Tickets that no worker has claimed yet are each taken to be as long as is usual.
    """
    forecast = forecast or LoadForecast()
    waits_ms, costs_ms = estimate_all(prompt, workers, overlaps, forecast, now_s)
    for place, worker in enumerate(workers):
        num_unclaimed = worker.load.num_tickets - worker.load.num_running - worker.load.num_waiting
        if num_unclaimed > 0:
            tickets_ms = num_unclaimed * worker.rates.prefill_ms(round(forecast.mean_uncached_tokens))
            waits_ms[place] += tickets_ms
            costs_ms[place] += tickets_ms
    ranked = sorted(zip(costs_ms, map(_PREFILL_ORDER, workers), range(len(workers)), strict=True))
    reasons = chain(("could be done first",), repeat("could be done later"))
    found = []
    for (cost_ms, _, place), why in zip(ranked[:limit], reasons, strict=False):
        worker, overlap, load = workers[place], overlaps[place], workers[place].load
        ready_ms = 0.0
        if load.prefill_ns_per_token:  # what this very worker measured, never what others did
            num_tokens = max(1, prompt.num_tokens - overlap * prompt.block_size)
            compute_ms = load.prefill_base_us / 1e3 + load.prefill_ns_per_token / 1e6 * num_tokens
            ready_ms = min(waits_ms[place] + compute_ms, MAX_MS)
        label = worker.incarnation, worker.name, overlap, load.num_tickets
        found.append(Candidate(*label, waits_ms[place], cost_ms, why, ready_ms))
    return found
