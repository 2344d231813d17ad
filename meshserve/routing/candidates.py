"""What routing knows of a worker, and what it answers."""

from dataclasses import dataclass, field
from typing import Any

from meshserve.errors import ProtocolError
from meshserve.wire.load import WorkerLoad


@dataclass(slots=True)
class Worker:
    """One worker as a router sees it: what it reported, and what was sent there since."""

    incarnation: str
    name: str
    load: WorkerLoad = field(default_factory=WorkerLoad)
    booked_tokens: int = 0
    """Uncached prompt tokens of requests that it has not reported yet."""
    num_booked: int = 0
    last_chosen: int = 0
    """The router's choice number at which it was last chosen: breaks ties, oldest first."""

    @property
    def num_sequences(self) -> int:
        """Running, waiting and on their way."""
        return self.load.num_running + self.load.num_waiting + self.num_booked


@dataclass(frozen=True, slots=True)
class Candidate:
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

    def to_wire(self) -> list[Any]:
        """Plain data for :meth:`from_wire`."""
        return [self.incarnation, self.peer, self.overlap_blocks, self.load, round(self.wait_ms, 3), round(self.cost_ms, 3), self.reason]

    @classmethod
    def from_wire(cls, data: Any) -> "Candidate":
        """Raises ProtocolError for anything else."""
        if not isinstance(data, list) or [type(part) for part in data] != [str, str, int, int, float, float, str]:
            raise ProtocolError("malformed candidate")
        return cls(*data)

    def for_receipt(self) -> dict[str, Any]:
        """As receipts show it."""
        return {
            "peer": self.peer,
            "overlap_blocks": self.overlap_blocks,
            "load": self.load,
            "wait_ms": self.wait_ms,
            "cost_ms": self.cost_ms,
            "reason": self.reason,
        }
