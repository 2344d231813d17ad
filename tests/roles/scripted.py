"""A processor between a client and a worker that are both played by hand, on one peer: the real calls, without the engine."""

from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace as replace_fields
from typing import Any

from meshserve.config import MeshConfig, ServeConfig
from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import MeshserveError
from meshserve.mesh.calls import IncomingCall, OutgoingCall
from meshserve.mesh.mesh import Mesh
from meshserve.roles.frontend.server import FrontendRole
from meshserve.roles.processor.processor import ProcessorRole
from meshserve.wire.completion import CompletionRequest, Ending, Item, TextItem, read_item
from meshserve.wire.generation import GenerateRequest, WorkerAccount
from meshserve.wire.messages import COMPLETE, GENERATE
from meshserve.wire.structs import replace
from tests.harness import until

DEADLINE_S = 5.0
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
ASK = [{"role": "user", "content": "hi"}]


class Client:
    """Who asked: the sink of a completion."""

    def __init__(self) -> None:
        self.raw: list[Any] = []
        self.ending: Ending | None = None
        self.error: MeshserveError | None = None
        self.call: OutgoingCall | None = None

    @property
    def items(self) -> list[Item]:
        return [read_item(item) for item in self.raw]

    def on_item(self, item: Any) -> None:
        self.raw.append(item)

    def on_end(self, value: Any) -> None:
        self.ending = Ending.from_wire(value)

    def on_error(self, error: MeshserveError) -> None:
        self.error = error

    async def end(self) -> Ending:
        """Wait for the end; an error fails the test."""
        await until(lambda: self.ending or self.error, DEADLINE_S, "the request ends")
        assert self.ending is not None, self.error
        return self.ending

    async def failure(self) -> MeshserveError:
        await until(lambda: self.ending or self.error, DEADLINE_S, "the request fails")
        assert self.error is not None, "it came to its end"
        return self.error


class Worker:
    """What the decode worker is asked: calls in order, answered by the test."""

    def __init__(self) -> None:
        self.calls: list[IncomingCall] = []
        self.cancelled: list[str] = []
        self.opening = ""
        """Said at once by whoever is asked."""
        self.script: tuple[str, ...] = ()
        self.reason = "stop"
        """With which it ends."""
        """The whole answer of whoever is asked, a step each; nothing: the test says it."""
        self.error: MeshserveError | None = None
        """What everybody fails with at once."""

    def on_generate(self, call: IncomingCall) -> None:
        self.calls.append(call)
        call.on_cancel = lambda: self.cancelled.append(call.body.request_id)
        self.say(len(self.calls) - 1, self.opening, None)
        if self.script:
            self.recite(len(self.calls) - 1, self.script, self.reason)
        if self.error is not None:
            call.fail(self.error)

    async def asked(self, count: int) -> list[GenerateRequest]:
        """Wait until there are so many calls."""
        await until(lambda: len(self.calls) >= count, DEADLINE_S, f"{count} sequences are asked for")
        return [call.body for call in self.calls]

    def say(self, index: int, text: str, reason: str | None = "stop", position: int = 0) -> None:
        """Tokens of this text, one a byte, then the end."""
        call = self.calls[index]
        for place, token in enumerate(text.encode()):
            call.send([position + place, token])
        if reason is not None:
            num_tokens = position + len(text.encode()) if reason == "stop" else None
            call.end({"reason": reason, "account": WorkerAccount(num_cached_tokens=2), "num_tokens": num_tokens})

    def recite(self, index: int, steps: Sequence[str], reason: str = "stop") -> None:
        """Each text as the tokens of one step, one a byte, then the end."""
        position = 0
        for step in steps:
            tokens = step.encode()
            self.calls[index].send([position, *tokens])
            position += len(tokens)
        self.calls[index].end({"reason": reason, "account": WorkerAccount(num_cached_tokens=2)})


class Scene:
    """Client, processor and worker."""

    def __init__(self, mesh: Mesh, max_migrations: int = 100, stall_timeout_s: float = 30.0) -> None:
        self.mesh, self.worker = mesh, Worker()
        self.processor = ProcessorRole(mesh, 2, max_migrations, stall_timeout_s=stall_timeout_s)
        mesh.serve(GENERATE, self.worker.on_generate)

    def ask(self, **fields: Any) -> Client:
        """Send a completion request."""
        client = Client()
        request = CompletionRequest(**{"request_id": "r", "kind": "completion", "model": "dummy", "prompt": "ab", **fields})
        assert CompletionRequest.from_wire(request.to_wire()) == request
        client.call = self.mesh.open(self.mesh.incarnation, COMPLETE, request, client, 30.0)
        return client


@asynccontextmanager
async def scene(
    features: tuple[str, ...] | None = None,
    roles: tuple[str, ...] = ("processor", "decode"),
    failure_timeout_s: float = 1.5,
    death_timeout_s: float = 5.0,
    stall_timeout_s: float = 30.0,
    **card: Any,
) -> AsyncIterator[Scene]:
    """One peer that is processor and, by hand, worker of a model with these features; None: the dummy's."""
    engine = DummyEngine(EngineOptions(None, {}))
    made = replace(engine.card, features=engine.card.features if features is None else features, **card)
    config = MeshConfig(mesh="scripted", roles=roles, interface="127.0.0.1", use_mdns=False)
    config = replace_fields(config, failure_timeout_s=failure_timeout_s, death_timeout_s=death_timeout_s)
    mesh = Mesh(config, made, engine.kv_layout)
    await mesh.start()
    try:
        yield Scene(mesh, stall_timeout_s=stall_timeout_s)
    finally:
        await mesh.close()


@asynccontextmanager
async def another_worker(found: Scene, worker: Worker | None = None) -> AsyncIterator[Worker]:
    """A second worker of the scene's model, on a peer of its own; the processor knows it. Played by `worker`, if one is given."""
    own = found.mesh.own
    config = MeshConfig(mesh="scripted", roles=("decode",), interface="127.0.0.1", use_mdns=False, seeds=(f"127.0.0.1:{own.port}",))
    mesh, worker = Mesh(config, own.card, own.layout), worker or Worker()
    await mesh.start()
    mesh.serve(GENERATE, worker.on_generate)
    try:
        await found.mesh.join()
        await mesh.join()
        await until(lambda: len(found.mesh.peers_serving("decode", "dummy")) == 2, DEADLINE_S, "both meet")
        yield worker
    finally:
        await mesh.close()


@asynccontextmanager
async def served(**options: Any) -> AsyncIterator[tuple[Scene, str]]:
    """A frontend in front of a scene, and its address."""
    async with scene(**options) as found:
        frontend = FrontendRole(found.mesh, ServeConfig(http_port=0))
        try:
            yield found, await frontend.start()
            await until(lambda: frontend.num_under_way == 0 and found.processor.is_idle, DEADLINE_S, "nothing is under way")
        finally:
            await frontend.close()
            await found.processor.close()


def tokens(text: str) -> "array[int]":
    """One a byte."""
    return array("I", list(text.encode()))


def texts(client: Client, choice: int) -> str:
    """All text of one choice."""
    return "".join(item.text for item in client.items if isinstance(item, TextItem) and item.choice == choice)
