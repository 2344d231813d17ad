"""Tickets and bulk messages from peer to peer, each end an object of its own.

The sending end has one outlet for each peer, opened when first needed, closed when the peer goes. What comes in is plain data, not yet
checked.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from meshserve.errors import PeerLost, ProtocolError
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.transport.bulk import BulkInlet, BulkOutlet
from meshserve.mesh.transport.tickets import MAX_TICKETS, TicketInlet, TicketOutlet
from meshserve.wire.frames import pack_body, unpack_body
from meshserve.wire.structs import plain

_log = logging.getLogger(__name__)

_BULK_OFFSET, _TICKETS_OFFSET = 1, 2
_RENEW_AFTER_S = 1.0
"""An outlet younger than this may just not be connected yet."""


def receive_tickets(mesh: Mesh, on_ticket: Callable[[Any], None]) -> TicketInlet:
    """Read this peer's tickets port, until the inlet is closed."""
    assert mesh.ports is not None

    def on_frames(frames: list[bytes]) -> None:
        for frame in frames:
            try:
                ticket = unpack_body(frame)
            except ProtocolError:
                mesh.counters.add("tickets_malformed")
                continue
            on_ticket(ticket)

    return TicketInlet(mesh.ports.tickets, on_frames)


class TicketSender:
    """Sends tickets to prefill peers."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._outlets: dict[str, TicketOutlet] = {}
        self._waiting: dict[str, list[tuple[bytes, Callable[[], None]]]] = {}
        """Tickets that leave at the end of the turn, each with what is called if it cannot."""
        mesh.subscribe(self._on_change)

    def connect(self, peer: str) -> None:
        """Have the outlet ready, so that the first ticket need not wait for a connection."""
        member = self._mesh.member(peer)
        if peer not in self._outlets and member is not None and member.linked_at is not None:
            host, port = member.linked_at
            self._outlets[peer] = TicketOutlet(self._mesh.factory, host, port + _TICKETS_OFFSET)

    def push_soon(self, peer: str, ticket: Any, on_not_sent: Callable[[], None]) -> None:
        """At the end of the turn, in one message with others for this peer. `on_not_sent` is called then if it takes none now."""
        if not self._waiting:
            self._mesh.turn.afterwards(self._push_all)
        self._waiting.setdefault(peer, []).append((pack_body(plain(ticket)), on_not_sent))

    def _push_all(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for peer, tickets in waiting.items():
            for first in range(0, len(tickets), MAX_TICKETS):
                part = tickets[first : first + MAX_TICKETS]
                if not self._push(peer, [data for data, _ in part]):
                    for _, on_not_sent in part:
                        on_not_sent()

    def _push(self, peer: str, tickets: list[bytes]) -> bool:
        try:
            self.connect(peer)
        except Exception:  # no more sockets, say: the others' tickets must leave all the same
            _log.exception("no connection for tickets to %s", self._mesh.name_of(peer))
        outlet = self._outlets.get(peer)
        if outlet is None or outlet.push_nowait(tickets):
            return outlet is not None
        if time.monotonic() - outlet.made_s > _RENEW_AFTER_S:
            self._drop(peer)  # its one connection is gone, or stuck: the next ticket goes over a new one
        return False

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
            outlet.close()

    def close(self) -> None:
        """Close all sockets; tickets that wait are lost."""
        self._waiting.clear()
        for incarnation in list(self._outlets):
            self._drop(incarnation)


def receive_bulk(
    mesh: Mesh, on_bulk: Callable[[Any, list[memoryview], Callable[[Any], None]], None]
) -> BulkInlet:
    """Read this peer's bulk port, until the inlet is closed.

    `on_bulk` gets a header, payloads, and a function that sends an answer back to where they came from. It
    may raise ProtocolError.
    """
    assert mesh.ports is not None

    def on_frames(sender: bytes, header: bytes, payloads: list[memoryview]) -> None:
        try:
            on_bulk(unpack_body(header), payloads, lambda answer: inlet.answer(sender, pack_body(plain(answer))))
        except ProtocolError:
            mesh.counters.add("bulk_malformed")

    inlet = BulkInlet(mesh.ports.bulk, on_frames)
    return inlet


class BulkSender:
    """Sends bulk messages. `on_answer` gets a peer and its answer, `on_lost` a peer whose connection broke, and why."""

    def __init__(self, mesh: Mesh, on_answer: Callable[[str, Any], None], on_lost: Callable[[str, str], None]) -> None:
        self._mesh, self._on_answer, self._on_lost = mesh, on_answer, on_lost
        self._outlets: dict[str, BulkOutlet] = {}
        mesh.subscribe(self._on_change)

    def send(self, peer: str, header: Any, payloads: list[bytes]) -> None:
        """One message to a peer. Raises PeerLost if it is not there."""
        outlet = self._outlets.get(peer) or self._connect(peer)
        outlet.send(pack_body(plain(header)), payloads)

    def _connect(self, peer: str) -> BulkOutlet:
        member = self._mesh.member(peer)
        if member is None or member.linked_at is None:
            raise PeerLost("no bulk connection", peer=self._mesh.name_of(peer))
        host, port = member.linked_at

        def on_answer(data: bytes) -> None:
            try:
                self._on_answer(peer, unpack_body(data))
            except ProtocolError:
                self._mesh.counters.add("bulk_malformed")

        def on_lost(reason: str) -> None:
            self._outlets.pop(peer, None)
            self._on_lost(peer, reason)

        outlet = self._outlets[peer] = BulkOutlet(self._mesh.factory, host, port + _BULK_OFFSET, on_answer, on_lost)
        return outlet

    def _on_change(self, change: Change, member: Member) -> None:
        if change in (Change.DIED, Change.LEFT) and member.info.incarnation in self._outlets:
            self._outlets.pop(member.info.incarnation).close()

    def close(self) -> None:
        """Close all sockets."""
        for outlet in self._outlets.values():
            outlet.close()
        self._outlets.clear()
