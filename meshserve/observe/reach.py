"""What a peer tells `doctor` of the network around it: to which peers it can connect, and which announcements it hears.

A peer knocks only at addresses that it would dial anyway, and at most every two seconds: so nobody can use
it to scan a network.
"""

import asyncio
import time

from meshserve.errors import MeshserveError
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.interfaces import local_addresses, without_spare
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.network import Outcome, knock
from meshserve.wire.hello import MAX_LISTED, NetworkView, PortKnock, PortKnocks
from meshserve.wire.messages import ECHO, MAX_ECHO_BYTES, REACH, VIEW
from meshserve.wire.structs import replace

PORT_NAMES = ("calls", "bulk", "tickets")
"""By offset from a peer's first port."""

_KNOCK_TIMEOUT_S = 1.0
_KEEP_S = 2.0
_MAX_PLACES, _MAX_ADDRESSES, _MAX_AT_ONCE = 64, 8, 64
_OUTCOMES = frozenset(Outcome)

Place = tuple[str, str, tuple[str, ...], int]
"""Incarnation, name or nothing, addresses, first port: as `Membership.places` gives them."""


async def knock_at(places: list[Place]) -> list[PortKnock]:
    """Try to connect to the calls port of every address, and to the other ports of each peer's first address at
    which that port is open. Takes two seconds at most."""
    limit = asyncio.Semaphore(_MAX_AT_ONCE)

    async def one(place: Place, address: str, offset: int) -> PortKnock:
        target, name, _, port = place
        async with limit:
            outcome = (await knock(address, port + offset, _KNOCK_TIMEOUT_S)).outcome
        return PortKnock(target, address, port, offset, outcome, name)

    async def all_of(place: Place) -> list[PortKnock]:
        calls = list(await asyncio.gather(*(one(place, address, 0) for address in place[2][:_MAX_ADDRESSES])))
        opened = next((found.address for found in calls if found.outcome == Outcome.OPEN), None)
        if opened is None:
            return calls
        return calls + list(await asyncio.gather(*(one(place, opened, offset) for offset in range(1, len(PORT_NAMES)))))

    found = await asyncio.gather(*map(all_of, places[:_MAX_PLACES]))
    return [one_knock for knocks in found for one_knock in knocks]


class Reach:
    """Serves the questions that `doctor` asks every peer."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._running: asyncio.Task[list[PortKnock]] | None = None
        self._began_s = float("-inf")
        mesh.serve_async(REACH, self._on_reach)
        mesh.serve(VIEW, self._on_view)
        mesh.serve(ECHO, lambda call: call.end(call.body))

    async def _on_reach(self, call: IncomingCall) -> PortKnocks:
        """All calls within two seconds share one round of knocks, which goes on if one of them is cancelled."""
        now_s = time.monotonic()
        if self._running is None or now_s - self._began_s > _KEEP_S:
            self._began_s = now_s
            self._running = self._mesh.tasks.spawn(knock_at(self._mesh.links.membership.places()))
        return PortKnocks(await asyncio.shield(self._running))

    def _on_view(self, call: IncomingCall) -> None:
        links = self._mesh.links
        heard = [incarnation for incarnation, said in links.sightings.announcements.items() if said.mesh == self._mesh.own.mesh]
        interfaces = [f"{local.address}/{local.prefix}" for local in without_spare(local_addresses()) if local.prefix]
        linked = [member.info.incarnation for member in links.membership.listed() if member.is_callable]
        listed, linked_to, heard_of = (tuple(found[:MAX_LISTED]) for found in (interfaces, linked, heard))
        call.end(NetworkView(listed, links.search.mdns, heard_of, linked_to, time.time()))


async def ask_view(mesh: Mesh, peer: str, timeout_s: float) -> tuple[NetworkView, float] | None:
    """The peer's view of its network, and the offset of its wall clock to ours in seconds; None without an answer."""
    began_s = time.time()
    try:
        view: NetworkView = await mesh.call(peer, VIEW, None, timeout_s)
    except MeshserveError:
        return None
    return view, view.clock_s - (began_s + time.time()) / 2


async def ask_reach(mesh: Mesh, peer: str, timeout_s: float) -> list[PortKnock] | None:
    """The outcomes of the peer's knocks; None without a proper answer."""
    try:
        answer: PortKnocks = await mesh.call(peer, REACH, None, timeout_s)
        return [found if found.outcome in _OUTCOMES else replace(found, outcome=Outcome.UNREACHABLE) for found in answer.knocks]
    except MeshserveError:
        return None


async def carries_large_messages(mesh: Mesh, peer: str, timeout_s: float) -> bool:
    """Whether a message of many packets gets there and back: not where a path's MTU is smaller than its ends believe."""
    payload = bytes(MAX_ECHO_BYTES)
    try:
        return bool(await mesh.call(peer, ECHO, payload, timeout_s) == payload)
    except MeshserveError:
        return False
