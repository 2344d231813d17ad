"""What routing knows of a request and of a worker, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter

from meshserve.wire.routing import WorkerLoad

_LEAST_PREFILL_MS_PER_TOKEN = 0.005
"""200,000 tokens/s, more than models are served with: a prefix is worth something even to an engine that takes no time."""

_TYPICAL_TOKENS = 2048
_ALIKE = 1.5
"""Rates within this factor are taken for one: which prompts a worker happened to see makes as much difference, and taking that for
speed would send the next ones there, or keep them away, for nothing."""

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
    """How fast one worker is. The defaults stand for a mid-size model on one current accelerator, until somebody has measured."""

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
    def reported(cls, load: WorkerLoad, others: "Rates") -> "Rates | None":
        """As this load says, and as the others' where it says nothing: a worker may only ever decode, or only prefill. None if it never
        says anything."""
        if not load.prefill_ns_per_token and not load.decode_base_us:
            return None
        prefill = others.prefill_base_ms, others.prefill_ms_per_token
        if load.prefill_ns_per_token:
            prefill = load.prefill_base_us / 1e3, max(_LEAST_PREFILL_MS_PER_TOKEN, load.prefill_ns_per_token / 1e6)
        decode = others.decode_base_ms, others.decode_ms_per_block
        if load.decode_base_us:
            decode = load.decode_base_us / 1e3, load.decode_ns_per_block / 1e6
        return cls(*prefill, *decode, load.handoff_ns_per_token / 1e6)

    def is_like(self, other: "Rates", num_blocks: int) -> bool:
        """Whether both could be the same hardware: a prompt, and a decode step with a half-full cache, take about as long."""
        prompt = self.prefill_ms(_TYPICAL_TOKENS), other.prefill_ms(_TYPICAL_TOKENS)
        step = self.decode_ms(num_blocks // 2), other.decode_ms(num_blocks // 2)
        return max(prompt) <= _ALIKE * min(prompt) and max(step) <= _ALIKE * min(step)

    def towards(self, other: "Rates", share: float) -> "Rates":
        """A running mean."""
        return Rates(*(before + (now - before) * share for before, now in zip(_figures_of(self), _figures_of(other), strict=True)))

    def prefill_ms(self, num_tokens: int) -> float:
        """To compute so many prompt tokens."""
        return self.prefill_base_ms + self.prefill_ms_per_token * num_tokens if num_tokens else 0.0

    def decode_ms(self, used_blocks: int) -> float:
        """A decode step with so many blocks held."""
        return self.decode_base_ms + self.decode_ms_per_block * used_blocks


CostBreakdown = tuple[float, float, float, float, float, float, int, float]
"""What the formula of :mod:`meshserve.routing.cost` needs of one worker, as :func:`~meshserve.routing.cost.breakdown_of` lists the parts.
They change with reports and bookings only, so they are worked out once for many requests. A tuple, as each question unpacks every
worker's: looking up the fields of an object takes three times as long."""


_figures_of = attrgetter(*(found.name for found in fields(Rates)))


@dataclass(slots=True)
class Worker:
    """One worker as a router sees it: what it reported, and what was sent there since."""

    incarnation: str
    name: str
    load: WorkerLoad = field(default=_NO_LOAD, init=False)
    rates: Rates | None = None
    """None if it is like the others."""
    reported_at_s: float = 0.0
    recent_evictions: float = 0.0
    """Blocks that it evicted, older ones counting less."""
    booked_tokens: int = 0
    """Uncached prompt tokens of requests that it has not reported yet."""
    booked_blocks: int = 0
    num_booked: int = 0
    num_sequences: int = 0
    """Running, waiting and on their way."""
    last_chosen: int = 0
    """The router's choice number at which it was last chosen to decode: breaks ties, oldest first."""
    last_prefilled: int = 0
    """The same for prompts that it computed for another: whoever does both takes turns in each."""
    breakdown: CostBreakdown | None = None
    """Worked out from all this when first needed; None again after every change."""

    def take_load(self, load: WorkerLoad, now_s: float) -> None:
        """What it reports holds from now on; bookings come on top."""
        self.load, self.reported_at_s, self.breakdown = load, now_s, None
        self.num_sequences = load.num_running + load.num_waiting + self.num_booked

    def measured_prefill_ms(self, num_tokens: int) -> float | None:
        """To compute so many prompt tokens, by what this very worker measured; None if it has not."""
        load = self.load
        return load.prefill_base_us / 1e3 + load.prefill_ns_per_token / 1e6 * num_tokens if load.prefill_ns_per_token else None

    def book(self, num_tokens: int, num_blocks: int) -> None:
        """Work that it has not reported yet is on its way there."""
        self.booked_tokens += num_tokens
        self.booked_blocks += num_blocks
        self.num_booked += 1
        self.num_sequences += 1
        self.breakdown = None

    def unbook(self, num_tokens: int, num_blocks: int) -> None:
        """It is reported, or was not done."""
        self.booked_tokens -= num_tokens
        self.booked_blocks -= num_blocks
        self.num_booked -= 1
        self.num_sequences -= 1
        self.breakdown = None
