"""The receipt of a request: who served it, why, and where the time went. Pure.

Phases partition the critical path. Each is measured on one peer's monotonic clock, so no clocks need to agree: `network` is what the
caller measured less what the callee did, and `other` is what is left. The time of an attempt that came to nothing, at a worker that was
lost or full, is `queue`: the request waited for the attempt that counts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from meshserve.errors import MeshserveError
from meshserve.wire.generation import HandoffDecision, milliseconds
from meshserve.wire.routing import Candidate

PHASES = ("http", "process", "route", "queue", "prefill", "kv_transfer", "decode", "network", "other")
_BEFORE_FIRST_TOKEN = ("route", "queue", "prefill", "kv_transfer")

OK = "ok"


@dataclass(slots=True)
class PhaseTimes:
    """Milliseconds of each phase; what no phase has is `other`."""

    http: float = 0.0
    process: float = 0.0
    route: float = 0.0
    queue: float = 0.0
    prefill: float = 0.0
    kv_transfer: float = 0.0
    decode: float = 0.0
    network: float = 0.0


@dataclass(slots=True)
class Receipt:
    """The processor fills in the receipt as the request goes along, from what the peers on the path return.

    A processor keeps a thousand. To free one that is no longer in the CPU's caches takes a cache miss for each object: so a receipt is
    of few objects, and what is empty is shared.
    """

    request_id: str
    client_id: str
    model: str
    policy: str = ""
    processor: str | None = None
    router: str | None = None
    decode: str | None = None
    prefill: str | None = None
    """Names of the peers that served it; the frontend adds its own."""
    candidates: Sequence[Candidate] = ()
    """As the router sent them; rendered when the receipt is shown."""
    prefill_candidates: Sequence[Candidate] = ()
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    attempts: Sequence[dict[str, Any]] = ()
    continuations: Sequence[dict[str, Any]] = ()
    """Each time that another worker went on where one was lost: `from` and `to` (names), `outcome` of the lost one, `position` (tokens so
    far), `pause_ms` (between the last token of the one and the first of the other). Where a processor was lost, `role` says so."""
    decision: HandoffDecision | None = None
    """Of the decode worker; None for a short prompt where there was no prefill worker to hand over to."""
    phases_ms: PhaseTimes = field(default_factory=PhaseTimes)
    choices: Sequence[dict[str, Any]] = ()
    """Who served each answer, where there are several: `index`, `decode`, `prefill`, `completion` (tokens)."""
    traceparent: str = ""
    total_ms: float = 0.0
    outcome: str = ""
    """`ok`, or the code of the error that the request ended in."""
    error: str = ""
    """What the error said."""
    ended_s: float = 0.0
    """On the processor's monotonic clock."""
    kind: str = ""
    """`chat` or `completion`."""
    reason: str = ""
    """Why its first answer ended."""

    @property
    def names(self) -> tuple[str, ...]:
        """By which the request is known."""
        return self.request_id, self.client_id

    @property
    def peers(self) -> dict[str, str | None]:
        """By role, in a dictionary of its own."""
        return {"frontend": None, "processor": self.processor, "router": self.router, "decode": self.decode, "prefill": self.prefill}

    def to_wire(self) -> dict[str, Any]:
        """The receipt as clients see it, but for the frontend's part."""
        found: dict[str, Any] = {
            "request_id": self.request_id,
            "client_id": self.client_id,
            "model": self.model,
            "policy": self.policy,
            "peers": self.peers,
            "candidates": [candidate.for_receipt() for candidate in self.candidates],
            "prefill_candidates": [candidate.for_receipt() for candidate in self.prefill_candidates],
            "tokens": {"prompt": self.num_prompt_tokens, "cached": self.num_cached_tokens, "completion": self.num_completion_tokens},
            "kv": {"blocks": self.num_blocks, "bytes": self.num_bytes},
            "attempts": list(self.attempts),
            "handoff": None if self.decision is None else self.decision.for_receipt(),
            "migrations": len(self.continuations),
            "continuations": list(self.continuations),
            "outcome": self.outcome,
            "error": self.error,
            "traceparent": self.traceparent,
            "total_ms": round(self.total_ms, 3),
            "phases_ms": partition(asdict(self.phases_ms), self.total_ms),
        }
        return {**found, "choices": list(self.choices)} if self.choices else found


def partition(phases_ms: Mapping[str, float], total_ms: float) -> dict[str, float]:
    """All phases, in whole microseconds: none is negative, and their sum is `total_ms` rounded to a microsecond.

    What is not measured is `other`. If the clocks of other peers ran faster than ours, the last phases are cut.
    """
    left_us = max(0, round(milliseconds(total_ms) * 1000))
    found = {}
    for phase in PHASES[:-1]:
        taken_us = min(left_us, int(milliseconds(phases_ms.get(phase, 0.0)) * 1000))
        found[phase] = taken_us / 1000
        left_us -= taken_us
    return {**found, "other": left_us / 1000}


def after_first_token(first_ms: PhaseTimes, waited_ms: float, own_ms: PhaseTimes) -> PhaseTimes:
    """The phases of a later answer to a prompt: those of the first answer for as long as this one waited for it, then its own."""
    found, left_ms = replace(own_ms), waited_ms
    for phase in _BEFORE_FIRST_TOKEN:
        taken_ms = min(left_ms, getattr(first_ms, phase))
        setattr(found, phase, getattr(found, phase) + taken_ms)
        left_ms -= taken_ms
    found.network += left_ms
    return found


