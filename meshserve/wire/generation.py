"""What a processor asks of a decode worker. The items of the stream that comes back are, with positions from 0:

- `[position, token, ...]`: tokens, and the position of the first one;
- `[[position, token, ...], logprobs]`: the same with as many log probabilities;
- either of them after `account`, as its first element, with the first tokens: a row of a :class:`WorkerAccount`;
- `["prompt_logprobs", logprobs]`, before all tokens;
- `NAME` of a prefill worker that died with the prompt.

The end is a :class:`GenerationEnd`.
"""

import math
from collections.abc import Callable
from functools import cached_property
from math import inf, nextafter
from operator import attrgetter
from typing import Annotated, Any, NamedTuple, get_type_hints

from meshserve.errors import InvalidRequest, ProtocolError
from meshserve.wire.structs import MAX_MS, Count, FrozenMap, Map, Meta, Milliseconds, NonEmpty, Tokens, field, read

TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log probability, and the likeliest tokens at its place with theirs, likeliest first. Natural logarithms."""

# --- sampling parameters: what each may be

MAX_LOGIT_BIASES, MAX_CHOICE_TEXTS = 4096, 1024
MAX_COUNT = 10_000_000
"""Of tokens to be made, or to choose from."""
MAX_LOGPROBS = 20
TokenCount = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
NumLogprobs = Annotated[int, Meta(ge=-1, le=MAX_LOGPROBS)]
Share = Annotated[float, Meta(ge=0, le=1)]
TopP = Annotated[float, Meta(gt=0, le=1)]
Temperature = Annotated[float, Meta(ge=0, lt=1e6)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, lt=1e6)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
MAX_BIAS = 100
Bias = Annotated[float, Meta(ge=-MAX_BIAS, le=MAX_BIAS)]
LogitBias = Annotated[tuple[tuple[int, Bias], ...], Meta(max_length=MAX_LOGIT_BIASES)]
"""Token ids and what is added to their logits."""
ChoiceTexts = Annotated[tuple[NonEmpty, ...], Meta(max_length=MAX_CHOICE_TEXTS)]
"""Texts of which an output has to be one."""


class SamplingDefaults(FrozenMap, frozen=True):
    """Sampling parameters of requests that name none, as a model's `generation_config.json` has them."""

    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TokenCount = 0
    min_p: Share = 0.0
    repetition_penalty: RepetitionPenalty = 1.0


