"""Streams whose processor is lost after a part of them has left: another processor goes on, and a
client sees a pause and nothing else."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.harness import Process, meshserve_command, wait_until
from tests.harness.held import held
from tests.roles.replays import A_FEW, ENDLESS, KINDS, MESH, READY_S, Front, Stream, read_all


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    options = ("--http", "127.0.0.1:0", "--engine-opt", "step_ms=15", "--drain-timeout", "5")
    with ExitStack() as exits:
        process = exits.enter_context(
            Process(meshserve_command("run", "--role", "frontend,router,decode", *options, *MESH))
        )
        ready = process.ready(READY_S)
        found = Front(ready["http"], ready["address"].removeprefix("tcp://"), exits)
        found.processors = [found.start(), found.start()]
        wait_until(found.is_whole, READY_S, "all know each other")
        yield found
        assert "Traceback" not in process.stderr_text


def read_while_lost(front: Front, streams: list[Stream], fault: Callable[[Process], None]) -> None:
    """Read streams that all are at one processor, which is lost once they have begun; then there is
    another one."""
    had, other = front.processors
    other.stop()
    wait_until(lambda: front.state(other) == "suspect", READY_S, "the other one gets no work")

    def lose() -> None:
        other.resume()  # it is heard of again while the streams wait for a processor
        fault(had)

    read_all(streams, lose)


@pytest.fixture(scope="module")
def undisturbed(front: Front) -> dict[str, list[Any]]:
    """What is said while nothing is lost."""
    streams = front.streams(KINDS)
    read_all(list(streams.values()))
    return {kind: stream.events for kind, stream in streams.items()}


def with_two(front: Front) -> None:
    """Two processors again. (Those that a test itself started would be left behind by it.)"""
    front.processors = [found for found in front.processors if found.exit_code is None]
    front.processors += [front.start() for _ in range(2 - len(front.processors))]
    wait_until(front.is_whole, READY_S, "all know each other")


@pytest.fixture(scope="module")
def killed(front: Front, undisturbed: dict[str, list[Any]]) -> dict[str, Stream]:
    """Streams whose processor was killed."""
    streams = front.streams(KINDS)
    read_while_lost(front, list(streams.values()), Process.kill)
    with_two(front)
    return streams


@pytest.fixture(scope="module")
def drained(front: Front, undisturbed: dict[str, list[Any]]) -> dict[str, Stream]:
    """Streams whose processor was told to stop, and did so before their end."""
    streams = front.streams()
    read_while_lost(front, list(streams.values()), Process.terminate)
    front.processors[0].wait()
    with_two(front)
    return streams


@pytest.fixture(scope="module")
def restarted(front: Front, undisturbed: dict[str, list[Any]]) -> dict[str, Stream]:
    """Streams of the only processor, which was killed and started again."""
    front.processors.pop().kill()
    streams = front.streams()

    def restart() -> None:
        front.processors[0].kill()
        front.processors[0] = front.start()

    read_all(list(streams.values()), restart)
    with_two(front)
    return streams


@pytest.fixture(scope="module")
def unseeded(front: Front) -> list[Stream]:
    """Streams with no seed of their own, whose processor was killed."""
    body = {"prompt": ["one", "two"], "temperature": 1.0, "n": 2, **ENDLESS}
    streams = [Stream(front.url, "/v1/completions", body) for _ in range(3)]
    read_while_lost(front, streams, Process.kill)
    with_two(front)
    return streams


@pytest.mark.parametrize("kind", KINDS)
def test_row_14_a_stream_goes_on_without_gap_or_repeat_when_its_processor_is_killed(
    front: Front, undisturbed: dict[str, list[Any]], killed: dict[str, Stream], kind: str
) -> None:
    stream = killed[kind]
    assert stream.events == undisturbed[kind]
    receipt = front.receipt(stream)
    (continued,) = receipt["continuations"]
    assert (
        len(stream.ids) <= 1
        and receipt["request_id"] == stream.request_id
        and receipt["migrations"] == 1
    )
    assert (continued["role"], continued["outcome"], receipt["attempts"][0]["role"]) == (
        "processor",
        "peer_lost",
        "processor",
    )
    assert (
        continued["to"] == receipt["peers"]["processor"] != continued["from"]
        and continued["pause_ms"] > 0
    )


def test_row_14_streams_outlast_the_drain_of_their_processor(
    front: Front, undisturbed: dict[str, list[Any]], drained: dict[str, Stream]
) -> None:
    assert {kind: stream.events for kind, stream in drained.items()} == {
        kind: undisturbed[kind] for kind in A_FEW
    }
    outcomes = {
        found["outcome"]
        for stream in drained.values()
        for found in front.receipt(stream)["continuations"]
    }
    assert outcomes <= {"draining", "peer_lost"} and outcomes


def test_row_14_streams_of_the_only_processor_wait_for_the_one_that_is_started_in_its_place(
    undisturbed: dict[str, list[Any]], restarted: dict[str, Stream]
) -> None:
    assert {kind: stream.events for kind, stream in restarted.items()} == {
        kind: undisturbed[kind] for kind in A_FEW
    }


def test_row_14_a_stream_with_no_seed_of_its_own_goes_on_with_the_one_that_was_drawn(
    front: Front, unseeded: list[Stream]
) -> None:
    said = [json.dumps(stream.events) for stream in unseeded]
    assert all(
        front.receipt(stream)["migrations"] == 1 and '"error"' not in text
        for stream, text in zip(unseeded, said, strict=True)
    )
    assert len(set(said)) == 3, "each request draws its own"


def test_row_14_streams_go_on_while_their_processor_is_silent_and_it_is_told_when_it_wakes(
    front: Front, undisturbed: dict[str, list[Any]]
) -> None:
    streams = front.streams()
    read_while_lost(front, list(streams.values()), Process.stop)
    front.processors[0].resume()
    assert {kind: stream.events for kind, stream in streams.items()} == {
        kind: undisturbed[kind] for kind in A_FEW
    }
    assert {
        found["outcome"]
        for stream in streams.values()
        for found in front.receipt(stream)["continuations"]
    } == {"peer_silent"}
    wait_until(
        lambda: front.is_whole() and not held(front.peers()),
        READY_S,
        "nothing is left of them anywhere",
    )
