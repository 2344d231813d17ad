"""The end of a turn of the event loop, where what is ready leaves: with real sockets, and a peer's roles that talk to each other."""

import asyncio
from contextlib import closing

import pytest
import zmq

from meshserve.config import TransportConfig
from meshserve.mesh.transport.channel import Turn
from meshserve.mesh.transport.reading import SocketReader
from meshserve.mesh.transport.sockets import SocketFactory
from meshserve.mesh.transport.transport import Transport
from meshserve.telemetry import Counters
from tests.harness import run_async, until


def test_what_is_left_for_the_end_of_a_turn_comes_in_its_order_and_a_mistake_takes_nothing_else_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        seen: list[object] = []
        with closing(SocketFactory(TransportConfig(), None, Counters())) as factory:
            took: list[str] = []
            transport = Transport(factory, TransportConfig(), Counters(), Turn(), lambda *_: None, lambda *_: None)
            transport.turn.later(lambda: seen.append("later"))
            transport.turn.afterwards(lambda: seen.append(list(took)))
            transport.turn.afterwards(lambda: [][0])
            transport.turn.afterwards(lambda: seen.append("second"))
            transport.turn.deliver(took.append, "between roles")
            assert not seen and not took
            async with asyncio.timeout(60.0):
                while "later" not in seen:
                    await asyncio.sleep(0)
            transport.close()
        assert seen == [["between roles"], "second", "later"]

    run_async(check())
    assert "IndexError" in caplog.text


def test_what_came_behind_a_message_that_could_not_be_taken_in_is_read_all_the_same() -> None:
    async def check() -> None:
        loop, failures, seen = asyncio.get_running_loop(), list[object](), list[bytes]()
        loop.set_exception_handler(lambda _, context: failures.append(context.get("exception")))

        def take(frames: list[bytes]) -> None:
            seen.append(frames[0])
            if frames[0] == b"1":
                raise IndexError

        with closing(SocketFactory(TransportConfig(), None, Counters())) as factory:
            there, here = factory.client_socket(zmq.PUSH), factory.client_socket(zmq.PULL)
            port = here.bind_to_random_port("tcp://127.0.0.1")
            there.connect(f"tcp://127.0.0.1:{port}")
            reader = SocketReader(here, take, lambda: None, 100)
            for number in range(5):
                await until(lambda number=number: _is_sent(there, b"%d" % number), 5, "it is sent")  # type: ignore[misc]
            await until(lambda: len(seen) == 5, 5, "all are read")
            reader.close()
        assert seen == [b"0", b"1", b"2", b"3", b"4"] and [type(found) for found in failures] == [IndexError]

    run_async(check())


def _is_sent(socket: "zmq.Socket[bytes]", data: bytes) -> bool:
    try:
        socket.send(data, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True
