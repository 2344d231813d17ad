"""What a decode worker learns of a prefill task that is over."""

from dataclasses import dataclass
from typing import Any

from meshserve.engines.protocol import Reservation
from meshserve.handoff.task import TaskState


@dataclass(slots=True)
class HandoffResult:
    """How a prefill task ended, for the generation that waits for it and for the receipt."""

    state: TaskState
    reservation: Reservation | None
    """The prompt's KV, if the state is `done`."""
    prefill_peer: str | None
    """Incarnation of the worker whose blocks these are."""
    attempts: list[dict[str, Any]]
    lost_peers: list[str]
    num_blocks: int
    num_bytes: int
    num_tokens: int
    """Of the prompt, whose KV came from elsewhere."""
    queue_ms: float
    """From the first ticket to the claim that succeeded."""
    prefill_ms: float
    """Of the engine that computed the blocks, by its own clock."""
    transfer_ms: float
    """From that claim to the last block, less what was computing."""
