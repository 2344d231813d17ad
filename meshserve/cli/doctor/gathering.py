"""Gathers the facts for `doctor`: of this machine, the network, and every peer's own view of it. Takes eight seconds at most."""

import asyncio
import socket
from dataclasses import replace

from meshserve.cli.doctor.multicast import ask_by_multicast
from meshserve.cli.doctor.path_mtu import probe_paths
from meshserve.cli.observing import settle
from meshserve.config import FIRST_PORT, PORTS_PER_PEER, MeshConfig
from meshserve.mesh.handshake import DialFailed
from meshserve.mesh.interfaces import choose_addresses, local_addresses, without_spare
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.network import Outcome, knock, parse_host_port, resolve, security_of
from meshserve.mesh.transport.reading import KEYS_DIFFER
from meshserve.observe.diagnosis.facts import Facts, Listener, PeerFacts, Stranger, is_loopback, place
from meshserve.observe.reach import ask_reach, ask_view, carries_large_messages, knock_at
from meshserve.observe.variants import serving
from meshserve.wire.hello import PeerInfo, PortKnock

_LAST_PORT = FIRST_PORT + 100
_MAX_OWN_ADDRESSES, _MAX_STRANGERS = 16, 32
_LOCAL_TIMEOUT_S, _KNOCK_TIMEOUT_S, _HELLO_TIMEOUT_S = 0.3, 0.8, 1.2
_VIEW_TIMEOUT_S, _REACH_TIMEOUT_S, _LARGE_TIMEOUT_S = 0.8, 2.4, 2.0
_LISTEN_S, _SETTLE_S, _GIVE_UP_S = 1.5, 0.5, 2.0
_GROW_S, _GROWN_S, _ASK_AGAIN_S = 1.5, 3.5, 0.25
_YOUNG_S = 3.0
"""An announcement takes a second or two, and as long again on a machine that is busy."""
_LARGE_AT_ONCE, _LARGE_AFTER_S = 8, 0.05
"""The question for a peer's knocks must be on its way before a long message, which may block the connection for good."""


async def gather(config: MeshConfig) -> Facts:
    """Look at everything, as an observer. Raises UsageError or KeyRefused."""
    own = without_spare(local_addresses())
    chosen = choose_addresses(config.interface, own)
    pinned = [local for local in own if local.address in chosen.advertised] if config.interface else own
    listeners = await _listeners(list(dict.fromkeys((*chosen.advertised, *(local.address for local in pinned)))))
    seeds = await _resolved(config.seeds)
    mesh = Mesh(replace(config, seeds=(*config.seeds, *_own_seeds(listeners))))
    await mesh.start()
    try:
        await mesh.join()
        speaking = [local for local in own if local.address in (*chosen.advertised, *chosen.mdns_interfaces)] if config.use_mdns else []
        multicast, _ = await asyncio.gather(
            ask_by_multicast(speaking, frozenset(local.address for local in own), _LISTEN_S),
            settle(mesh, _SETTLE_S, _GIVE_UP_S, least_s=_LISTEN_S if config.use_mdns else 0.0),
        )
        await _until_grown(mesh)
        return replace(
            await _of_the_mesh(mesh, seeds, listeners),
            interface=config.interface,
            use_mdns=config.use_mdns,
            interfaces=tuple(own),
            multicast=tuple(multicast),
            listeners=tuple(listeners),
            next_port=_next_port(),
        )
    finally:
        await mesh.close()


async def _until_grown(mesh: Mesh) -> None:
    """Waits until peers that have just started have heard of each other: a moment of ignorance is no fault."""
    until_s = mesh.now_s() + _GROW_S
    num_known = -1
    while mesh.now_s() < until_s:
        members = mesh.links.membership.listed()
        is_grown = all(member.is_callable and mesh.now_s() - member.started_s > _GROWN_S for member in members)
        if is_grown and len(members) == num_known:
            return
        num_known = len(members)
        mesh.links.announce(mesh.own)  # a hello, which everybody answers with whom it knows by now
        await asyncio.sleep(_ASK_AGAIN_S)


# --- this machine


