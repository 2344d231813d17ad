"""What a worker reports of itself to the routers that watch it."""

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from meshserve.errors import ProtocolError

MAX_HASHES_PER_REPORT = 8192
MAX_FIGURE = 2**40
"""Beyond any real load. Sums and products of such figures still fit on the wire, where an integer has 64 bits."""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How busy one worker is."""

    num_running: int = 0
    """Sequences in the engine's batch."""
    num_waiting: int = 0
    """Sequences that wait for a place in it."""
    waiting_prefill_tokens: int = 0
    """Prompt tokens still to be computed here."""
    used_blocks: int = 0
    cached_blocks: int = 0
    num_blocks: int = 0
    num_tickets: int = 0
    """Prompts queued for prefill here, claimed or not."""
    prefill_base_us: int = 0
    """Measured here, as are those below; 0 until there was something to measure. Of a step with prompt tokens, however few."""
    prefill_ns_per_token: int = 0
    decode_base_us: int = 0
    """Of a decode step with an empty cache."""
    decode_ns_per_block: int = 0
    """What one more held block adds to a decode step."""
    handoff_ns_per_token: int = 0
    """For KV received from prefill workers."""
    mean_output_tokens: int = 0
    """Of the sequences that finished here lately."""
    max_running: int = 0
    """Most sequences in the engine's batch; 0: the engine does not say."""

    def to_wire(self) -> list[int]:
        """Plain data for :meth:`from_wire`."""
        return list(_figures_of(self))

    @classmethod
    def from_wire(cls, data: Any) -> "WorkerLoad":
        """Later versions may send more numbers; fewer, or what no worker could mean, raise ProtocolError."""
        figures = data[:_NUM_FIGURES] if isinstance(data, list) else []
        if len(figures) < _NUM_FIGURES or set(map(type, figures)) != {int} or min(figures) < 0 or max(figures) >= MAX_FIGURE:
            raise ProtocolError("malformed load")
        return cls(*figures)


_NAMES = [field.name for field in fields(WorkerLoad)]
_NUM_FIGURES = len(_NAMES)
_figures_of = attrgetter(*_NAMES)


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One change of a worker's state. The first of a watch is the snapshot."""

    load: WorkerLoad
    stored: tuple[int, ...] = ()
    """Hashes of full prompt blocks whose KV is there now."""
    evicted: tuple[int, ...] = ()
    admitted: tuple[str, ...] = ()
    """Requests that the worker counts in its load by now, so that nobody else need."""
    kept: tuple[str, ...] = ()
    """Of these, those whose prompts it computes itself though there are prefill workers: no prefill worker is going to report them."""

    def to_wire(self) -> list[Any]:
        """Plain data for :meth:`from_wire`."""
        return [self.load.to_wire(), list(self.stored), list(self.evicted), list(self.admitted), list(self.kept)]

    @classmethod
    def from_wire(cls, data: Any) -> "WorkerReport":
        """Raises ProtocolError for anything else. Workers of an earlier minor version do not say what they kept."""
        if not isinstance(data, list) or len(data) < 4 or not all(isinstance(part, list) for part in data[:5]):
            raise ProtocolError("malformed worker report")
        load, stored, evicted, admitted, kept = data[:5] if len(data) > 4 else (*data, [])
        if not {int}.issuperset(map(type, stored)) or not {int}.issuperset(map(type, evicted)):
            raise ProtocolError("block hashes are integers")
        if not {str}.issuperset(map(type, admitted)) or not {str}.issuperset(map(type, kept)):
            raise ProtocolError("request ids are strings")
        return cls(WorkerLoad.from_wire(load), tuple(stored), tuple(evicted), tuple(admitted), tuple(kept))
