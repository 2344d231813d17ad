"""The frontend over a real socket, with a worker played by hand: failures before and after the first byte, and clients that leave."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from meshserve.errors import EngineFailed
from meshserve.roles.frontend.completions import Completions
from meshserve.wire.messages import COMPLETE
from tests.harness import run_async, until
from tests.roles.scripted import DEADLINE_S, Scene, served

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
}


@asynccontextmanager
async def reached() -> AsyncIterator[tuple[Scene, httpx.AsyncClient]]:
    """A frontend in front of a scene, and a client that keeps no connection."""
    async with served() as (found, url), httpx.AsyncClient(base_url=url, timeout=60.0, headers={"connection": "close"}) as client:
        yield found, client


@asynccontextmanager
async def streaming(path: str, fields: dict[str, Any]) -> AsyncIterator[tuple[Scene, AsyncIterator[str]]]:
    """A stream that has begun, piece by piece."""
    async with reached() as (found, client):
        found.worker.opening = "half a se"
        async with client.stream("POST", path, json={"model": "dummy", "stream": True, **fields}) as reply:
            yield found, reply.aiter_text()


async def rest(pieces: AsyncIterator[str]) -> str:
    """All that is still to come."""
    return "".join([piece async for piece in pieces])


@pytest.mark.parametrize("path", ROUTES)
def test_a_worker_that_fails_mid_stream_ends_it_in_an_error_event(path: str) -> None:
    async def check() -> None:
        async with streaming(path, ROUTES[path]) as (found, pieces):
            found.worker.calls[0].fail(EngineFailed("it broke"))
            data = await rest(pieces)
            assert "engine_failed" in data and "it broke" in data
            assert not any(end in data for end in ("[DONE]", "message_stop", "response.completed"))

    run_async(check())


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("path", ROUTES)
def test_a_worker_that_fails_before_its_first_token_is_an_http_error(path: str, is_stream: bool) -> None:
    async def check() -> None:
        async with reached() as (found, client):
            found.worker.error = EngineFailed("it broke")
            reply = await client.post(path, json={"model": "dummy", "stream": is_stream, **ROUTES[path]})
            assert reply.status_code == 500 and reply.headers["x-request-id"]
            error = reply.json()["error"]
            assert error["code"] == "engine_failed" and error["message"] == "it broke"
            assert error["type"] == ("api_error" if path == "/v1/messages" else "server_error")

    run_async(check())


def test_one_of_several_answers_that_fails_ends_the_stream_and_the_others() -> None:
    async def check() -> None:
        async with streaming("/v1/completions", {"prompt": ["a", "b"]}) as (found, pieces):
            await found.worker.asked(2)
            found.worker.calls[1].fail(EngineFailed("it broke"))
            data = await rest(pieces)
            assert "engine_failed" in data and "[DONE]" not in data
            await until(lambda: len(found.worker.cancelled) == 1, DEADLINE_S, "the other is cancelled")

    run_async(check())


@pytest.mark.parametrize("path", ROUTES)
def test_a_client_that_leaves_a_stream_cancels_it_at_the_worker(path: str) -> None:
    async def check() -> None:
        async with reached() as (found, client):
            found.worker.opening = "some"
            async with client.stream("POST", path, json={"model": "dummy", "stream": True, **ROUTES[path]}):
                assert not found.worker.cancelled
            await until(lambda: len(found.worker.cancelled) == 1, DEADLINE_S, "the worker is told")

    run_async(check())


def test_what_a_processor_must_not_say_is_a_bad_gateway_or_a_broken_stream() -> None:
    async def check() -> None:
        async with reached() as (found, client):
            found.mesh.serve(COMPLETE, lambda call: call.end("nonsense"))
            reply = await client.post("/v1/completions", json={"model": "dummy", "prompt": "hi"})
            assert reply.status_code == 502 and reply.json()["error"]["code"] == "protocol_error"
            reply = await client.post("/v1/completions", json={"model": "dummy", "prompt": "hi", "stream": True})
            assert "protocol_error" in reply.text and "[DONE]" not in reply.text

    run_async(check())


def test_a_mistake_of_ours_is_told_in_the_apis_shape(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with reached() as (_, client):
            monkeypatch.delattr(Completions, "processor")
            reply = await client.post("/v1/messages", json={"model": "dummy", **ROUTES["/v1/messages"]})
            assert reply.status_code == 500 and reply.json()["error"]["code"] == "internal_error"

    run_async(check())
    assert "/v1/messages failed" in caplog.text


def test_a_long_body_is_read_like_a_short_one() -> None:
    async def check() -> None:
        async with streaming("/v1/completions", {"prompt": '"' * 60_000}) as (found, pieces):
            (asked,) = await found.worker.asked(1)
            assert len(asked.tokens) == 60_000
            found.worker.calls[0].end({"reason": "stop"})
            data = await rest(pieces)
            assert data.startswith('data: {"id":"cmpl-') and data.endswith("data: [DONE]\n\n")

    run_async(check())
