"""What a processor asks a router, and what the router answers. Between roles of one peer these messages go as they are."""

from typing import Annotated, Any

from meshserve.wire.account import milliseconds
from meshserve.wire.message import Map, Meta, Row, Tokens, field


class RouteRequest(Map):
    """Which worker is best for this prompt?"""

    request_id: str
    model: str
    tokens: Tokens
    policy: str | None = None
    """None: the router's own."""
    session: str = ""
    excluded: list[str] = field(default_factory=list)
    """Incarnations of workers that were tried."""


class Candidate(Row):
    """One worker's place in an answer, with the figures that put it there."""

    incarnation: str
    peer: str
    """Its name, for people."""
    overlap_blocks: int
    load: int
    """Sequences there."""
    wait_ms: float
    cost_ms: float
    reason: str
    ready_ms: float = 0.0
    """Of a prefill worker: until the prompt's KV is expected to be computed there; 0 where its rate is not measured."""

    def for_receipt(self) -> dict[str, Any]:
        """As receipts show it."""
        return {
            "peer": self.peer,
            "overlap_blocks": self.overlap_blocks,
            "load": self.load,
            "wait_ms": round(self.wait_ms, 3),
            "cost_ms": round(self.cost_ms, 3),
            "reason": self.reason,
        }


class RoutingDecision(Map):
    """Where a request may go, best first, and which router said so."""

    router: str | None
    """The router's name; None if there was none to ask."""
    policy: str
    decode: Annotated[list[Candidate], Meta(min_length=1)]
    """At least one: a router that knows no decode worker answers with an error."""
    prefill: Annotated[list[Candidate], Meta(max_length=1024)]

    def _check(self) -> None:
        """One worker whose times no clock can have measured must not void the answer for all others."""
        for candidate in self.prefill:
            candidate.ready_ms = milliseconds(candidate.ready_ms)
