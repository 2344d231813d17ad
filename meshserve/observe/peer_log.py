"""A line in the log for every peer that comes, goes, falls silent or speaks again."""

import logging

from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.sightings import why_gone
from meshserve.mesh.transport.sockets import endpoint
from meshserve.telemetry import log_event

_log = logging.getLogger(__name__)

_EVENTS = {
    Change.JOINED: "peer_joined",
    Change.SUSPECTED: "peer_suspect",
    Change.RECOVERED: "peer_back",
    Change.LEFT: "peer_left",
    Change.DIED: "peer_died",
}


def log_changes(mesh: Mesh) -> None:
    """From now on."""
    mesh.subscribe(_on_change)


def _on_change(change: Change, member: Member) -> None:
    event = _EVENTS.get(change)
    if event is None:
        return
    info = member.info
    address = endpoint(info.addresses[0], info.port) if info.addresses else ""
    log_event(_log, event, _words(change, member, address), peer=member.shown_name, incarnation=info.incarnation, address=address)


def _words(change: Change, member: Member, address: str) -> str:
    name = member.shown_name
    if change is Change.JOINED:
        return f"{name} joined: {','.join(member.info.roles)} at {address}"
    if change is Change.SUSPECTED:
        return f"{name} {'lost its connection' if member.was_cut else 'is silent'}: it gets no new work until it is back"
    if change is Change.RECOVERED:
        return f"{name} is back"
    return f"{name} left" if change is Change.LEFT else f"{name} died: {why_gone(change, member)}"
