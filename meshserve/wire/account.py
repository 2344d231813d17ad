"""What a decode worker says of one sequence: with its first tokens what was done by then, and with its end all of it."""

import math
from typing import Any, NamedTuple

from meshserve.wire.message import MAX_MS

_MAX_COUNT = 1 << 63


def milliseconds(value: Any) -> float:
    """What a peer says that something took; 0 for what no clock says."""
    if type(value) is float and 0.0 <= value < MAX_MS:
        return value
    return min(float(value), MAX_MS) if type(value) in (int, float) and math.isfinite(value) and value > 0 else 0.0


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < _MAX_COUNT else 0


class HandedOver(NamedTuple):
    """How a prompt's KV came from another worker, or why it did not."""

    prefill_peer: str | None
    """Incarnation of the worker whose blocks these are."""
    attempts: list[dict[str, Any]]
    num_blocks: int
    num_bytes: int

    @classmethod
    def from_wire(cls, data: Any) -> "HandedOver":
        """Of what cannot be read nothing is left; see :meth:`WorkerAccount.from_wire`."""
        if type(data) is cls:
            return data
        num_fields = len(cls._fields)
        row = data[:num_fields] if isinstance(data, (list, tuple)) and len(data) >= num_fields else (None, None, 0, 0)
        peer, attempts, num_blocks, num_bytes = row
        read = [attempt for attempt in attempts if isinstance(attempt, dict)] if isinstance(attempts, list) else []
        return cls(peer if isinstance(peer, str) else None, read, _count(num_blocks), _count(num_bytes))


class HandoffDecision(NamedTuple):
    """Where one prompt is prefilled, and by which figures."""

    is_handoff: bool
    reason: str
    """One of the few words of :mod:`meshserve.routing.handoff`."""
    local_ms: float | None = None
    """Expected time to the first token if the decode worker computes the prompt; None: not measured."""
    remote_ms: float | None = None
    """The same if the best prefill worker does."""

    @classmethod
    def from_wire(cls, data: Any) -> "HandoffDecision | None":
        """None for what cannot be read; see :meth:`WorkerAccount.from_wire`."""
        if type(data) is cls:
            return data
        if not isinstance(data, (list, tuple)) or len(data) < len(cls._fields):
            return None
        is_handoff, reason, local_ms, remote_ms = data[: len(cls._fields)]
        if type(is_handoff) is not bool or not isinstance(reason, str):
            return None
        return cls(is_handoff, reason, *(None if figure is None else milliseconds(figure) for figure in (local_ms, remote_ms)))


class WorkerAccount(NamedTuple):
    """Times are of the worker's monotonic clock, and 0 as long as they are not known. On the wire it is a row of these."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    kv_transfer_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0
    """Since the call came."""
    num_cached_tokens: int = 0
    handed_over: HandedOver | None = None
    """None for a prompt that was computed where it is decoded, and where it was said before."""
    decision: HandoffDecision | None = None
    """None for a short prompt that nobody could have prefilled elsewhere. Workers of an earlier minor version do not say it."""

    @classmethod
    def from_wire(cls, data: Any) -> "WorkerAccount":
        """An account serves people only: what cannot be read of it is taken for nothing, and costs nobody his answer."""
        if type(data) is cls:
            return data
        if not isinstance(data, (list, tuple)) or len(data) < _NUM_FIELDS:
            return NOTHING_SAID
        queue, prefill, kv_transfer, decode, total, num_cached, handed_over = data[:_NUM_FIELDS]
        decision = data[_NUM_FIELDS] if len(data) > _NUM_FIELDS else None
        return cls(
            milliseconds(queue),
            milliseconds(prefill),
            milliseconds(kv_transfer),
            milliseconds(decode),
            milliseconds(total),
            _count(num_cached),
            HandedOver.from_wire(handed_over) if handed_over is not None else None,
            HandoffDecision.from_wire(decision) if decision is not None else None,
        )


def handed_over_in(data: Any) -> HandedOver | None:
    """This alone of an account, for who read the rest in a later one: mostly there is none."""
    said = data[_NUM_FIELDS - 1] if isinstance(data, (list, tuple)) and len(data) >= _NUM_FIELDS else None
    return HandedOver.from_wire(said) if said is not None else None


NOTHING_SAID = WorkerAccount()
_NUM_FIELDS = WorkerAccount._fields.index("decision")
"""That every version sends."""
