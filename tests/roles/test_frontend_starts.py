"""A frontend between a client and processors that are played by hand: when a request is started over, and when it is not."""

import functools
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace as replace_fields
from typing import Any

import httpx
import pytest

from meshserve.config import MeshConfig, ServeConfig
from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import Draining, GaveUp, MeshserveError, ModelNotFound, NoWorker
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.roles.frontend.server import FrontendRole
from meshserve.wire.completion import Ending, EndItem, PartItem, StartItem, TextItem
from meshserve.wire.messages import COMPLETE, FIND_REQUESTS
from tests.harness import run_async, until

DEADLINE_S = 5.0
MESSAGES = [{"role": "user", "content": "ab"}]
BODY = {"model": "dummy", "prompt": "ab", "max_tokens": 8, "stream": True}


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        run_async(test(**arguments))

    return run


class Processor:
    """What one processor is asked: calls in order, answered by the test."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.calls: list[IncomingCall] = []
        self.error: MeshserveError | None = None
        """What it fails with at once."""
        mesh.serve(COMPLETE, self._on_complete)

    def _on_complete(self, call: IncomingCall) -> None:
        self.calls.append(call)
        if self.error is not None:
            call.fail(self.error)


class Scene:
    """A frontend, its client, and processors."""

    def __init__(self, mesh: Mesh, url: str, processors: list[Processor]) -> None:
        self.mesh, self.url, self.processors = mesh, url, processors

    @property
    def calls(self) -> list[IncomingCall]:
        """Of all processors, in the order of the requests' names."""
        found = [call for processor in self.processors for call in processor.calls]
        return sorted(found, key=lambda call: int(call.body.request_id.partition("-")[2]))

    async def asked(self, count: int) -> IncomingCall:
        """Wait for so many calls; the last one."""
        await until(lambda: len(self.calls) >= count, DEADLINE_S, f"{count} calls came")
        return self.calls[-1]


def config(*roles: str, **more: Any) -> MeshConfig:
    plain = MeshConfig(mesh="starts", roles=roles, interface="127.0.0.1", use_mdns=False)
    return replace_fields(plain, failure_timeout_s=0.3, death_timeout_s=0.3, **more)


@asynccontextmanager
async def scene(
    num_processors: int = 2, max_migrations: int = 16, failure_timeout_s: float = 0.3
) -> AsyncIterator[Scene]:
    engine = DummyEngine(EngineOptions(None, {}))
    async with AsyncExitStack() as exits:
        own = replace_fields(config("frontend", "decode"), failure_timeout_s=failure_timeout_s)
        mesh = Mesh(own, engine.card, engine.kv_layout)
        await mesh.start()
        exits.push_async_callback(mesh.close)
        frontend = FrontendRole(mesh, ServeConfig(http_port=0, max_migrations=max_migrations))
        url = await frontend.start()
        exits.push_async_callback(frontend.close)
        await mesh.join()
        processors = []
        for _ in range(num_processors):
            other = Mesh(config("processor", seeds=(f"127.0.0.1:{mesh.own.port}",)))
            await other.start()
            exits.push_async_callback(other.close)
            processors.append(Processor(other))
            await other.join()
        await until(
            lambda: len(mesh.peers_with("processor")) == num_processors, DEADLINE_S, "all meet"
        )
        yield Scene(mesh, url, processors)
        await until(lambda: frontend.num_under_way == 0, DEADLINE_S, "nothing is under way")