class AskedSampling(Map, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters as a request names them: None is open, and filled in by the model's card and the processor.

    A body of an HTTP API passes a field on that has the name of one here, and the processor passes it on to the worker. Only what
    differs from its default travels. A peer of an older version refuses a parameter that it does not know (`UnknownField`): to ignore
    the parameter would be to answer something else than what was asked.
    """

    max_tokens: TokenCount | None = None
    """None: the processor's own limit. 0: nothing, for a prompt that is only echoed."""
    min_tokens: TokenCount = 0
    """Neither an end-of-sequence token nor a stop string ends an output before so many tokens."""
    temperature: Temperature | None = None
    """0 is greedy."""
    top_p: TopP | None = None
    """The likeliest tokens that have this share of the probability together, and no others, are chosen."""
    top_k: TokenCount | None = None
    """So many of the likeliest tokens, and no others, are chosen; 0 is all."""
    min_p: Share | None = None
    """Tokens less likely than this share of the likeliest one's probability, at the temperature, are not chosen; 0 is none."""
    seed: int | None = None
    """Drawn by the processor where the client named none, so that another worker, or another processor, can continue
    identically."""
    ignore_eos: bool = False
    """Go on to `max_tokens` whatever the model says."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens that are in the output so far."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from a token's logit for each time that it is in the output so far."""
    repetition_penalty: RepetitionPenalty | None = None
    """Divides the logits above 0 of tokens that are in the prompt or the output, and multiplies those below; 1 is none."""
    logit_bias: LogitBias = ()
    logprobs: NumLogprobs = -1
    """How many alternatives are reported with each token's log probability; 0 is the token's own only, -1 none."""
    json_schema: str = ""
    """The output's text must be a JSON document that is valid under this JSON Schema (its text); empty: it is free."""
    regex: str = ""
    """The whole output's text must match this regular expression."""
    choices: ChoiceTexts = ()
    """The output's text must be one of these. Of schema, expression and choices there is one at most."""


LeastWeight = Callable[[float, Callable[[], float]], float]
LEAST_WEIGHTS: dict[str, LeastWeight] = {
    "min_p": lambda min_p, total: min_p,
}
"""Parameters that forbid tokens of little weight: of the parameter's value, where it is not 0, and of the sum of all weights, the least
weight that a token must have. A token's weight is exp(logit - best logit) at the temperature: the likeliest one's is 1."""


class Sampling(AskedSampling, kw_only=True, dict=True):
    """Sampling parameters. Sampling is a function of these, the position and the logits, never of the worker or the time.

    The order is the same for all engines, and vLLM's: bias and penalties change the logits, `temperature` divides them, then the
    least weight (`min_p`), `top_k` and `top_p` in turn forbid tokens, and one of the others is drawn by its weight.
    """

    max_tokens: int = 16
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TokenCount = 0
    min_p: Share = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    seed: int = 0
    choice: int = 0
    """Which of several answers to one prompt this is: each draws its own tokens from the one seed."""
    prompt_logprobs: int = -1
    """`logprobs` of the prompt's tokens, all at once and before the first token; the prompt's first one has none."""

    def least_weight(self, total: Callable[[], float]) -> float:
        """The least weight of a token that may be drawn. `total` gives the sum of all weights, and is called only if the sum counts."""
        rules = LEAST_WEIGHTS.items()
        return max([rule(value, total) for name, rule in rules if (value := getattr(self, name))], default=0.0)

    @cached_property
    def filters(self) -> tuple[float, ...]:
        """All that decides, with the logits, which tokens may be drawn and how often. Not to be changed after the first look."""
        return _filters_of(self)


_filters_of = attrgetter("temperature", "top_k", "top_p", *LEAST_WEIGHTS)


class Bounds(NamedTuple):
    """Of a parameter that is a number, as its type has them."""

    name: str
    least: float
    most: float
    """Both are allowed."""
    limits: Meta

    @classmethod
    def of(cls, name: str, kind: type, limits: Meta) -> "Bounds":
        """`kind` is the parameter's type of number, in which the bounds are kept: two types compare half as fast."""
        least = limits.ge if limits.gt is None else nextafter(limits.gt, inf)
        most = limits.le if limits.lt is None else nextafter(limits.lt, -inf)
        assert least is not None and most is not None, "a number has both bounds"
        return cls(name, kind(least), kind(most), limits)


BOUNDS = tuple(
    Bounds.of(name, kind.__origin__, meta)
    for name, kind in get_type_hints(Sampling, include_extras=True).items()
    for meta in getattr(kind, "__metadata__", ())
    if meta.ge is not None or meta.gt is not None
)


def check_bounds(sampling: Sampling) -> None:
    """For engines, as a request of another role of their peer was not read. Raises InvalidRequest, which names the parameter."""
    for name, least, most, limits in BOUNDS:
        if not least <= (value := getattr(sampling, name)) <= most:
            raise InvalidRequest(f"{name} must be {_in_words(limits, value)}, not {value}", param=name)


def _in_words(limits: Meta, value: float) -> str:
    if limits.lt is not None:  # far above what anybody asks for: told to those alone who ask for more
        return f"below {limits.lt:g}" if value >= limits.lt else f"at least {limits.ge}"
    return f"from {limits.ge} to {limits.le}" if limits.gt is None else f"above {limits.gt} and at most {limits.le}"


class GenerateRequest(Map, dict=True):
    """One sequence to be continued. `tokens` is the prompt, followed by what earlier workers generated already.

    An engine may keep what it computed of the request in `vars(request)`: that neither crosses the wire nor counts for equality.
    """

    request_id: str
    """The mesh's own name of the request: the processor's incarnation and a counter. What a client sent is only a label."""
    model: str
    tokens: Tokens
    sampling: Sampling = field(default_factory=Sampling)
    num_generated: int = 0
    """How many of `tokens` are output that another worker generated: sampling goes on at this position."""
    prefill_peers: Annotated[tuple[tuple[str, int, int], ...], Meta(max_length=1024)] = ()
    """Prefill workers, best first, as the router ranked them: incarnation, prompts queued there, blocks of this prompt there."""
    prefill_ms: tuple[Milliseconds, ...] = ()
    """For each of these, until it is expected to have computed the prompt's KV; 0: its rate is not measured. Empty: not known."""
    lost_peers: tuple[str, ...] = ()
    attempt: Annotated[int, Meta(ge=0)] = 0
    """Counts the workers that were tried before. A worker that still has an earlier attempt of the request drops that one."""
    """Names of workers that died while they had this request."""

    def _check(self) -> None:
        if not 0 <= self.num_generated < len(self.tokens):
            raise ProtocolError("malformed GenerateRequest: its prompt is empty, or all of it is output")
        if len(self.prefill_ms) != len(self.prefill_peers):
            self.prefill_ms = ()


class GenerationEnd(Map):
    """The sequence is complete."""

    reason: Annotated[str, Meta(pattern=r"^(stop|length)\Z")]
    account: Any = None
    """A row of a :class:`WorkerAccount`."""
    num_tokens: int | None = None
    """Of the whole output, so that no token is missed at its end, and an output without any is meant so. None: not said."""


# --- a decode worker's account of one sequence, with its first tokens and, complete, with its end
#
# An account serves people only: a field that cannot be read counts as 0 or None, and costs no request its answer.

_MAX_COUNT = 1 << 63


def milliseconds(value: Any) -> float:
    """A duration from a peer; 0 for what no clock says."""
    if type(value) is float and 0.0 <= value < MAX_MS:
        return value
    return min(float(value), MAX_MS) if type(value) in (int, float) and math.isfinite(value) and value > 0 else 0.0


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < _MAX_COUNT else 0


Attempt = Annotated[dict[str, str | int | Annotated[float, Meta(ge=-MAX_MS, le=MAX_MS)] | bool | None], Meta(max_length=32)]
"""One attempt at a prompt, as receipts show it."""


class HandedOver(NamedTuple):
    """How a prompt's KV came from another worker, or which attempts failed."""

    prefill_peer: str | None
    """Incarnation of the worker whose blocks these are."""
    attempts: list[Attempt]
    num_blocks: Count
    num_bytes: Count

    @classmethod
    def from_wire(cls, data: Any) -> "HandedOver | None":
        """None for None, as for most prompts."""
        if data is None or type(data) is cls:
            return data
        if not isinstance(data, (list, tuple)) or len(data) < len(cls._fields):
            return cls(None, [], 0, 0)
        peer, attempts, num_blocks, num_bytes = data[: len(cls._fields)]
        sound = [attempt for attempt in attempts if _is_sound(attempt)] if isinstance(attempts, list) else []
        return cls(peer if isinstance(peer, str) else None, sound, _count(num_blocks), _count(num_bytes))


def _is_sound(attempt: Any) -> bool:
    try:
        read(Attempt, attempt)
    except ProtocolError:
        return False
    return True


_WHY = {
    "cached": "nothing but the prompt's last token is missing here",
    "short": "few tokens are missing here, and no time is expected to be gained elsewhere",
    "floor": "at most as many tokens are missing here as are never handed over by --max-local-prefill-tokens",
    "long": "many tokens are missing here, and no time is expected to be lost elsewhere",
    "faster-here": "the first token is expected sooner if this worker computes the prompt",
    "faster-there": "the first token is expected sooner if a prefill worker computes the prompt",
    "streams-run-here": "the prompt would hold up streams that run here, and is expected to take at most twice as long elsewhere",
    "no-peer": "no prefill worker can take this prompt",
    "queue-full": "too many prompts wait at the best prefill worker",
}


class HandoffDecision(NamedTuple):
    """Where one prompt is prefilled, and by which figures."""

    is_handoff: bool
    reason: str
    """As :func:`meshserve.routing.policies.decide_handoff` words it."""
    local_ms: Milliseconds | None = None
    """Expected time to the first token if the decode worker computes the prompt; None: not measured."""
    remote_ms: Milliseconds | None = None
    """The same if the best prefill worker computes it."""

    @classmethod
    def from_wire(cls, data: Any) -> "HandoffDecision | None":
        """None for malformed data."""
        if type(data) is cls:
            return data
        if not isinstance(data, (list, tuple)) or len(data) < len(cls._fields):
            return None
        is_handoff, reason, local_ms, remote_ms = data[: len(cls._fields)]
        if type(is_handoff) is not bool or not isinstance(reason, str):
            return None
        return cls(is_handoff, reason, *(None if figure is None else milliseconds(figure) for figure in (local_ms, remote_ms)))

    def for_receipt(self) -> dict[str, Any]:
        """As receipts show it."""
        return {
            "decided": "handoff" if self.is_handoff else "local",
            "local_ms": None if self.local_ms is None else round(self.local_ms, 3),
            "remote_ms": None if self.remote_ms is None else round(self.remote_ms, 3),
            "reason": self.reason,
            "why": _WHY.get(self.reason, ""),
        }


class WorkerAccount(NamedTuple):
    """Times are of the worker's monotonic clock, and 0 as long as they are not known. On the wire it is a row of these."""

    queue_ms: Milliseconds = 0.0
    prefill_ms: Milliseconds = 0.0
    kv_transfer_ms: Milliseconds = 0.0
    decode_ms: Milliseconds = 0.0
    total_ms: Milliseconds = 0.0
    """Since the call came."""
    num_cached_tokens: Count = 0
    handed_over: HandedOver | None = None
    """None for a prompt that was computed where it is decoded, and where it was said before."""
    decision: HandoffDecision | None = None
    """None for a short prompt that no other worker could have prefilled. Workers of an earlier minor version do not say it."""

    @classmethod
    def from_wire(cls, data: Any) -> "WorkerAccount":
        """All zero for malformed data."""
        if type(data) is cls:
            return data
        try:
            found: WorkerAccount = read(cls, data)  # nearly every account is sound
            return found
        except ProtocolError:
            pass
        if not isinstance(data, (list, tuple)) or len(data) < _NUM_FIELDS:
            return cls()
        return cls(*[read(said) for read, said in zip(_READERS, data, strict=False)])


def handed_over_in(data: Any) -> HandedOver | None:
    """The handoff alone, of an account that a later one completes. Mostly there is none."""
    is_account = isinstance(data, (list, tuple)) and len(data) >= _NUM_FIELDS
    return HandedOver.from_wire(data[_NUM_FIELDS - 1]) if is_account else None


_NUM_FIELDS = WorkerAccount._fields.index("decision")
"""That every version sends."""
_READERS: tuple[Callable[[Any], Any], ...] = (
    *[milliseconds] * 5,
    *(_count, HandedOver.from_wire, HandoffDecision.from_wire),
)
