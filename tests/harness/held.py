"""What a mesh holds at this moment, by what its peers say of themselves."""

from typing import Any

STANDING = frozenset(("worker.watch", "worker.load", "router.in_flight", "feed.watch", "mesh.status"))
"""Streams that last as long as their peers, and the one by which this was asked."""
_LOAD = ("num_running", "num_waiting", "waiting_prefill_tokens", "used_blocks", "num_tickets")
_NOT_HELD = frozenset(("http_connections", "tasks", "responses_kept", "responses_kept_bytes"))
"""The connections of the one who asks, tasks that last as long as their peers, and what is kept for later requests."""
_EXPECTED = {
    "frontend": frozenset(("http_requests", "admission_slots", "waiting_for_admission", "cancellable", "http_connections")),
    "processor": frozenset(("requests",)),
    "router": frozenset(("in_flight_reservations", "reserved_tokens")),
    "decode": frozenset(("sequences", "handoffs")),
    "prefill": frozenset(("tickets", "attempts")),
}
"""So that nothing counts as zero because nobody reports it."""


def held(peers: list[dict[str, Any]]) -> dict[str, int]:
    """All that is not at zero: blocks, sequences, queues, reservations and streams of every peer. `peers` is what `/mesh/peers` answers."""
    found: dict[str, int] = {}
    for peer in peers:
        assert peer["held"].keys() >= frozenset().union(*(_EXPECTED[role] for role in peer["roles"])), peer
        levels = {name: level for name, level in peer["held"].items() if name not in _NOT_HELD}
        levels |= {name: (peer["load"] or {}).get(name, 0) for name in _LOAD}
        levels |= {f"made {method}": count for method, count in peer["calls_made"].items() if method not in STANDING}
        levels |= {f"served {method}": count for method, count in peer["calls_served"].items() if method not in STANDING}
        found |= {f"{peer['name']}: {name}": level for name, level in levels.items() if level}
    return found
