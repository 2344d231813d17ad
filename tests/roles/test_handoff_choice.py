"""Where prompts are prefilled in a mesh of unequal peers on loopback, and what receipts say of it. Engines are paced, and differ by much
more than a busy machine adds."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import httpx

from meshserve.app import Peer
from meshserve.config import HandoffConfig, MeshConfig, ServeConfig
from tests.harness import run_async
from tests.roles.unequal import two_peers

DEADLINE_S = 10.0
MOST_PROMPTS = 40
"""Until all rates are measured."""


class Asked:
    """A client of such a mesh. No two of its prompts share a block."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client, self._numbers = client, count(1000)

    def body(self, num_tokens: int, max_tokens: int = 1) -> dict[str, Any]:
        """A prompt of so many tokens: the dummy's are bytes."""
        prompt = f"{next(self._numbers)} ".ljust(num_tokens, "x")
        return {"model": "dummy", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "meshserve": {"receipt": True}}

    async def receipt(self, num_tokens: int) -> dict[str, Any]:
        """Of a prompt of so many tokens."""
        reply = await self.client.post("/v1/completions", json=self.body(num_tokens))
        assert reply.is_success, reply.text
        found: dict[str, Any] = reply.json()["meshserve"]
        assert (found["handoff"]["decided"] == "handoff") == (found["peers"]["prefill"] is not None), found["handoff"]
        return found

    async def measure(self, num_short: int = 50, num_long: int = 300) -> None:
        """Short prompts, which stay, and long ones, which are handed over, until the decode worker has figures of both ends."""
        for _ in range(MOST_PROMPTS):
            short, long = [(await self.receipt(num_tokens))["handoff"] for num_tokens in (num_short, num_long)]
            if long["local_ms"] is not None and long["remote_ms"] is not None:
                return
            assert short["decided"] == "local" or short["remote_ms"] is not None
        raise AssertionError("the rates of both ends were never known")


@asynccontextmanager
async def mesh(local: dict[str, str], remote: dict[str, str], floor: int | None = None) -> AsyncIterator[Asked]:
    """A peer of every role but prefill, and a prefill worker, with these options of their engines."""
    handoff = HandoffConfig(max_local_prefill_tokens=floor)
    config = replace(ServeConfig(), http_port=0, engine_options=tuple(local.items()), handoff=handoff)
    remote_config = replace(config, engine_options=tuple(remote.items()))
    async with two_peers("choice", config, remote_config) as client:
        yield Asked(client)


def test_a_slow_worker_hands_a_short_prompt_to_a_fast_one() -> None:
    async def check() -> None:
        async with mesh({"prefill_tokens_per_s": "300"}, {}) as asked:
            await asked.measure()
            told = (await asked.receipt(200))["handoff"]
            assert told["reason"] == "faster-there" and told["remote_ms"] < told["local_ms"] and told["why"]

    run_async(check())


def test_a_fast_worker_keeps_a_long_prompt_from_a_slow_one() -> None:
    async def check() -> None:
        async with mesh({}, {"prefill_tokens_per_s": "1000"}) as asked:
            await asked.measure()
            told = (await asked.receipt(1000))["handoff"]
            assert told["reason"] == "faster-here" and told["local_ms"] < told["remote_ms"]

    run_async(check())


def test_a_prompt_that_takes_somewhat_longer_elsewhere_is_handed_over_while_streams_run() -> None:
    async def check() -> None:
        async with mesh({"prefill_tokens_per_s": "1500", "step_ms": "10"}, {"prefill_tokens_per_s": "1200"}) as asked:
            await asked.measure()
            assert (await asked.receipt(900))["handoff"]["reason"] == "faster-here"
            stream = {**asked.body(20, 10_000), "stream": True}
            async with asked.client.stream("POST", "/v1/completions", json=stream) as running:
                assert (await anext(running.aiter_lines())).startswith("data: ")
                told = (await asked.receipt(900))["handoff"]
            assert told["reason"] == "streams-run-here", told
            assert told["local_ms"] < told["remote_ms"] <= 2 * told["local_ms"]

    run_async(check())


def test_a_users_floor_stays_however_slow_the_worker_and_what_is_longer_goes() -> None:
    async def check() -> None:
        async with mesh({"prefill_tokens_per_s": "1000"}, {}, floor=200) as asked:
            assert [(await asked.receipt(num_tokens))["handoff"]["reason"] for num_tokens in (201, 202)] == ["floor", "long"]

    run_async(check())


def test_without_a_prefill_worker_there_is_nothing_to_decide() -> None:
    async def check() -> None:
        config = replace(ServeConfig(), http_port=0)
        peer = Peer(
            MeshConfig(mesh="choice", interface="127.0.0.1", use_mdns=False, roles=("frontend", "processor", "router", "decode")), config
        )
        await peer.start()
        try:
            async with httpx.AsyncClient(base_url=peer.http_url or "") as client:
                asked = Asked(client)
                reply = await client.post("/v1/completions", json=asked.body(100))
                assert reply.json()["meshserve"]["handoff"] is None
        finally:
            await peer.stop()

    run_async(check())