def merged(receipts: Sequence[Receipt], request_id: str, num_prompt_tokens: int, num_cached_tokens: int) -> Receipt:
    """One receipt of all answers to a request: the path of the first one, the tokens, blocks, bytes, attempts and continuations of all."""
    return replace(
        receipts[0],
        request_id=request_id,
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        num_completion_tokens=sum(receipt.num_completion_tokens for receipt in receipts),
        num_blocks=sum(receipt.num_blocks for receipt in receipts),
        num_bytes=sum(receipt.num_bytes for receipt in receipts),
        attempts=[attempt for receipt in receipts for attempt in receipt.attempts],
        continuations=[found for receipt in receipts for found in receipt.continuations],
        choices=list(_choices(receipts)),
    )


def _choices(receipts: Sequence[Receipt]) -> Iterable[dict[str, Any]]:
    for index, receipt in enumerate(receipts):
        yield {"index": index, "decode": receipt.decode, "prefill": receipt.prefill, "completion": receipt.num_completion_tokens}


@dataclass(slots=True)
class StartedOver:
    """What a frontend knows of a request that it started over, as a processor was lost."""

    name: str = ""
    """Of the request at the last processor."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """A processor each: `peer`, `role`, `outcome`, `ms`."""
    continuations: list[dict[str, Any]] = field(default_factory=list)
    """As in a :class:`Receipt`, with `role`, and without a position: a frontend counts no tokens."""


@dataclass(slots=True)
class FrontendReceipt:
    """A frontend's part of a request, on the frontend's monotonic clock. A step that was not reached has the time of the next one."""

    request_id: str
    client_id: str
    began_s: float
    asked_s: float = 0.0
    """The request asked for an admission slot."""
    passed_s: float = 0.0
    """The request was passed on to a processor."""
    answered_s: float = 0.0
    """The last item came from the processor."""
    ended_s: float = 0.0
    """Only the end of the response was left to write, or the client had left."""
    processor: str = ""
    """Incarnation; empty if the request got to no processor."""
    model: str = ""
    traceparent: str = ""
    """As the client sent it."""
    passed_on: str = ""
    """As the processor got it, if this frontend has a span of its own in the trace."""
    outcome: str = OK
    error: str = ""
    started_over: StartedOver | None = None
    """None of nearly all requests."""

    @property
    def names(self) -> tuple[str, ...]:
        """By which the request is known."""
        names = self.request_id, self.client_id
        return names if self.started_over is None else (*names, self.started_over.name)

    def failed(self, error: MeshserveError) -> None:
        """The request ended in this error."""
        self.outcome, self.error = error.code, error.message

    def to_wire(self, name: str) -> dict[str, Any]:
        """Plain data for :func:`with_frontend`; `name` is the frontend's."""
        ended_s = self.ended_s
        answered_s = self.answered_s or ended_s
        passed_s = self.passed_s or answered_s
        asked_s = self.asked_s or passed_s
        part = {
            "frontend": name,
            "total_ms": (ended_s - self.began_s) * 1000,
            "http_ms": (asked_s - self.began_s + ended_s - answered_s) * 1000,
            "queue_ms": (passed_s - asked_s) * 1000,
            "call_ms": (answered_s - passed_s) * 1000,
            "traceparent": self.traceparent,
        }
        return part if self.started_over is None else {**part, "request_id": self.request_id, "started_over": asdict(self.started_over)}

    def receipt(self) -> Receipt:
        """Of a request that got to no processor, or whose processor is gone."""
        return Receipt(self.request_id, self.client_id, self.model, traceparent=self.traceparent, outcome=self.outcome, error=self.error)


def with_frontend(receipt: dict[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """The receipt as clients see it. The total is what the frontend measured, which adds `http`, the frontend's queue and a hop."""
    phases = dict(receipt["phases_ms"])
    total_ms = milliseconds(part.get("total_ms"))
    phases["http"] = milliseconds(part.get("http_ms"))
    phases["queue"] += milliseconds(part.get("queue_ms"))
    phases["network"] += max(0.0, milliseconds(part.get("call_ms")) - receipt["total_ms"])
    peers = {**receipt["peers"], "frontend": str(part.get("frontend"))}
    traceparent = part.get("traceparent") or receipt["traceparent"]
    timed = {"total_ms": round(total_ms, 3), "phases_ms": partition(phases, total_ms)}
    completed = {**receipt, "peers": peers, "traceparent": str(traceparent), **timed}
    return _with_starts(completed, part) if part.get("started_over") else completed


def _with_starts(receipt: dict[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """Of a request that was started over: under the name that its client knows, with what happened at the processors of before."""
    attempts = [*_dicts(part["started_over"], "attempts"), *_dicts(receipt, "attempts")]
    continuations = [*_dicts(part["started_over"], "continuations"), *_dicts(receipt, "continuations")]
    counted = {"attempts": attempts, "continuations": continuations, "migrations": len(continuations)}
    return {**receipt, "request_id": str(part.get("request_id") or receipt["request_id"]), **counted}


def _dicts(data: Any, name: str) -> list[dict[str, Any]]:
    """What stands in a receipt, or a part of one, from any peer."""
    found = data.get(name) if isinstance(data, dict) else None
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
