"""Questions to routers and their answers, reservations between routers, and reports of workers to routers."""

from typing import Annotated, Any

from meshserve.wire.generation import milliseconds
from meshserve.wire.structs import Figure, FrozenRow, Map, Meta, Row, Tokens


class RouteRequest(Map):
    """Which worker is best for this prompt?"""

    request_id: str
    model: str
    tokens: Tokens
    policy: str | None = None
    """None: the router's own."""
    session: str = ""
    excluded: tuple[str, ...] = ()
    """Incarnations of workers that were tried."""
    model_hash: str = ""
    """Of the model that the prompt was made for, where several have the name; empty: not said."""
    num_tokens: Figure = 0
    """Of the prompt and all output that it may get: workers that take fewer are passed over. 0: not said."""


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
        for candidate in (*self.decode, *self.prefill):
            candidate.ready_ms = milliseconds(candidate.ready_ms)
            candidate.wait_ms, candidate.cost_ms = milliseconds(candidate.wait_ms), milliseconds(candidate.cost_ms)


# --- what routers tell each other


class Share(Row):
    """The load that a request puts on one worker."""

    incarnation: str
    num_tokens: Figure
    """Prompt tokens that it will compute."""
    num_blocks: Figure
    """KV blocks that it will hold."""


class InFlightReservation(Row):
    """Load that a router has just sent to workers: all routers learn of it, so that two do not choose one worker."""

    request_id: str
    shares: Annotated[tuple[Share, ...], Meta(min_length=1, max_length=2)]
    """The decode worker's first, then the prefill worker's, if there is one."""
    session: str = ""


# --- reports of a worker to the routers that watch it

MAX_HASHES_PER_REPORT = 8192


class WorkerLoad(FrozenRow, frozen=True):
    """How busy one worker is. A figure that a worker of an earlier version does not send is 0."""

    num_running: Figure = 0
    """Sequences in the engine's batch."""
    num_waiting: Figure = 0
    """Sequences that wait for a place in it."""
    waiting_prefill_tokens: Figure = 0
    """Prompt tokens still to be computed here."""
    used_blocks: Figure = 0
    cached_blocks: Figure = 0
    num_blocks: Figure = 0
    num_tickets: Figure = 0
    """Prompts queued for prefill here, claimed or not."""
    prefill_base_us: Figure = 0
    """Measured here, as are those below; 0 until there was something to measure. Of a step with prompt tokens, however few."""
    prefill_ns_per_token: Figure = 0
    decode_base_us: Figure = 0
    """Of a decode step with an empty cache."""
    decode_ns_per_block: Figure = 0
    """What one more held block adds to a decode step."""
    handoff_ns_per_token: Figure = 0
    """For KV received from prefill workers."""
    mean_output_tokens: Figure = 0
    """Of the sequences that finished here lately."""
    max_running: Figure = 0
    """Most sequences in the engine's batch; 0: the engine does not say."""
    num_measured: Figure = 0
    """Prompts that the measured figures are of, or sequences, whichever are more: few are believed less."""


class WorkerReport(FrozenRow, frozen=True):
    """One change of a worker's state. The first of a watch is the snapshot."""

    load: WorkerLoad
    stored: tuple[int, ...] = ()
    """Hashes of full prompt blocks whose KV is there now."""
    evicted: tuple[int, ...] = ()
    admitted: tuple[str, ...] = ()
    """Requests that the worker counts in its load by now, so that routers need not."""
    kept: tuple[str, ...] = ()
    """Those of `admitted` whose prompts it computes itself though there are prefill workers, which never report them."""
