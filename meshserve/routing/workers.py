"""What routing knows: a prompt, a worker and its rates, and what holds for all workers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from meshserve.routing.demand import Replication
from meshserve.wire.routing import WorkerLoad

_LEAST_PREFILL_MS_PER_TOKEN = 0.005
"""200,000 tokens/s, more than models are served with: a prefix is worth something even to an engine that takes no time."""

_NO_LOAD = WorkerLoad()


@dataclass(slots=True)
class Prompt:
    """What routing needs to know of a request."""

    num_tokens: int
    block_size: int
    hashes: Sequence[int] = ()
    """Of its full blocks."""


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast one worker is. Until rates are measured, the defaults are those of a mid-size model on one accelerator."""

    prefill_base_ms: float = 5.0
    """Of a step that computes prompt tokens, however few."""
    prefill_ms_per_token: float = 0.05
    decode_base_ms: float = 10.0
    """Of a decode step with an empty cache."""
    decode_ms_per_block: float = 0.0
    """What one more held block adds to it."""
    handoff_ms_per_token: float = 0.0
    """For KV that comes from a prefill worker."""

    @classmethod
    def reported(cls, load: WorkerLoad, others: "Rates") -> "Rates":
        """By this load, and by the others' rates where it says nothing: a worker may only decode, or only prefill."""
        prefill = others.prefill_base_ms, others.prefill_ms_per_token
        if load.prefill_ns_per_token:
            prefill = load.prefill_base_us / 1e3, max(_LEAST_PREFILL_MS_PER_TOKEN, load.prefill_ns_per_token / 1e6)
        decode = others.decode_base_ms, others.decode_ms_per_block
        if load.decode_base_us:
            decode = load.decode_base_us / 1e3, load.decode_ns_per_block / 1e6
        return cls(*prefill, *decode, load.handoff_ns_per_token / 1e6 or others.handoff_ms_per_token)

    def towards(self, other: "Rates", share: float) -> "Rates":
        """A running mean."""
        return Rates(
            self.prefill_base_ms + (other.prefill_base_ms - self.prefill_base_ms) * share,
            self.prefill_ms_per_token + (other.prefill_ms_per_token - self.prefill_ms_per_token) * share,
            self.decode_base_ms + (other.decode_base_ms - self.decode_base_ms) * share,
            self.decode_ms_per_block + (other.decode_ms_per_block - self.decode_ms_per_block) * share,
            self.handoff_ms_per_token + (other.handoff_ms_per_token - self.handoff_ms_per_token) * share,
        )

    def prefill_ms(self, num_tokens: int) -> float:
        """To compute so many prompt tokens."""
        return self.prefill_base_ms + self.prefill_ms_per_token * num_tokens if num_tokens else 0.0

    def decode_ms(self, used_blocks: int) -> float:
        """A decode step with so many blocks held."""
        return self.decode_base_ms + self.decode_ms_per_block * used_blocks


_UNMEASURED = Rates()

CostBreakdown = tuple[float, float, float, float, float, float, int, float]
"""The parts of the cost formula for one worker, in the order of :func:`~meshserve.routing.policies.breakdown_of`.
They change with reports and reservations only, so they are computed once for many requests. A tuple, since each
question unpacks every worker's: looking up fields of an object takes three times as long."""


@dataclass(slots=True)
class Worker:
    """One worker as a router sees it: its latest report, and the load that was sent there since."""

    incarnation: str
    name: str
    kind: str = ""
    """Workers of one kind, that is, of one engine and model, are taken to be equally fast."""
    load: WorkerLoad = field(default=_NO_LOAD, init=False)
    rates: Rates = _UNMEASURED
    """Its own, or those of its kind: :class:`~meshserve.routing.kinds.Kind` decides."""
    reported_at_s: float = 0.0
    recent_evictions: float = 0.0
    """Blocks that it evicted, older ones counting less."""
    in_flight_tokens: int = 0
    """Uncached prompt tokens of requests that it has not reported yet."""
    in_flight_blocks: int = 0
    num_in_flight: int = 0
    num_sequences: int = 0
    """Running, waiting and in flight."""
    last_chosen: int = 0
    """The router's choice number at which it was last chosen to decode: breaks ties, oldest first."""
    last_prefilled: int = 0
    """The same for prompts that it computed for another: a worker of both roles takes turns in each."""
    breakdown: CostBreakdown | None = None
    """Worked out from all this when first needed; None again after every change."""


@dataclass(frozen=True, slots=True)
class CostSettings:
    """The parameters of the cost formula, which stands in :mod:`meshserve.routing.policies`."""

    stream_weight: float = 0.1
    """w, 0 to 1. Higher spreads sequences over workers and decodes faster, lower keeps prefixes together and
    starts sooner. Below 1, since readers notice a late start and not a late token."""
    regret_weight: float = 1.0
    """Multiplies the measured regret. Higher keeps more in the caches, lower waits less; 0 ignores evictions."""
    max_turnover: float = 2.0
    """Turnover counts between 1 over this and this: beyond, the estimate is chance."""
    tie_ms: float = 2.0
    """Milliseconds that nobody notices. Higher follows sessions and load more, lower trusts estimates more."""
    max_local_prefill_tokens: int | None = None
    """As in HandoffConfig: workers do not report theirs, so routers are given the same value."""


@dataclass(slots=True)
class LoadForecast:
    """What holds for all workers, measured by the router as it goes."""

    settings: CostSettings = field(default_factory=CostSettings)
    regret: float = 0.3
    mean_turnover: float = 0.0
    """Evictions per block held, lately."""
    mean_output_tokens: float = 128.0
    mean_uncached_tokens: float = 1024.0
    replication: Replication = field(default_factory=Replication)
