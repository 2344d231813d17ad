"""For those that watch the mesh: a peer's state when asked, and its events."""

from typing import Annotated, Any, TypedDict

from meshserve.telemetry import BUCKETS_S, MAX_REQUEST_COUNTS
from meshserve.wire.structs import Count, FrozenMap, FrozenRow, Map, Meta, field

MAX_LISTED = 32
MAX_WORKERS = 1024
"""Of which one processor tells."""
MAX_EVENTS = 256
"""In one batch of the event feed."""
MAX_SAMPLES = 64
"""Times to the first token and between tokens, each, in one batch."""

_Finite = Annotated[float, Meta(ge=-1e15, le=1e15)]
_Buckets = Annotated[list[Count], Meta(min_length=len(BUCKETS_S) + 1, max_length=len(BUCKETS_S) + 1)]
_HistogramRows = dict[str, tuple[_Finite, _Buckets]]
"""By name, as `Histogram.to_row` makes them."""


_Label = Annotated[str, Meta(max_length=256)]
_RequestCounts = Annotated[list[tuple[_Label, Count, _Label, _Label, Count]], Meta(max_length=2 * MAX_REQUEST_COUNTS)]
"""Route, status, code, model, and how many."""


class Refusal(TypedDict):
    """A stranger that was not let in."""

    who: str
    reason: str
    times: int
    ago_s: _Finite


class Departure(TypedDict):
    """A peer that left or died."""

    incarnation: str
    name: str
    address: str
    reason: str
    ago_s: _Finite


class Silence(TypedDict):
    """A member that a peer does not hear any more, or cannot reach."""

    incarnation: str
    name: str
    roles: list[str]
    address: str
    ago_s: _Finite


class PeerStatus(Map, omit_defaults=False):
    """A peer's state as it reports it. A peer that does not answer has the defaults."""

    up_s: _Finite | None = None
    load: dict[str, int] | None = None
    """None on peers without an engine."""
    num_reached: int | None = None
    """Other peers that it can call."""
    cannot_join: Annotated[dict[str, str], Meta(max_length=MAX_LISTED)] = field(default_factory=dict)
    """Addresses that it tried in vain, with reasons."""
    refused: Annotated[list[Refusal], Meta(max_length=MAX_LISTED)] = field(default_factory=list)
    gone: Annotated[list[Departure], Meta(max_length=MAX_LISTED)] = field(default_factory=list)
    silent: Annotated[list[Silence], Meta(max_length=MAX_LISTED)] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    """The gauges."""
    calls_made: dict[str, int] = field(default_factory=dict)
    calls_served: dict[str, int] = field(default_factory=dict)
    """Streams that are open now, by method, watches among them."""
    request_counts: _RequestCounts = field(default_factory=list)
    """Of HTTP requests, on frontends."""
    process: dict[str, _Finite] = field(default_factory=dict)
    """Of the peer's process: `cpu_seconds`, `resident_memory_bytes` and more, by Prometheus' names without `process_`."""
    histograms: _HistogramRows = field(default_factory=dict)
    histograms_by_worker: dict[str, _HistogramRows] = field(default_factory=dict)


class ReceiptForm(Map):
    """Fields that a receipt must have to be shown. Receipts travel as plain data, which may have more."""

    request_id: str
    client_id: str
    model: str
    policy: str
    outcome: str
    traceparent: str
    peers: dict[str, Any]
    """Names, by role."""
    tokens: dict[str, int]
    kv: dict[str, int]
    total_ms: float
    phases_ms: dict[str, float]
    ended_ago_s: float
    candidates: list[dict[str, Any]]
    attempts: list[dict[str, Any]]
    prefill_candidates: list[dict[str, Any]] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    handoff: dict[str, Any] | None = None


# --- the event feed

_Text = Annotated[str, Meta(max_length=1024)]
_Scalar = _Text | int | _Finite | bool | None
_Map = Annotated[dict[str, _Scalar], Meta(max_length=32)]
_List = Annotated[list[_Scalar | _Map], Meta(max_length=1024)]


class FeedEvent(FrozenRow, frozen=True):
    """One step of a request that is followed."""

    age_ms: _Finite
    """When the batch left."""
    kind: _Text
    request_id: _Text
    details: Annotated[dict[str, _Scalar | _List], Meta(max_length=32)]


class FeedBatch(FrozenMap, frozen=True):
    """The events and counts of a peer since its last batch."""

    events: Annotated[list[FeedEvent], Meta(max_length=MAX_EVENTS)] = field(default_factory=list)
    counts: Annotated[dict[_Text, int], Meta(max_length=32)] = field(default_factory=dict)
    """Of all requests, followed or not."""
    ttft_ms: Annotated[list[_Finite], Meta(max_length=MAX_SAMPLES)] = field(default_factory=list)
    itl_ms: Annotated[list[_Finite], Meta(max_length=MAX_SAMPLES)] = field(default_factory=list)
    load: Annotated[dict[_Text, int], Meta(max_length=32)] | None = None
    """A worker's, if it changed."""
    latencies: Annotated[dict[_Text, dict[str, _Buckets]], Meta(max_length=MAX_WORKERS)] | None = None
    """By worker and name: all that the peer counts, if it is a processor and has more to tell."""

