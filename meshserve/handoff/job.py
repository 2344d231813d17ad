"""A prefill job, as the queue and the sender of blocks know it: plain data. The other end of :mod:`meshserve.handoff.task`."""

from dataclasses import dataclass, field
from enum import StrEnum

from meshserve.handoff.blocks import BlockWindow
from meshserve.wire.handoff import Ticket

JobKey = tuple[str, str]
"""Decode worker and request: ids are unique at one decode worker, and need not be beyond."""


class JobState(StrEnum):
    """Where a job stands. Before its first state there is only a ticket, which waits in the queue."""

    CLAIMING = "claiming"
    """The claim is on its way; nothing is known but the ticket."""
    COMPUTING = "computing"
    """The engine has the prompt, in its own queue or in a step; blocks leave as they are ready."""
    SENDING = "sending"
    """All is computed; blocks are still on their way."""
    DELIVERED = "delivered"
    """All blocks went with the claim itself, and nothing is held here any more; its answer is to come."""
    OVER = "over"
    """Done, or given up."""


@dataclass(slots=True, eq=False)
class Job:
    """One prompt from its claim, or its beginning on an offer, to its end.

    :class:`~meshserve.handoff.provider.PrefillJob` adds the claim's stream and the engine's run.
    """

    ticket: Ticket
    state: JobState = JobState.CLAIMING
    attempt: int = 0
    """The ticket's, then that of the granted claim."""
    is_granted: bool = False
    """The claim got its task. Until then, the blocks of what was begun on an offer stay here."""
    prefix_hashes: list[int] = field(default_factory=list)
    """Of the prompt's blocks, see :func:`~meshserve.kv.pool.prefix_hashes`."""
    window: BlockWindow | None = None
    """Blocks that are computed, or on their way; None before the engine got the prompt, and once the decode worker cannot be reached."""
    layout: str = ""
    """Fingerprint of the KV layout that they have."""
    computed_ms: float = 0.0
    """From the beginning to the latest block."""
    is_in_line: bool = False
    """For sending a message."""

    def __post_init__(self) -> None:
        self.attempt = self.ticket.attempt

    def is_running(self, attempt: int) -> bool:
        """Whether this very attempt has begun here and has not ended."""
        return self.attempt == attempt and self.state not in (JobState.CLAIMING, JobState.OVER)

    @property
    def key(self) -> JobKey:
        """Its name in the queue."""
        return self.ticket.decode_peer, self.ticket.request_id