async def _listeners(addresses: list[str]) -> list[Listener]:
    """Who listens at the first ports of peers, at this machine's own addresses."""

    async def one(address: str, port: int) -> Listener | None:
        if (await knock(address, port, _LOCAL_TIMEOUT_S)).outcome != Outcome.OPEN:
            return None
        return Listener(address, port, await security_of(address, port, _LOCAL_TIMEOUT_S))

    ports = range(FIRST_PORT, _LAST_PORT, PORTS_PER_PEER)
    found = await asyncio.gather(*(one(address, port) for address in addresses[:_MAX_OWN_ADDRESSES] for port in ports))
    return [listener for listener in found if listener is not None]


def _own_seeds(listeners: list[Listener]) -> list[str]:
    """Peers of this machine need no mDNS to be found."""
    peers = sorted((found for found in listeners if found.security is not None), key=lambda found: is_loopback(found.address))
    return list({found.port: f"[{found.address}]:{found.port}" for found in reversed(peers)}.values())


def _next_port() -> int | None:
    for first in range(FIRST_PORT, _LAST_PORT, PORTS_PER_PEER):
        if all(_is_free(first + offset) for offset in range(PORTS_PER_PEER)):
            return first
    return None


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError:
            return False
    return True


async def _resolved(seeds: tuple[str, ...]) -> list[tuple[str, int]]:
    found = []
    for seed in seeds:
        host, port = parse_host_port(seed, FIRST_PORT)
        found += [(address, port) for address in (await asyncio.to_thread(resolve, host))[:2]]
    return found


# --- the mesh


async def _of_the_mesh(mesh: Mesh, seeds: list[tuple[str, int]], listeners: list[Listener]) -> Facts:
    asked, knocks = await asyncio.gather(_peers(mesh), knock_at(mesh.links.membership.places()))
    told = [*knocks, *(found for peer in asked for found in peer.knocks or ())]
    own = [parse_host_port(place, FIRST_PORT) for place in _own_seeds(listeners)]
    hearsay = _hearsay(mesh, told, {peer.incarnation for peer in asked})
    hearsay, strangers = await _meet(mesh, asked, hearsay, [*seeds, *own])
    other_meshes: dict[str, tuple[str, ...]] = {}
    for said in mesh.links.sightings.announcements.values():
        if said.mesh != mesh.own.mesh and said.hint.addresses:
            shown = place(said.hint.addresses[0], said.hint.port)
            other_meshes[said.mesh] = (*other_meshes.get(said.mesh, ()), shown)
    return Facts(
        mesh=mesh.own.mesh,
        has_key=mesh.key is not None,
        fingerprint=mesh.key.fingerprint if mesh.key else "",
        mdns=mesh.links.search.mdns,
        peers=(*asked, *hearsay),
        knocks=tuple(knocks),
        heard=frozenset(incarnation for incarnation, said in mesh.links.sightings.announcements.items() if said.mesh == mesh.own.mesh),
        strangers=tuple(replace(found, is_seed=(found.address, found.port) in seeds) for found in strangers),
        other_meshes=other_meshes,
    )


async def _peers(mesh: Mesh) -> list[PeerFacts]:
    """All members, asked at once, and the ways to those on other machines."""
    listed = mesh.links.membership.listed()
    own = {local.address: local.interface for local in local_addresses()}
    outside = {member.info.incarnation: member.linked_at for member in listed if member.linked_at and member.linked_at[0] not in own}
    young = {member.info.incarnation for member in listed if mesh.now_s() - member.started_s < _YOUNG_S}
    large_limit = asyncio.Semaphore(_LARGE_AT_ONCE)
    asked, paths = await asyncio.gather(
        asyncio.gather(*(_peer(mesh, member.info, large_limit) for member in listed)),
        asyncio.to_thread(probe_paths, list(outside.values()), own),
    )
    by_peer = {incarnation: paths.get(address) for incarnation, (address, _) in outside.items()}
    announced = {incarnation: said.hint.addresses for incarnation, said in mesh.links.sightings.announcements.items()}
    return [
        replace(
            peer,
            path=by_peer.get(peer.incarnation),
            announced=announced.get(peer.incarnation, ()),
            is_young=peer.incarnation in young,
        )
        for peer in asked
    ]


def _facts_of(info: PeerInfo) -> PeerFacts:
    return PeerFacts(info.incarnation, info.name, info.addresses, info.port, info.roles, info.version, serving=serving(info.name, info))


