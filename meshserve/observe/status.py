"""The peers of the mesh with their states, as a list; and a line in the log for every peer that comes or goes."""

import asyncio
import itertools
import logging
from functools import partial
from typing import Any

from meshserve.errors import MeshserveError, ProtocolError
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.membership import Change, Member, PeerState
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.sightings import why_gone
from meshserve.mesh.transport.sockets import endpoint
from meshserve.observe.process import process_figures
from meshserve.observe.reach import Reach
from meshserve.observe.worker_report import WorkerReporter
from meshserve.telemetry import added_up, log_event
from meshserve.wire.hello import PeerInfo
from meshserve.wire.messages import STATUS
from meshserve.wire.observing import MAX_LISTED, PeerStatus, Silence
from meshserve.wire.structs import asdict

_log = logging.getLogger(__name__)

_TIMEOUT_S = 0.5


def serve_status(mesh: Mesh, reporter: WorkerReporter | None) -> None:
    """Answer questions about this peer and the network around it, and log which other peers come and go, from now on."""
    began_s = mesh.now_s()

    def on_status(call: IncomingCall) -> None:
        call.end(
            PeerStatus(
                up_s=round(mesh.now_s() - began_s, 3),
                load=asdict(reporter.load()) if reporter is not None else None,
                num_reached=sum(member.is_callable for member in mesh.links.membership.listed()),
                cannot_join=dict(itertools.islice(mesh.links.refused.items(), MAX_LISTED)),
                silent=_silent(mesh),
                counters=dict(mesh.counters.snapshot()),
                held=mesh.gauges.snapshot(),
                request_counts=[(*key, count) for key, count in mesh.request_counts.items()],
                process=process_figures(),
                calls_made=dict(mesh.calls.num_made()),
                calls_served=dict(mesh.calls.num_served()),
                histograms=mesh.histograms.snapshot(),
                histograms_by_worker=mesh.histograms.snapshot_parts(),
                **mesh.links.sightings.to_wire(mesh.now_s()),
            )
        )

    mesh.serve(STATUS, on_status)
    Reach(mesh)
    mesh.subscribe(partial(_log_change, mesh))


async def list_peers(mesh: Mesh) -> list[dict[str, Any]]:
    """All peers but observers, oldest first, with their states. A peer that does not answer in time is listed without one; last come
    those that only others know, as they do not answer our hello."""
    members = mesh.links.membership.listed()
    asked: list[tuple[PeerInfo, Member | None]] = [] if mesh.own.is_observer else [(mesh.own, None)]
    asked += [(member.info, member) for member in members]
    answers = await asyncio.gather(*(_ask(mesh, info.incarnation) for info, _ in asked))
    found = [_entry(mesh, info, member, *answer) for (info, member), answer in zip(asked, answers, strict=True)]
    found += _known_to_others(mesh, found)
    for entry in found:
        if "decode" in entry["roles"]:  # as all processors measured them, of what this worker served
            worker = entry["incarnation"]
            entry["latencies"] = added_up(peer["histograms_by_worker"].get(worker, {}) for peer in found)
    return found


def _silent(mesh: Mesh) -> list[Silence]:
    silent = [member for member in mesh.links.membership.listed() if member.state is PeerState.SUSPECT]
    return [
        Silence(
            incarnation=member.info.incarnation,
            name=member.shown_name,
            roles=list(member.info.roles),
            address=endpoint(member.info.addresses[0], member.info.port) if member.info.addresses else "",
            ago_s=round(mesh.now_s() - member.suspect_since_s, 3),
        )
        for member in silent[:MAX_LISTED]
    ]


def _known_to_others(mesh: Mesh, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    listed = {entry["incarnation"] for entry in found}
    missed = {said["incarnation"]: said for entry in found for said in entry["silent"] if said["incarnation"] not in listed}
    return [
        {
            **dict.fromkeys(("model", "model_hash", "kv_layout", "rtt_ms", "http", "latencies")),
            **asdict(PeerStatus()),
            **{name: said[name] for name in ("incarnation", "name", "roles", "address")},
            "state": PeerState.SUSPECT.value,
            "mesh": mesh.own.mesh,
            "since_s": said["ago_s"],
            "version": "",
            "addresses": [],
            "answered": False,
        }
        for said in missed.values()
    ]


async def _ask(mesh: Mesh, incarnation: str) -> tuple[PeerStatus, float | None]:
    """The answer, and the milliseconds that it took; None if there was none."""
    began_s = mesh.now_s()
    try:
        status = await mesh.call(incarnation, STATUS, None, _TIMEOUT_S)
    except ProtocolError:  # counted where it was read; the peer is there all the same
        status = PeerStatus()
    except MeshserveError:
        return PeerStatus(), None
    return status, (mesh.now_s() - began_s) * 1000


def _entry(mesh: Mesh, info: PeerInfo, member: Member | None, status: PeerStatus, rtt_ms: float | None) -> dict[str, Any]:
    state = "draining" if info.is_draining else (member.state.value if member is not None else "alive")
    host = member.shown_address if member is not None else info.addresses[0]
    return {
        "name": mesh.name_of(info.incarnation),
        "incarnation": info.incarnation,
        "roles": list(info.roles),
        "model": info.card.model if info.card else None,
        "model_hash": info.card.model_hash if info.card else None,
        "kv_layout": info.layout.fingerprint if info.layout else None,
        "address": endpoint(host, info.port),
        "state": state,
        "mesh": info.mesh,
        "since_s": _since_s(mesh, member, status),
        "rtt_ms": round(rtt_ms, 3) if rtt_ms is not None else None,
        "version": info.version,
        "http": info.http,
        "addresses": list(info.addresses),
        "answered": rtt_ms is not None,
        **asdict(status),
        "latencies": None,
    }


def _since_s(mesh: Mesh, member: Member | None, status: PeerStatus) -> float | None:
    """How long the peer has been in its state: a suspect since we miss it, any other since its start, by its own account or its hello."""
    if member is not None and member.state is PeerState.SUSPECT:
        return round(mesh.now_s() - member.suspect_since_s, 3)
    if status.up_s is None and member is not None:
        return round(mesh.now_s() - member.started_s, 3)
    return status.up_s


def _log_change(mesh: Mesh, change: Change, member: Member) -> None:
    info, name = member.info, member.shown_name
    address = endpoint(info.addresses[0], info.port) if info.addresses else ""
    cut = "lost its connection" if member.was_cut else "is silent"
    words = {
        Change.JOINED: ("peer_joined", f"joined: {','.join(info.roles)} at {address}"),
        Change.SUSPECTED: ("peer_suspect", f"{cut}: it gets no new work until it is back"),
        Change.RECOVERED: ("peer_back", "is back"),
        Change.LEFT: ("peer_left", "left"),
        Change.DIED: ("peer_died", f"died: {why_gone(change, member)}"),
    }
    if change is Change.JOINED and info.name == mesh.own.name:  # the other one hears of this peer, and warns too
        text = f"another peer is called {name.partition('~')[0]} too, at {address}: give one of the two another --name"
        log_event(_log, "peer_twin", text, logging.WARNING, peer=name, incarnation=info.incarnation, address=address)
    if change in words:
        event, said = words[change]
        log_event(_log, event, f"{name} {said}", peer=name, incarnation=info.incarnation, address=address)