class Client:
    """Reads one stream."""

    def __init__(
        self, scene: Scene, path: str = "completions", timeout_s: float = 30.0, **fields: Any
    ) -> None:
        self._scene, self._path, self._body = scene, path, {**BODY, **fields}
        self._headers = {"x-request-timeout": str(timeout_s)}
        self.events: list[Any] = []
        self.status = 0
        self.is_over = False

    def begin(self) -> "Client":
        self._scene.mesh.tasks.spawn(self._run())
        return self

    async def _run(self) -> None:
        url = f"{self._scene.url}/v1/{self._path}"
        async with (
            httpx.AsyncClient(timeout=30.0) as client,
            client.stream("POST", url, json=self._body, headers=self._headers) as answer,
        ):
            self.status = answer.status_code
            if not self._body["stream"] or self.status != 200:
                self.events = [json.loads(await answer.aread())]
            else:
                async for line in answer.aiter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
        self.is_over = True

    async def read(self, text: str) -> None:
        """Wait until this is all that came."""
        await until(lambda: self.text == text, DEADLINE_S, f"{text!r} came")

    async def end(self) -> str:
        """The text; what the last event says must be the end."""
        await until(lambda: self.is_over, DEADLINE_S, "the stream ends")
        assert self.events[-1] == "[DONE]", self.events
        return self.text

    async def failure(self) -> str:
        """The code of the error that it ends in."""
        await until(lambda: self.is_over, DEADLINE_S, "the stream ends")
        last = self.events[-1]
        return str((json.loads(last) if isinstance(last, str) else last)["error"]["code"])

    @property
    def text(self) -> str:
        found = [
            json.loads(event)
            for event in self.events
            if isinstance(event, str) and event != "[DONE]"
        ]
        return "".join(choice["text"] for event in found for choice in event.get("choices", ()))


async def begun(found: Scene, text: str, timeout_s: float = 30.0) -> tuple[Client, IncomingCall]:
    """A client that has this text of its stream, and the processor's call."""
    client = Client(found, timeout_s=timeout_s).begin()
    call = await found.asked(1)
    call.send(text)
    await client.read(text)
    return client, call


def finish(call: IncomingCall, *texts: str) -> None:
    """These items, and the end."""
    for text in texts:
        call.send(text)
    call.end(Ending("stop", 2, 3, 0))


@in_a_loop
async def test_a_drained_processors_stream_goes_on_at_another_with_the_same_seed_under_another_name() -> (
    None
):
    async with scene() as found:
        client, first = await begun(found, "ab")
        first.fail(Draining("this processor stops"))
        second = await found.asked(2)
        assert (
            second.body.request_id != first.body.request_id
            and second.body.origin == first.body.request_id
        )
        finish(second, "a", "bc")
        assert await client.end() == "abc"
        assert found.mesh.counters.snapshot()["requests_replayed"] == 1


@in_a_loop
async def test_a_client_never_gets_a_mixture_of_two_answers() -> None:
    async with scene() as found:
        client, first = await begun(found, "ab")
        first.fail(Draining("this processor stops"))
        second = await found.asked(2)
        second.send("xyz")
        assert await client.failure() == "answer_differs" and client.text == "ab"
        await until(lambda: not second.is_open, DEADLINE_S, "the second one is told to stop")


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
@in_a_loop
async def test_a_processor_that_knows_no_worker_is_passed_over(is_stream: bool) -> None:
    async with scene() as found:
        for processor in found.processors:
            processor.error = NoWorker("no decode worker is in the mesh yet")
        found.processors[1].error = None
        clients = [Client(found, stream=is_stream).begin() for _ in range(4)]
        await until(
            lambda: len(found.processors[1].calls) == 4, DEADLINE_S, "the other one has all"
        )
        for call in found.processors[1].calls:
            finish(call, "abc")
        await until(
            lambda: all(client.is_over for client in clients), DEADLINE_S, "all are answered"
        )
        assert {client.status for client in clients} == {200}


