"""What it costs to send a request to a worker, in milliseconds. The formula of the policy `kv` stands here and nowhere else.

    cost = wait + step + prefill + w * prefill * n                    time to the first token, and how long it holds up streams
         + w * L * b * (used + n * B)                                 decoding slowly where memory is full, and slowing others
         + regret * turnover * evicted * block_ms                     computing again what this placement pushes out

wait       until the prompts queued and booked at the worker are computed, less what has passed since it said so; with sequences
           running at least half a step. Mooncake's scheduler estimates the same queueing time (Qin et al., FAST 2025, section 6.1).
step       one decode step, if sequences run there: the first token shares its step with them.
prefill    base + (prompt - overlap) * ms per token: the prompt's tokens that are not in the worker's cache. Cached tokens against
           queued work is the cost of Dynamo's KV router and of Mooncake; both count them in blocks, we in measured time, so that
           workers of unequal speed compare. Where there are prefill workers and the worker is going to hand the prompt over, by its own
           rule (:mod:`meshserve.routing.handoff`): until the best of them is done, the handoff of what is missing, and the prompt's last
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

A prefix is replicated as soon as waiting for it, and what that delays, costs more than computing it again and what that evicts; or,
where many wait a little each, once all their waiting has cost as much (:mod:`meshserve.routing.replication`). Workers within `tie_ms`
of the cheapest count as equal and the choice goes to the session's last worker, then to one that holds clearly more of the prompt (its
blocks need not cross the network, whatever that costs), then to the least loaded, then to the one chosen longest ago.

What was measured and left out stands in bench/README.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from meshserve.routing.candidates import CostBreakdown, Prompt, Rates, Worker
from meshserve.routing.handoff import decide
from meshserve.routing.replication import Replication


@dataclass(frozen=True, slots=True)
class CostSettings:
    """The parameters of the formula."""

    stream_weight: float = 0.1
    """w, 0 to 1. Higher spreads sequences over workers and decodes faster, lower keeps prefixes together and starts sooner. Below 1,
    since who reads a stream notices a late start and not a late token, and since what spreads sequences also scatters prefixes."""
    regret_weight: float = 1.0
    """Multiplies the measured regret. Higher keeps more in the caches, lower waits less; 0 forgets about evictions."""
    max_turnover: float = 2.0
    """Turnover counts between 1 over this and this: beyond it the estimate says more about chance than about the cache."""
    tie_ms: float = 2.0
    """Milliseconds that nobody notices. Higher follows sessions and load more, lower trusts estimates to the last digit."""
    max_local_prefill_tokens: int | None = None
    """Where there are prefill workers: uncached tokens up to which a decode worker computes a prompt itself, as in HandoffConfig. Workers
    do not report theirs, so routers are given the same. None: as expected times say."""


@dataclass(slots=True)
class LoadForecast:
    """What holds for all workers, measured by the router as it goes."""

    settings: CostSettings = field(default_factory=CostSettings)
    regret: float = 0.3
    mean_turnover: float = 0.0
    """Evictions per block held, lately."""
    rates: Rates = field(default_factory=Rates)
    """Of workers that are like each other, or have not measured theirs."""
    mean_output_tokens: float = 128.0
    mean_uncached_tokens: float = 1024.0
    replication: Replication = field(default_factory=Replication)


Estimates = tuple[list[float], list[float]]
"""How long each worker keeps one request waiting, and what it costs to send it there: milliseconds, in the workers' order."""


def breakdown_of(worker: Worker, forecast: LoadForecast) -> CostBreakdown:
    """Work out the parts of a worker's cost, and note them there."""
    load, rates, settings = worker.load, worker.rates or forecast.rates, forecast.settings
    num_sequences, weight, token_ms = worker.num_sequences, settings.stream_weight, rates.prefill_ms_per_token
    used, queued, booked = load.used_blocks + worker.booked_blocks, load.waiting_prefill_tokens, worker.booked_tokens
    step_ms = rates.decode_base_ms + rates.decode_ms_per_block * used if num_sequences else 0.0
    slowing_ms = weight * forecast.mean_output_tokens * rates.decode_ms_per_block
    turnover = 1.0
    if forecast.mean_turnover and load.num_blocks:
        turnover = worker.recent_evictions / load.num_blocks / forecast.mean_turnover
        turnover = min(settings.max_turnover, max(1 / settings.max_turnover, turnover))
    burden, fixed_ms = 1 + weight * num_sequences, step_ms + slowing_ms * used
    booked_ms = rates.prefill_base_ms + token_ms * booked if booked else 0.0
    worker.breakdown = breakdown = (
        worker.reported_at_s * 1000 + rates.prefill_ms(queued) + booked_ms,  # when all its prompts should be computed, queued and booked
        step_ms / 2 + booked_ms,  # the least one waits
        rates.prefill_base_ms * burden + fixed_ms,  # base * (1 + w n) + step + w L b used
        token_ms * burden,  # ms per token * (1 + w n)
        rates.handoff_ms_per_token,
        slowing_ms * num_sequences,  # w L b n: per block that the request will hold
        max(0, load.num_blocks - load.used_blocks - load.cached_blocks - worker.booked_blocks),  # free ones
        settings.regret_weight * forecast.regret * turnover * token_ms,  # regret * turnover * ms per token
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
    """The formula, for every worker. `remote_ms` is when the best prefill worker could have computed the prompt, if there is one."""
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
        if remote_ms is not None and assumes_handoff(worker, uncached, wait_ms, remote_ms, forecast):
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


def assumes_handoff(worker: Worker, uncached: int, wait_ms: float, remote_ms: float, forecast: LoadForecast) -> bool:
    """Whether this decode worker is going to hand over a prompt of which so many tokens are not there: its own rule, by what routers know.

    `wait_ms` is what it waits for there, `remote_ms` when the best prefill worker could have computed the prompt.
    """
    load, compute_ms = worker.load, worker.measured_prefill_ms(uncached)
    local_ms = None if compute_ms is None else wait_ms + compute_ms
    there_ms = remote_ms + load.handoff_ns_per_token / 1e6 * uncached
    return decide(uncached - 1, forecast.settings.max_local_prefill_tokens, local_ms, there_ms, load.num_running > 0)[0]


def estimate_prefill(prompt: Prompt, workers: Sequence[Worker], overlaps: Sequence[int], forecast: LoadForecast, now_s: float) -> Estimates:
    """The formula for prefill workers: no streams to slow, but tickets that nobody has claimed yet, each as long as is usual."""
    waits_ms, costs_ms = estimate_all(prompt, workers, overlaps, forecast, now_s)
    usual = round(forecast.mean_uncached_tokens)
    for place, worker in enumerate(workers):
        num_unclaimed = worker.load.num_tickets - worker.load.num_running - worker.load.num_waiting
        if num_unclaimed > 0:
            tickets_ms = num_unclaimed * (worker.rates or forecast.rates).prefill_ms(usual)
            waits_ms[place] += tickets_ms
            costs_ms[place] += tickets_ms
    return waits_ms, costs_ms
