"""Tickets by PUSH and PULL: small notes to one peer or to several, which may be lost.

PUSH hands out eagerly and nothing is acknowledged (with two workers and one `kill -9`, 30 of 100
tasks were lost at default settings), so what goes through here are tickets and never the work
itself.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from meshserve.errors import ProtocolError
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.transport.reading import SocketReader
from meshserve.mesh.transport.sockets import TICKETS_OFFSET, endpoint
from meshserve.wire.frames import pack_body, unpack_body
from meshserve.wire.structs import plain

_log = logging.getLogger(__name__)

_MAX_READS_PER_TURN = 200
_MAX_TICKETS = 32
"""In one message, a frame each."""
_RENEW_AFTER_S = 1.0
"""A connection younger than this may just not be up yet."""


def receive_tickets(mesh: Mesh, on_ticket: Callable[[Any], None]) -> SocketReader:
    """Read this peer's tickets port, until the reader is closed. Tickets are plain data, not yet
    checked."""
    assert mesh.ports is not None

    def on_frames(frames: list[bytes]) -> None:
        for frame in frames:
            try:
                ticket = unpack_body(frame)
            except ProtocolError:
                mesh.counters.add("tickets_malformed")
                continue
            on_ticket(ticket)

    return SocketReader(mesh.ports.tickets, on_frames, None, _MAX_READS_PER_TURN, _MAX_TICKETS)


@dataclass(slots=True)
class _Outlet:
    """A PUSH socket to one peer."""

    socket: "zmq.Socket[bytes]"
    made_s: float


class TicketSender:
    """Sends tickets to prefill peers, over one socket for each, opened when first needed and closed
    when the peer goes."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._outlets: dict[str, _Outlet] = {}
        self._waiting: dict[str, list[tuple[bytes, Callable[[], None]]]] = {}
        """Tickets that leave at the end of the turn, each with what is called if it cannot."""
        mesh.subscribe(self._on_change)

    def connect(self, peer: str) -> None:
        """Have the socket ready, so that the first ticket need not wait for a connection."""
        member = self._mesh.member(peer)
        if peer not in self._outlets and member is not None and member.linked_at is not None:
            host, port = member.linked_at
            socket = self._mesh.factory.client_socket(zmq.PUSH)
            socket.connect(endpoint(host, port + TICKETS_OFFSET))
            self._outlets[peer] = _Outlet(socket, time.monotonic())

    def push_soon(self, peer: str, ticket: Any, on_not_sent: Callable[[], None]) -> None:
        """At the end of the turn, in one message with others for this peer. `on_not_sent` is called
        then if it takes none now."""
        if not self._waiting:
            self._mesh.turn.afterwards(self._push_all)
        self._waiting.setdefault(peer, []).append((pack_body(plain(ticket)), on_not_sent))

    def _push_all(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for peer, tickets in waiting.items():
            for first in range(0, len(tickets), _MAX_TICKETS):
                part = tickets[first : first + _MAX_TICKETS]
                if not self._push(peer, [data for data, _ in part]):
                    for _, on_not_sent in part:
                        on_not_sent()

    def _push(self, peer: str, tickets: list[bytes]) -> bool:
        try:
            self.connect(peer)
        except Exception:  # no more sockets, say: the others' tickets must leave all the same
            _log.exception("no connection for tickets to %s", self._mesh.name_of(peer))
        outlet = self._outlets.get(peer)
        if outlet is None:
            return False
        try:
            outlet.socket.send_multipart(tickets, zmq.NOBLOCK)
        except zmq.ZMQError:  # the connection is not up, or the peer takes no more
            if time.monotonic() - outlet.made_s > _RENEW_AFTER_S:
                self._drop(peer)  # gone, or stuck: the next ticket goes over a new connection
            return False
        return True

    def _on_change(self, change: Change, member: Member) -> None:
        incarnation = member.info.incarnation
        if change is Change.CALLABLE and "prefill" in member.info.roles:
            self._drop(incarnation)  # it may have come back at another address
            self.connect(incarnation)
        elif change in (Change.DIED, Change.LEFT):
            self._drop(incarnation)

    def _drop(self, incarnation: str) -> None:
        outlet = self._outlets.pop(incarnation, None)
        if outlet is not None:
            outlet.socket.close()

    def close(self) -> None:
        """Close all sockets; tickets that wait are lost."""
        self._waiting.clear()
        for incarnation in list(self._outlets):
            self._drop(incarnation)