async def _peer(mesh: Mesh, info: PeerInfo, large_limit: asyncio.Semaphore) -> PeerFacts:
    facts = _facts_of(info)
    answer = await ask_view(mesh, info.incarnation, _VIEW_TIMEOUT_S)
    if answer is None:
        return facts
    view, clock_offset_s = answer

    async def large() -> bool:
        await asyncio.sleep(_LARGE_AFTER_S)
        async with large_limit:
            return await carries_large_messages(mesh, info.incarnation, _LARGE_TIMEOUT_S)

    knocks, carries_large = await asyncio.gather(ask_reach(mesh, info.incarnation, _REACH_TIMEOUT_S), large())
    own = tuple(knocks) if knocks is not None else None
    return replace(facts, view=view, knocks=own, carries_large=carries_large, clock_offset_s=clock_offset_s)


def _hearsay(mesh: Mesh, knocks: list[PortKnock], members: set[str]) -> list[PeerFacts]:
    """Peers that mDNS or a member tells of, and that are no members to us. Alive are those that announced themselves to us, or said hello
    to a member."""
    heard = {
        incarnation: PeerFacts(incarnation, "", said.hint.addresses, said.hint.port)
        for incarnation, said in mesh.links.sightings.announcements.items()
        if said.mesh == mesh.own.mesh
    }
    for found in knocks:
        if found.offset == 0:
            known = heard.get(found.target, PeerFacts(found.target, "", (), found.port, is_alive=False))
            addresses = tuple(dict.fromkeys((*known.addresses, found.address)))[:_MAX_OWN_ADDRESSES]
            is_alive = known.is_alive or bool(found.name)
            heard[found.target] = replace(known, name=known.name or found.name, addresses=addresses, is_alive=is_alive)
    return [peer for peer in list(heard.values())[:_MAX_STRANGERS] if peer.incarnation not in members]


async def _meet(
    mesh: Mesh, members: list[PeerFacts], hearsay: list[PeerFacts], places: list[tuple[str, int]]
) -> tuple[list[PeerFacts], list[Stranger]]:
    """Say hello to all peers that are no members. Those that cannot be reached stay hearsay; those that refuse are strangers."""
    taken = {(address, peer.port) for peer in members for address in peer.addresses}
    ports = {peer.port for peer in members}
    # a peer that listens on all addresses listens on the loopback too
    new = [found for found in dict.fromkeys(places) if found not in taken and not (is_loopback(found[0]) and found[1] in ports)]
    met_heard = await asyncio.gather(*(_meet_peer(mesh, peer) for peer in hearsay))
    met_places = await asyncio.gather(*(_meet_at(mesh, *found) for found in new[:_MAX_STRANGERS]))
    strangers = [met for met in (*met_places, *met_heard) if isinstance(met, Stranger)]
    return [met for met in met_heard if isinstance(met, PeerFacts)], list({found.place: found for found in strangers}.values())


async def _meet_peer(mesh: Mesh, peer: PeerFacts) -> Stranger | PeerFacts:
    """What answers at the first of its addresses that is open; if none is, what is known of the peer."""
    for address in sorted(peer.addresses[:4], key=lambda address: ":" in address):  # IPv4 first
        met = await _meet_at(mesh, address, peer.port)
        if isinstance(met, PeerInfo):
            return replace(_facts_of(met), incarnation=peer.incarnation)
        if met.outcome == Outcome.OPEN:
            return met
    return peer


async def _meet_at(mesh: Mesh, address: str, port: int) -> Stranger | PeerInfo:
    stranger = Stranger(address, port, (await knock(address, port, _KNOCK_TIMEOUT_S)).outcome)
    if stranger.outcome != Outcome.OPEN:
        return stranger
    stranger = replace(stranger, security=await security_of(address, port, _KNOCK_TIMEOUT_S))
    try:
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            return await mesh.links.introduce(address, port)
    except DialFailed as error:
        kind = "key" if KEYS_DIFFER in error.message else next(iter(error.kinds), "")
        return replace(stranger, kind=kind, reason=error.message)
    except TimeoutError:
        return replace(stranger, reason="it does not answer our hello")
