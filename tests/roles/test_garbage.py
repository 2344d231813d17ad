"""A request that is over leaves nothing that only the garbage collector could free: its looks would cost all requests their time."""

import gc
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from meshserve.config import ServeConfig
from meshserve.errors import Draining
from meshserve.mesh.calls import IncomingCall
from meshserve.wire.messages import ROUTE
from tests.harness import run_async, until, until_awaited
from tests.roles.scripted import scene
from tests.roles.unequal import two_peers

OURS = ("meshserve.", "httptools.")
DEADLINE_S = 5.0
LONG = "a prompt of several blocks, "
COMPLETION: dict[str, Any] = {"model": "dummy", "prompt": "hi", "max_tokens": 4}
CHAT: dict[str, Any] = {"model": "dummy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("/v1/completions", COMPLETION),
    "a stream": ("/v1/completions", {**COMPLETION, "stream": True}),
    "several answers": ("/v1/completions", {**COMPLETION, "n": 3, "echo": True}),
    "log probabilities": ("/v1/completions", {**COMPLETION, "logprobs": 1, "echo": True}),
    "nothing to generate": ("/v1/completions", {**COMPLETION, "max_tokens": 0, "echo": True}),
    "stopped early": ("/v1/completions", {**COMPLETION, "max_tokens": 200, "stop": ["a", "e", " "]}),
    "a chat": ("/v1/chat/completions", {**CHAT, "stream": True}),
    "messages": ("/v1/messages", CHAT),
    "a response": ("/v1/responses", {"model": "dummy", "input": "hi", "max_output_tokens": 4}),
    "lines": ("/generate", {"prompt": "hi", "max_tokens": 4}),
    "refused by the frontend": ("/v1/completions", {**COMPLETION, "max_tokens": -1}),
    "refused by the processor": ("/v1/completions", {**COMPLETION, "model": "another"}),
    "a long body": ("/v1/completions", {**COMPLETION, "prompt": "x" * 40_000, "user": "y" * 40_000}),
    "handed over": ("/v1/completions", {**COMPLETION, "prompt": LONG * 4}),
}


@asynccontextmanager
async def meshed() -> AsyncIterator[httpx.AsyncClient]:
    """A peer of every role but prefill, and one that prefills what has more than 64 tokens."""
    config = replace(ServeConfig(), http_port=0)
    config = replace(config, handoff=replace(config.handoff, max_local_prefill_tokens=64))
    async with two_peers("garbage", config, config) as client:
        yield client


@contextmanager
def nothing_to_collect() -> Iterator[None]:
    """What happens inside leaves no objects of this program's, or of its HTTP parser's, that are reachable only from each other."""
    gc.collect()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not Counter(type(found).__qualname__ for found in gc.garbage if type(found).__module__.startswith(OURS))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("kind", REQUESTS)
def test_nothing_of_a_request_waits_for_the_collector(kind: str) -> None:
    path, body = REQUESTS[kind]

    async def check() -> None:
        async with meshed() as client:
            with nothing_to_collect():
                for number, connection in enumerate(("keep-alive", "keep-alive", "close")):
                    fields = {**body, "prompt": f"{number} {body['prompt']}"} if kind == "handed over" else body
                    reply = await client.post(path, json=fields, headers={"connection": connection})
                    assert reply.is_success is not kind.startswith("refused"), reply.text
                await client.get("/health")  # by now the server has seen the last connection close

    run_async(check())


def test_nothing_of_a_connection_whose_client_left_waits_for_the_collector() -> None:
    async def check() -> None:
        async with meshed() as client:

            async def is_idle() -> bool:
                peers = (await client.get("/mesh/peers", headers={"connection": "close"})).json()
                return not any(peer["load"]["num_running"] for peer in peers if "decode" in peer["roles"])

            with nothing_to_collect():
                async with client.stream("POST", "/v1/completions", json={**COMPLETION, "max_tokens": 100_000, "stream": True}) as reply:
                    await anext(reply.aiter_bytes())
                await until_awaited(is_idle, DEADLINE_S, "the worker is told")

    run_async(check())


def test_nothing_of_a_request_that_no_worker_takes_waits_for_the_collector() -> None:
    async def check() -> None:
        async with scene() as found:
            found.worker.error = Draining("no more")
            with nothing_to_collect():
                assert (await found.ask().failure()).code == "no_worker"
                found.worker.calls.clear()

    run_async(check())


def test_nothing_of_a_request_cancelled_while_a_router_thinks_waits_for_the_collector() -> None:
    async def check() -> None:
        async with scene(roles=("processor", "router", "decode")) as found:
            asked: list[IncomingCall] = []
            found.mesh.serve(ROUTE, asked.append)
            with nothing_to_collect():
                client = found.ask()
                await until(lambda: bool(asked), DEADLINE_S, "the router is asked")
                assert client.call is not None
                client.call.cancel()
                await until(lambda: not asked[0].is_open and found.processor.is_idle, DEADLINE_S, "all are told")
                asked.clear()

    run_async(check())
