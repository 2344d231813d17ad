"""What a peer remembers of those who are no members, and what it finds out about the network for others."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.config import MeshConfig
from meshserve.errors import ProtocolError
from meshserve.mesh.membership import Change, Member, PeerState
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.network import Outcome, knock, security_of
from meshserve.mesh.sightings import Sightings, describe_stranger
from meshserve.observe.reach import ask_reach, ask_view, carries_large_messages
from meshserve.observe.status import serve_status
from meshserve.wire.hello import PeerHint, PeerInfo
from meshserve.wire.messages import ECHO
from tests.harness import run_async, until

HOST = "127.0.0.1"


def a_member(**changes: Any) -> Member:
    info = PeerInfo("old", "w", "default", ("decode",), ("10.0.0.3",), 7800, "1")
    member = Member(info, True, 0.0, 0.0, shown_name="w")
    for name, value in changes.items():
        setattr(member, name, value)
    return member


def test_strangers_are_counted_and_the_latest_come_first() -> None:
    seen = Sightings()
    assert seen.refused("10.0.0.9", "no key", 1.0) and not seen.refused("10.0.0.9", "no key", 2.0)
    assert seen.refused("10.0.0.8", "no key", 3.0)
    assert seen.to_wire(5.0)["refused"] == [
        {"who": "10.0.0.8", "reason": "no key", "times": 1, "ago_s": 2.0},
        {"who": "10.0.0.9", "reason": "no key", "times": 2, "ago_s": 3.0},
    ]


def test_a_flood_of_strangers_and_of_announcements_stays_bounded() -> None:
    seen = Sightings()
    for number in range(5000):
        seen.refused(f"{number}" * 100, "reason" * 100, float(number))
        seen.announced("m" * 200, PeerHint(str(number), (HOST,), 1))
        seen.ended(Change.LEFT, a_member(), float(number))
    told = seen.to_wire(5000.0)
    assert len(told["refused"]) == len(told["gone"]) == 32 and len(seen.announcements) == 512
    assert all(len(entry["who"]) <= 160 for entry in told["refused"])


@pytest.mark.parametrize(
    ("change", "member", "reason"),
    [
        (Change.LEFT, a_member(), "left"),
        (Change.DIED, a_member(was_cut=True), "ended without goodbye"),
        (Change.DIED, a_member(state=PeerState.SUSPECT), "fell silent"),
        (Change.DIED, a_member(), "another incarnation took its place"),
    ],
)
def test_those_who_are_gone_are_told_with_the_reason(change: Change, member: Member, reason: str) -> None:
    seen = Sightings()
    seen.ended(change, member, 4.0)
    (gone,) = seen.to_wire(10.0)["gone"]
    assert gone == {"incarnation": "old", "name": "w", "address": "10.0.0.3:7800", "reason": reason, "ago_s": 6.0}


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_any_hello_is_described(hello: Any) -> None:
    assert describe_stranger(hello) and describe_stranger({"peer": hello}) and describe_stranger({"peer": {"addresses": hello}})


async def a_peer(stack: AsyncExitStack, role: str, seeds: tuple[str, ...] = ()) -> Mesh:
    mesh = Mesh(MeshConfig(roles=(role,), interface=HOST, use_mdns=False, seeds=seeds))
    await mesh.start()
    stack.push_async_callback(mesh.close)
    serve_status(mesh, None)
    await mesh.join()
    return mesh


async def two_peers(stack: AsyncExitStack) -> tuple[Mesh, Mesh]:
    one = await a_peer(stack, "decode")
    other = await a_peer(stack, "prefill", (f"{HOST}:{one.own.port}",))
    await until(lambda: one.peers_with("prefill") and other.peers_with("decode"), 5.0, "they meet")
    return one, other


def test_a_peer_knocks_at_members_only_and_again_only_after_a_while() -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            one, other = await two_peers(stack)
            first, second = await asyncio.gather(*(ask_reach(one, other.incarnation, 5.0) for _ in range(2)))
            assert first == second and first is not None
            assert [(found.target, found.address, found.offset, found.outcome) for found in first] == [
                (one.incarnation, HOST, offset, Outcome.OPEN) for offset in range(3)
            ]
            assert first[0].name == one.own.name
            assert one.ports is not None
            one.ports.bulk.close()
            assert await ask_reach(one, other.incarnation, 5.0) == first  # what it found a moment ago: nobody can make it knock faster

    run_async(run())


def test_a_peer_tells_what_it_sees_and_carries_long_messages_but_no_longer_ones() -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            one, other = await two_peers(stack)
            answer = await ask_view(one, other.incarnation, 5.0)
            assert answer is not None
            view, clock_offset_s = answer
            assert view.mdns == "off" and view.linked == (one.incarnation,)
            assert HOST in view.addresses and "127.0.0.0/8" in view.networks and abs(clock_offset_s) < 1.0
            assert await carries_large_messages(one, other.incarnation, 5.0)
            with pytest.raises(ProtocolError):
                await one.call(other.incarnation, ECHO, bytes(70_000), 5.0)
            assert await security_of(HOST, other.own.port, 5.0) == "NULL"
            assert (await knock(HOST, other.own.port, 5.0)).outcome is Outcome.OPEN
            port = other.own.port + 3  # in reserve, so nobody listens there
            assert (await knock(HOST, port, 5.0)).outcome is Outcome.REFUSED and await security_of(HOST, port, 5.0) is None

    run_async(run())
