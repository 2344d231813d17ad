"""One prompt on a prefill worker, from its claim, or its beginning on an offer, to its delivery."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, Protocol

from meshserve.engines.protocol import KVBlock
from meshserve.errors import Gone, MeshserveError
from meshserve.handoff.queue import JobKey
from meshserve.handoff.sending import Transfer
from meshserve.mesh.calls import OutgoingCall
from meshserve.telemetry import Counters
from meshserve.wire.handoff import Ticket


class ClaimedPrompts(Protocol):
    """Who owns these prompts, and is told what becomes of them: the provider."""

    counters: Counters

    def granted(self, job: "ClaimedPrompt", item: Any) -> None:
        """Its claim was granted this task."""

    def delivered(self, job: "ClaimedPrompt") -> None:
        """The decode worker has all blocks."""

    def ended(self, job: "ClaimedPrompt", outcome: str) -> None:
        """Its claim ended otherwise."""

    def computed(self, job: "ClaimedPrompt", blocks: list[KVBlock]) -> None:
        """The engine gives out blocks."""

    def all_computed(self, job: "ClaimedPrompt", num_cached_tokens: int) -> None:
        """The engine has given out all."""

    def engine_failed(self, job: "ClaimedPrompt") -> None:
        """The engine cannot."""


@dataclass(slots=True)
class ClaimedPrompt:
    """One claimed prompt, as the sink of both its claim and its engine run."""

    provider: "ClaimedPrompts"
    ticket: Ticket
    call: OutgoingCall | None = None
    transfer: Transfer | None = None
    """Once it is granted."""
    attempt: int = 0
    """Of what the engine has; 0 before that."""
    engine_id: str = ""
    began_s: float = 0.0
    num_tokens: int = 0
    """Of the prompt, once it is known."""
    prefix_hashes: list[int] = field(default_factory=list)
    """Of its blocks, see :func:`~meshserve.kv.hashes.prefix_hashes`."""
    acknowledged_s: float = 0.0
    """When the decode worker last took in a block, or the first was computed."""
    is_granted: bool = False
    """The claim got its task. Until then, what was begun on an offer keeps its blocks."""
    has_failed: bool = False
    kept: list[KVBlock] = field(default_factory=list)
    """Blocks that are computed and not yet sent: index, tokens, payload."""
    waited_ms: float = 0.0
    """As an offer."""
    computed_ms: float = 0.0
    """From the beginning to the latest block."""
    num_delivered_bytes: int = 0
    """With the claim."""
    claim_timer: asyncio.TimerHandle | None = None

    @property
    def key(self) -> JobKey:
        return (self.ticket.decode_peer, self.ticket.request_id)

    # the claim's answers

    def on_item(self, item: Any) -> None:
        self.provider.granted(self, item)

    def on_end(self, value: Any) -> None:
        self.provider.delivered(self)

    def on_error(self, error: MeshserveError) -> None:
        self.provider.counters.add("claims_answered_gone" if isinstance(error, Gone) and not self.is_granted else "claims_lost")
        self.provider.ended(self, error.code)


class EngineSink:
    """The engine's view of a job: an engine's failure ends the claim, which tells the decode worker."""

    __slots__ = ("_job",)

    def __init__(self, job: ClaimedPrompt) -> None:
        self._job = job

    def on_blocks(self, blocks: list[KVBlock]) -> None:
        self._job.provider.computed(self._job, blocks)

    def on_prefilled(self, num_cached_tokens: int) -> None:
        self._job.provider.all_computed(self._job, num_cached_tokens)

    def on_prefill_failed(self, error: MeshserveError) -> None:
        self._job.provider.engine_failed(self._job)
