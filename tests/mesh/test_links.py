"""Links between peers in one process, over real sockets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import zmq

from meshserve.config import MeshConfig
from meshserve.mesh.handshake import DialFailed
from meshserve.mesh.hearsay import Dial
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.wire import frames
from tests.harness import run_async, until


@asynccontextmanager
async def a_mesh(*seeds: str, mesh: str = "default") -> AsyncIterator[Mesh]:
    """A decode peer on loopback that joins by these seeds."""
    made = Mesh(MeshConfig(mesh=mesh, roles=("decode",), interface="127.0.0.1", use_mdns=False, seeds=seeds, redial_max_s=0.1))
    await made.start()
    try:
        await made.join()
        yield made
    finally:
        await made.close()


def place(mesh: Mesh) -> str:
    return f"127.0.0.1:{mesh.own.port}"


def test_a_peer_that_was_told_its_own_address_or_another_meshs_keeps_no_connections_of_that() -> None:
    async def course() -> None:
        async with AsyncExitStack() as stack:
            other = await stack.enter_async_context(a_mesh(mesh="other"))
            one = await stack.enter_async_context(a_mesh(place(other)))
            one.links.membership.hearsay.seed("127.0.0.1", one.own.port, one.now_s())
            refused = one.counters.snapshot
            await until(lambda: refused().get("hellos_refused", 0) >= 10, 20.0, "ten dials of itself")
            await until(lambda: other.counters.snapshot().get("hellos_refused", 0) >= 10, 20.0, "ten dials of the other mesh")
            await until(lambda: one.links.transport.num_inbound <= 1 and other.links.transport.num_inbound <= 1, 5.0, "they are gone")
            assert one.links.transport.num_unknown <= 1

    run_async(course())


def test_connections_close_at_the_router_when_their_peer_goes_without_a_word() -> None:
    async def course() -> None:
        async with a_mesh() as stays:
            for _ in range(5):
                async with a_mesh(place(stays)) as goes:
                    await until(lambda: stays.links.channels and goes.links.channels, 10.0, "both are linked")
                    assert stays.links.transport.num_inbound == 1
                await until(lambda: not stays.links.transport.num_inbound, 5.0, "its connection is gone from the table")

    run_async(course())


def test_a_dial_for_the_incarnation_that_was_here_before_leaves_the_link_to_its_successor() -> None:
    async def course() -> None:
        async with a_mesh() as successor, a_mesh(place(successor)) as one:
            both = (one.links, successor.links)
            await until(lambda: all(links.channels for links in both), 10.0, "both are linked")
            one.links._num_lost["before"] = 1
            for _ in range(3):
                with pytest.raises(DialFailed, match="another peer lives there"):
                    await one.links._dialler.dial(
                        Dial("before", ("127.0.0.1",), successor.own.port, "before")
                    )
            member = one.links.membership.members[successor.incarnation]
            link = one.links.channels[successor.incarnation]
            link.send([frames.PING, round(one.now_s() * 1e6)])  # a link that was dropped is lost now
            await until(lambda: link.is_broken or member.rtt_ms, 10.0, "the ping is answered")
            assert not any(mesh.counters.snapshot().get("links_lost") for mesh in (one, successor))

    run_async(course())


def test_a_connection_that_says_no_hello_is_forgotten() -> None:
    async def course() -> None:
        async with a_mesh() as mesh:
            with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
                stranger.linger = 0
                stranger.connect(f"tcp://{place(mesh)}")
                stranger.send(b"no hello")
                await until(lambda: mesh.links.transport.num_unknown, 5.0, "it is heard")
                await until(lambda: not mesh.links.transport.num_inbound, 10.0, "it is forgotten")

    run_async(course())


def test_a_listener_that_raises_stops_neither_the_others_nor_the_clock() -> None:
    async def course() -> None:
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(a_mesh())
            told: list[Change] = []

            def broken(change: Change, member: Member) -> None:
                raise RuntimeError("a fault of this test")

            one.subscribe(broken)
            one.subscribe(lambda change, member: told.append(change))
            async with a_mesh(place(one)) as other:
                await until(lambda: other.links.channels and one.links.channels, 10.0, "linked all the same")
            await until(lambda: told[-1:] == [Change.LEFT], 5.0, "and parted")

    run_async(course())


def test_a_peer_that_is_killed_while_it_is_dialled_is_not_said_to_have_another_key() -> None:
    async def course() -> None:
        num_taken = 0

        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal num_taken
            num_taken += 1
            if num_taken == 2:  # the first only looks whether the port is open
                dying.close()
            writer.transport.abort()

        dying = await asyncio.start_server(take, "127.0.0.1", 0)
        async with a_mesh() as mesh:
            with pytest.raises(DialFailed) as failed:
                await mesh.links.introduce("127.0.0.1", dying.sockets[0].getsockname()[1])
        assert failed.value.is_refused and "keys differ" not in failed.value.message

    run_async(course())


def test_a_peer_that_leaves_is_never_taken_for_dead_whatever_it_was_about_to_do() -> None:
    async def course() -> None:
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(a_mesh())
            second = await stack.enter_async_context(a_mesh(place(first)))
            await until(lambda: first.links.channels and second.links.channels, 10.0, "both are linked")
            ends: list[Change] = []
            for stays in (first, second):
                stays.subscribe(lambda change, member: ends.append(change) if change in (Change.LEFT, Change.DIED) else None)
            for number in range(60):
                async with a_mesh(place(first)) as goes:  # it leaves while it dials, is dialled, says hello or is welcomed, or after that
                    for _ in range(3 * number):
                        await asyncio.sleep(0)
                members = [stays.links.membership.members for stays in (first, second)]
                await until(lambda: not any(goes.incarnation in known for known in members), 10.0, "it is gone")  # noqa: B023
            assert set(ends) == {Change.LEFT}

    run_async(course())
