"""Who is in the mesh: what every peer says of itself when asked, in one list."""

import asyncio
import math
from typing import Any

from meshserve.errors import MeshserveError
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.membership import Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.transport.sockets import endpoint
from meshserve.observe.worker_report import WorkerReporter
from meshserve.telemetry import BUCKETS_S
from meshserve.wire.hello import PeerInfo

_METHOD = "mesh.status"
_TIMEOUT_S = 0.5


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
                "counters": dict(mesh.counters.snapshot()),
                "histograms": mesh.histograms.snapshot(),
            }
        )

    def _load(load: Any) -> dict[str, int]:
        return {name: getattr(load, name) for name in load.__dataclass_fields__}

    mesh.serve(_METHOD, on_status)


async def list_peers(mesh: Mesh) -> list[dict[str, Any]]:
    """All peers but observers, oldest first, with what they say of themselves; those that do not answer are listed all the same."""
    members = mesh.links.membership.listed()
    own = [] if mesh.own.is_observer else [mesh.own]
    infos = own + [member.info for member in members]
    answers = await asyncio.gather(*(_ask(mesh, info.incarnation) for info in infos))
    by_incarnation = {member.info.incarnation: member for member in members}
    return [_entry(mesh, info, by_incarnation.get(info.incarnation), answer) for info, answer in zip(infos, answers, strict=True)]


async def _ask(mesh: Mesh, incarnation: str) -> tuple[dict[str, Any], float | None]:
    began_s = mesh.now_s()
    try:
        answer = await mesh.call(incarnation, _METHOD, None, _TIMEOUT_S)
    except MeshserveError:
        return {}, None
    if not _is_status(answer):
        mesh.counters.add("status_malformed")
        answer = {}
    return answer, (mesh.now_s() - began_s) * 1000


def _is_status(answer: Any) -> bool:
    """What others send is checked here, once, so that one peer cannot spoil what is shown of all."""
    if not isinstance(answer, dict) or not isinstance(answer.get("histograms", {}), dict):
        return False
    numbers = [answer.get("counters", {}), answer.get("load") or {}]
    return all(map(_are_counts, numbers)) and all(map(_is_histogram, answer.get("histograms", {}).values()))


def _are_counts(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(name, str) and type(count) is int for name, count in data.items())


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
        "rtt_ms": round(rtt_ms, 3) if rtt_ms is not None else None,
        "up_s": status.get("up_s"),
        "num_reached": status.get("num_reached"),
        "version": info.version,
        "http": info.http,
        "addresses": list(info.addresses),
        "counters": status.get("counters", {}),
        "histograms": status.get("histograms", {}),
    }
