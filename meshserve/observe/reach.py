"""What a peer finds out for others about the network around it: whom it can connect to, and what it hears.

It knocks only at addresses that it would dial anyway, those of members and of peers that it was told of, at most every two seconds,
whoever asks: so it cannot be used to scan anything.
"""

import asyncio
import contextlib
import ipaddress
import time
from dataclasses import dataclass
from typing import Any

from meshserve.errors import InvalidRequest, MeshserveError, ProtocolError
from meshserve.mesh.addresses import local_addresses
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.probing import Outcome, knock

REACH_METHOD, VIEW_METHOD, ECHO_METHOD = "mesh.reach", "mesh.view", "mesh.echo"

MAX_ECHO_BYTES = 65_536
PORT_NAMES = ("calls", "bulk", "tickets")
"""By offset from a peer's first port."""

_KNOCK_TIMEOUT_S = 1.0
_KEEP_S = 2.0
_MAX_PLACES, _MAX_ADDRESSES, _MAX_AT_ONCE = 64, 8, 64
_MAX_KNOCKS = _MAX_PLACES * (_MAX_ADDRESSES + 2)
_MAX_LISTED = 512
_OUTCOMES = frozenset(Outcome)


@dataclass(frozen=True, slots=True)
class PortKnock:
    """One attempt to connect to a peer's port."""

    target: str
    """Incarnation."""
    address: str
    port: int
    offset: int
    """0, 1, 2: as in `PORT_NAMES`."""
    outcome: str
    name: str = ""
    """Of the target, if it said hello to the one who knocks; else that one only heard of it."""

    def to_wire(self) -> list[Any]:
        """Plain data for :meth:`from_wire`."""
        return [self.target, self.address, self.port, self.offset, self.outcome, self.name]

    @classmethod
    def from_wire(cls, data: Any) -> "PortKnock":
        """Raises ProtocolError for anything else."""
        if not isinstance(data, list) or [type(part) for part in data[:6]] != [str, str, int, int, str, str]:
            raise ProtocolError("malformed knock")
        target, address, port, offset, outcome, name = data[:6]
        if not 0 <= offset < len(PORT_NAMES):
            raise ProtocolError("malformed knock")
        return cls(target[:64], address[:64], port, offset, outcome if outcome in _OUTCOMES else Outcome.UNREACHABLE, name[:255])


Place = tuple[str, str, tuple[str, ...], int]
"""Incarnation, name or nothing, addresses, first port: as `Membership.places` gives them."""


async def knock_at(places: list[Place]) -> list[PortKnock]:
    """At the calls port of every address, and where that is open at the other two of the first such address. Takes two seconds at most."""
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
    """Serves what `doctor` asks of every peer."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._running: asyncio.Task[list[PortKnock]] | None = None
        self._began_s = float("-inf")
        mesh.serve_async(REACH_METHOD, self._on_reach)
        mesh.serve(VIEW_METHOD, self._on_view)
        mesh.serve(ECHO_METHOD, self._on_echo)

    async def _on_reach(self, call: IncomingCall) -> list[list[Any]]:
        """All who ask within two seconds share one round of knocks; that one of them hangs up changes nothing for the others."""
        now_s = time.monotonic()
        if self._running is None or now_s - self._began_s > _KEEP_S:
            self._began_s = now_s
            self._running = self._mesh.tasks.spawn(knock_at(self._mesh.links.membership.places()))
        return [found.to_wire() for found in await asyncio.shield(self._running)]

    def _on_view(self, call: IncomingCall) -> None:
        links = self._mesh.links
        heard = [incarnation for incarnation, said in links.sightings.announcements.items() if said.mesh == self._mesh.own.mesh]
        call.end(
            {
                "interfaces": [f"{local.address}/{local.prefix}" for local in local_addresses() if local.prefix][:_MAX_LISTED],
                "mdns": links.mdns,
                "heard": heard[:_MAX_LISTED],
                "linked": [member.info.incarnation for member in links.membership.listed() if member.is_callable][:_MAX_LISTED],
                "clock_s": time.time(),
            }
        )

    def _on_echo(self, call: IncomingCall) -> None:
        if not isinstance(call.body, bytes) or len(call.body) > MAX_ECHO_BYTES:
            raise InvalidRequest(f"an echo is up to {MAX_ECHO_BYTES} bytes")
        call.end(call.body)


@dataclass(frozen=True, slots=True)
class View:
    """What a peer says of the network around it."""

    interfaces: tuple[str, ...] = ()
    """Such as `192.168.1.10/24`."""
    mdns: str = "off"
    """`on`, `off`, or why it does not work."""
    heard: frozenset[str] = frozenset()
    """Incarnations of its mesh that mDNS told it of."""
    linked: frozenset[str] = frozenset()
    clock_offset_s: float = 0.0
    """Of its wall clock to ours."""

    @property
    def addresses(self) -> frozenset[str]:
        """Of its machine."""
        return frozenset(text.partition("/")[0] for text in self.interfaces)

    @property
    def networks(self) -> tuple[str, ...]:
        """That its machine is in, such as `192.168.1.0/24`."""
        found = []
        for text in self.interfaces:
            with contextlib.suppress(ValueError):
                found.append(str(ipaddress.ip_interface(text).network))
        return tuple(dict.fromkeys(found))


async def ask_view(mesh: Mesh, peer: str, timeout_s: float) -> View | None:
    """None if the peer does not answer, or nothing that can be read."""
    began_s = time.time()
    try:
        answer = await mesh.call(peer, VIEW_METHOD, None, timeout_s)
    except MeshserveError:
        return None
    middle_s = (began_s + time.time()) / 2
    lists = {key: answer.get(key) for key in ("interfaces", "heard", "linked")} if isinstance(answer, dict) else {}
    clock_s = answer.get("clock_s") if isinstance(answer, dict) else None
    are_lists = all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists.values())
    if not lists or not are_lists or not isinstance(clock_s, (int, float)) or not abs(clock_s) < 1e12:
        mesh.counters.add("views_malformed")
        return None
    interfaces, heard, linked = (tuple(texts or ())[:_MAX_LISTED] for texts in lists.values())
    return View(interfaces, str(answer.get("mdns"))[:200], frozenset(heard), frozenset(linked), float(clock_s) - middle_s)


async def ask_reach(mesh: Mesh, peer: str, timeout_s: float) -> list[PortKnock] | None:
    """What the peer's knocks met; None if it does not answer, or nothing that can be read."""
    try:
        answer = await mesh.call(peer, REACH_METHOD, None, timeout_s)
        return [PortKnock.from_wire(item) for item in answer[:_MAX_KNOCKS]] if isinstance(answer, list) else None
    except ProtocolError:
        mesh.counters.add("knocks_malformed")
    except MeshserveError:
        pass
    return None


async def carries_large_messages(mesh: Mesh, peer: str, timeout_s: float) -> bool:
    """Whether a message of many packets gets there and back: where a path's MTU is less than its ends believe, only small ones do."""
    payload = bytes(MAX_ECHO_BYTES)
    try:
        return bool(await mesh.call(peer, ECHO_METHOD, payload, timeout_s) == payload)
    except MeshserveError:
        return False