@in_a_loop
async def test_where_no_processor_knows_a_worker_the_client_is_told_so() -> None:
    async with scene() as found:
        for processor in found.processors:
            processor.error = NoWorker("no decode worker is in the mesh yet")
        client = Client(found).begin()
        assert (
            await client.failure() == "no_worker" and client.status == 503 and len(found.calls) == 2
        )


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("error_class", [NoWorker, ModelNotFound])
@in_a_loop
async def test_a_processor_that_starts_in_place_of_a_lost_one_is_asked_until_it_has_met_the_workers(
    error_class: type[MeshserveError], is_stream: bool
) -> None:
    async with scene(1) as found:
        client, processor = Client(found, stream=is_stream).begin(), found.processors[0]
        first = await found.asked(1)
        first.send("ab")
        if is_stream:
            await client.read("ab")
        processor.error = error_class("not met yet")
        first.fail(Draining("this processor stops"))
        await found.asked(4)
        processor.error = None
        num_asked = len(found.calls)
        second = await found.asked(num_asked + 1)
        assert second.body.origin == (first.body.request_id if is_stream else "")
        assert len({call.body.request_id for call in found.calls}) == num_asked + 1
        finish(second, "abc")
        await until(lambda: client.is_over, DEADLINE_S, "it is answered")
        assert client.status == 200 and (client.text == "abc" or not is_stream)


@in_a_loop
async def test_where_such_a_processor_meets_no_worker_the_client_is_told_so() -> None:
    async with scene(1) as found:
        client, first = await begun(found, "ab")
        processor = found.processors[0]
        processor.error = NoWorker("no decode worker yet")
        first.fail(Draining("this processor stops"))
        assert await client.failure() == "no_worker" and len(found.calls) > 3


@in_a_loop
async def test_a_stream_whose_processors_are_gone_waits_no_longer_than_its_deadline() -> None:
    async with scene(1, failure_timeout_s=60.0) as found:
        client, _ = await begun(found, "ab", timeout_s=1.5)
        await found.processors[0].mesh.close()
        assert await client.failure() == "deadline_exceeded" and client.text == "ab"


@in_a_loop
async def test_what_came_to_nothing_for_the_client_is_part_of_the_answer_all_the_same() -> None:
    async with scene() as found:
        client = Client(found, "messages", messages=MESSAGES).begin()
        first = await found.asked(1)
        first.send(StartItem(2))
        first.send(PartItem(0, "reasoning"))
        had = next(one for one in found.processors if first in one.calls)
        await had.mesh.call(found.mesh.incarnation, FIND_REQUESTS, "x", DEADLINE_S)  # after them
        first.fail(Draining("this processor stops"))
        second = await found.asked(2)
        assert second.body.origin == first.body.request_id
        for item in (StartItem(2), PartItem(0, "reasoning"), TextItem(0, "hm"), EndItem(0, "stop")):
            second.send(item)
        finish(second)
        await until(lambda: client.is_over, DEADLINE_S, "the stream ends")
        assert "message_stop" in client.events[-1]


@in_a_loop
async def test_what_a_processor_says_of_the_request_itself_ends_it() -> None:
    async with scene() as found:
        client, first = await begun(found, "a")
        first.fail(GaveUp("two workers died with it", lost_peers=["a", "b"]))
        assert await client.failure() == "gave_up" and len(found.calls) == 1


@in_a_loop
async def test_no_more_processors_get_a_stream_than_it_may_migrate() -> None:
    async with scene(max_migrations=2) as found:
        client = Client(found).begin()
        for number in range(3):
            call = await found.asked(number + 1)
            call.send("abcdef"[: 2 * number + 2])
            await client.read("abcdef"[: 2 * number + 2])
            call.fail(Draining("this processor stops"))
        assert await client.failure() == "draining" and len(found.calls) == 3


@in_a_loop
async def test_a_stream_that_never_gets_beyond_what_was_sent_ends_after_four_processors() -> None:
    async with scene() as found:
        client, call = await begun(found, "ab")
        for number in range(2, 6):
            call.fail(Draining("this processor stops"))
            call = await found.asked(number)
        call.fail(Draining("this processor stops"))
        assert await client.failure() == "draining" and len(found.calls) == 5
