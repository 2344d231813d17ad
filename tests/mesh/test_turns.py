"""The end of a turn of the event loop, where what is ready leaves: with real sockets, and a peer's roles that talk to each other."""

import asyncio

import pytest

from meshserve.config import TransportConfig
from meshserve.mesh.transport.sockets import SocketFactory
from meshserve.mesh.transport.transport import Transport
from meshserve.telemetry import Counters
from meshserve.wire.frames import ITEM, Message
from tests.harness import run_async


def test_what_is_left_for_the_end_of_a_turn_comes_in_its_order_and_a_mistake_takes_nothing_else_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        seen: list[object] = []
        with SocketFactory(TransportConfig(), None, Counters()) as factory:
            took: list[Message] = []
            transport = Transport(factory, TransportConfig(), Counters(), lambda *_: None, took.extend, lambda *_: None)
            transport.turn.later(lambda: seen.append("later"))
            transport.turn.afterwards(lambda: seen.append(list(took)))
            transport.turn.afterwards(lambda: [][0])
            transport.turn.afterwards(lambda: seen.append("second"))
            transport.loopback.send([ITEM, 1, "between roles"])
            assert not seen and not took
            async with asyncio.timeout(5):
                while "later" not in seen:
                    await asyncio.sleep(0)
            transport.close()
        assert seen == [[[ITEM, 1, "between roles"]], "second", "later"]

    run_async(check())
    assert "IndexError" in caplog.text
