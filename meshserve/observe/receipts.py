"""The receipt of a request: who served it, why, and where the time went.

Phases partition the critical path. Each is measured on one peer's monotonic clock, `network` by subtracting what the callee
measured from what its caller did, so no clocks need to agree; `other` is what is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from meshserve.routing.candidates import Candidate

PHASES = ("http", "process", "route", "queue", "prefill", "kv_transfer", "decode", "network", "other")


@dataclass(slots=True)
class Receipt:
    """Filled by the processor as the request goes along, by what the peers on its path return."""

    request_id: str
    client_id: str
    model: str
    policy: str = ""
    peers: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(("frontend", "processor", "router", "decode", "prefill")))
    candidates: Sequence[Candidate] = ()
    """Worded when somebody wants to see them."""
    prefill_candidates: Sequence[Candidate] = ()
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    attempts: list[dict[str, Any]] = field(default_factory=list)
    phases_ms: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, milliseconds: float) -> None:
        """More time in this phase."""
        self.phases_ms[phase] = self.phases_ms.get(phase, 0.0) + max(0.0, milliseconds)

    def to_wire(self, total_ms: float) -> dict[str, Any]:
        """The receipt as clients see it."""
        phases = {phase: round(self.phases_ms.get(phase, 0.0), 3) for phase in PHASES}
        phases["other"] = round(max(0.0, total_ms - sum(value for key, value in self.phases_ms.items() if key != "other")), 3)
        return {
            "request_id": self.request_id,
            "client_id": self.client_id,
            "model": self.model,
            "policy": self.policy,
            "peers": self.peers,
            "candidates": [candidate.for_receipt() for candidate in self.candidates],
            "prefill_candidates": [candidate.for_receipt() for candidate in self.prefill_candidates],
            "tokens": {"prompt": self.num_prompt_tokens, "cached": self.num_cached_tokens, "completion": self.num_completion_tokens},
            "kv": {"blocks": self.num_blocks, "bytes": self.num_bytes},
            "attempts": self.attempts,
            "migrations": 0,
            "total_ms": round(total_ms, 3),
            "phases_ms": phases,
        }


def with_http(receipt: dict[str, Any], frontend: str, total_ms: float) -> dict[str, Any]:
    """The receipt as the frontend gives it out: `total_ms` is now what the frontend measured, the difference is `http`."""
    phases = {**receipt["phases_ms"], "http": round(max(0.0, total_ms - receipt["total_ms"]), 3)}
    return {**receipt, "peers": {**receipt["peers"], "frontend": frontend}, "total_ms": round(total_ms, 3), "phases_ms": phases}
