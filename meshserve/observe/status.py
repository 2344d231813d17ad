"""Who is in the mesh: what every peer says of itself when asked, in one list."""

import asyncio
import itertools
import math
from typing import Any

from meshserve.errors import MeshserveError
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.membership import Member, PeerState
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.transport.sockets import endpoint
from meshserve.observe.reach import Reach
from meshserve.observe.worker_report import WorkerReporter
from meshserve.telemetry import BUCKETS_S, added_up
from meshserve.wire.hello import PeerInfo
from meshserve.wire.messages import STATUS

_TIMEOUT_S = 0.5
_MAX_LISTED = 32
_COUNTS = ("counters", "held", "calls_made", "calls_served")
"""What was counted; what is held now, by who holds it; streams that are open now, by method, watches among them."""
_STRANGER_FIELDS = {"who": str, "reason": str, "times": int, "ago_s": (int, float)}
_GONE_FIELDS = {"incarnation": str, "name": str, "address": str, "reason": str, "ago_s": (int, float)}


def serve_status(mesh: Mesh, reporter: WorkerReporter | None) -> None:
    """Answer questions about this peer."""
    began_s = mesh.now_s()

    def on_status(call: IncomingCall) -> None:
        load = reporter.load() if reporter is not None else None
        reached = sum(member.is_callable for member in mesh.links.membership.listed())
        call.end(
            {
                "up_s": round(mesh.now_s() - began_s, 3),
                "load": _load(load) if load else None,
                "num_reached": reached,
                "cannot_join": dict(itertools.islice(mesh.links.refused.items(), _MAX_LISTED)),
                **mesh.links.sightings.to_wire(mesh.now_s()),
                "counters": dict(mesh.counters.snapshot()),
                "held": mesh.gauges.snapshot(),
                "calls_made": dict(mesh.calls.num_made()),
                "calls_served": dict(mesh.calls.num_served()),
                "histograms": mesh.histograms.snapshot(),
                "histograms_by_worker": mesh.histograms.snapshot_parts(),
            }
        )

    def _load(load: Any) -> dict[str, int]:
        return {name: getattr(load, name) for name in load.__struct_fields__}

    mesh.serve(STATUS, on_status)
    Reach(mesh)


async def list_peers(mesh: Mesh) -> list[dict[str, Any]]:
    """All peers but observers, oldest first, with what they say of themselves; those that do not answer are listed all the same."""
    members = mesh.links.membership.listed()
    own = [] if mesh.own.is_observer else [mesh.own]
    infos = own + [member.info for member in members]
    answers = await asyncio.gather(*(_ask(mesh, info.incarnation) for info in infos))
    by_incarnation = {member.info.incarnation: member for member in members}
    found = [_entry(mesh, info, by_incarnation.get(info.incarnation), answer) for info, answer in zip(infos, answers, strict=True)]
    for entry in found:
        if "decode" in entry["roles"]:
            entry["latencies"] = _latencies(entry["incarnation"], found)
    return found


def _latencies(worker: str, peers: list[dict[str, Any]]) -> dict[str, Any]:
    """As every processor measured them of what this worker served, in all."""
    return added_up(peer["histograms_by_worker"].get(worker, {}) for peer in peers)


async def _ask(mesh: Mesh, incarnation: str) -> tuple[dict[str, Any], float | None]:
    began_s = mesh.now_s()
    try:
        answer = await mesh.call(incarnation, STATUS, None, _TIMEOUT_S)
    except MeshserveError:
        return {}, None
    if not _is_status(answer):
        mesh.counters.add("answers_malformed")
        answer = {}
    return answer, (mesh.now_s() - began_s) * 1000


def _is_status(answer: Any) -> bool:
    """What others send is checked here, once, so that one peer cannot spoil what is shown of all."""
    if not isinstance(answer, dict) or not _are_histograms(answer.get("histograms", {})):
        return False
    by_worker = answer.get("histograms_by_worker", {})
    if not isinstance(by_worker, dict) or not all(isinstance(worker, str) for worker in by_worker):
        return False
    if not _are_entries(answer.get("refused", []), _STRANGER_FIELDS) or not _are_entries(answer.get("gone", []), _GONE_FIELDS):
        return False
    cannot_join = answer.get("cannot_join", {})
    if not isinstance(cannot_join, dict) or not all(isinstance(part, str) for item in cannot_join.items() for part in item):
        return False
    numbers = [answer.get("load") or {}, *(answer.get(name, {}) for name in _COUNTS)]
    return all(map(_are_counts, numbers)) and all(map(_are_histograms, by_worker.values()))


def _are_counts(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(name, str) and type(count) is int for name, count in data.items())


def _are_entries(data: Any, expected: dict[str, Any]) -> bool:
    if not isinstance(data, list) or len(data) > _MAX_LISTED:
        return False
    return all(isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in expected.items()) for entry in data)


def _are_histograms(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(name, str) and _is_histogram(entry) for name, entry in data.items())


def _is_histogram(data: Any) -> bool:
    if not isinstance(data, list) or len(data) != 2 or type(data[0]) is not float or not math.isfinite(data[0]):
        return False
    counts = data[1]
    return isinstance(counts, list) and len(counts) == len(BUCKETS_S) + 1 and all(type(count) is int for count in counts)


def _entry(mesh: Mesh, info: PeerInfo, member: Member | None, answer: tuple[dict[str, Any], float | None]) -> dict[str, Any]:
    status, rtt_ms = answer
    state = "draining" if info.is_draining else (member.state.value if member is not None else "alive")
    host = member.linked_at[0] if member is not None and member.linked_at else info.addresses[0]
    return {
        "name": mesh.name_of(info.incarnation),
        "incarnation": info.incarnation,
        "roles": list(info.roles),
        "model": info.card.model if info.card else None,
        "address": endpoint(host, info.port),
        "state": state,
        "mesh": info.mesh,
        "load": status.get("load"),
        "since_s": _since_s(mesh, member, status),
        "rtt_ms": round(rtt_ms, 3) if rtt_ms is not None else None,
        "up_s": status.get("up_s"),
        "num_reached": status.get("num_reached"),
        "version": info.version,
        "http": info.http,
        "addresses": list(info.addresses),
        **{name: status.get(name, {}) for name in _COUNTS},
        "histograms": status.get("histograms", {}),
        "histograms_by_worker": status.get("histograms_by_worker", {}),
        "latencies": None,
        "refused": status.get("refused", []),
        "gone": status.get("gone", []),
        "cannot_join": status.get("cannot_join", {}),
    }


def _since_s(mesh: Mesh, member: Member | None, status: dict[str, Any]) -> float | None:
    """How long it has been in its state: a suspect since we miss it, any other since its start, by its own account or by its hello."""
    if member is not None and member.state is PeerState.SUSPECT:
        return round(mesh.now_s() - member.suspect_since_s, 3)
    up_s = status.get("up_s")
    if up_s is None and member is not None:
        up_s = round(mesh.now_s() - member.started_s, 3)
    return up_s if isinstance(up_s, (int, float)) else None
