"""A running dummy engine, and sinks that remember what they were told."""

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions, GenerationStats, KVBlock, Reservation
from meshserve.errors import MeshserveError
from meshserve.wire.generation import GenerateRequest, Sampling, TokenLogprobs

DEADLINE_S = 30.0


def tokens_of(num_tokens: int, seed: int = 0) -> "array[int]":
    return array("I", [(index * index + 7 * index + seed * 13) % 251 for index in range(num_tokens)])


@dataclass
class GenerationRecord:
    """A generation's sink."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    reason: str | None = None
    stats: GenerationStats | None = None
    error: MeshserveError | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    progressed: asyncio.Event = field(default_factory=asyncio.Event)

    def on_prompt_logprobs(self, logprobs: list[TokenLogprobs | None]) -> None:
        assert self.prompt_logprobs is None
        assert not self.tokens
        assert not self.ended.is_set()
        self.prompt_logprobs = logprobs

    def on_tokens(self, tokens: list[int], logprobs: list[TokenLogprobs] | None = None) -> None:
        assert tokens
        assert not self.ended.is_set()
        self.tokens += tokens
        self.logprobs += logprobs or []
        self.progressed.set()

    def on_finish(self, reason: str, stats: GenerationStats) -> None:
        assert not self.ended.is_set()
        self.reason, self.stats = reason, stats
        self.ended.set()

    def on_error(self, error: MeshserveError) -> None:
        self.error = error
        self.ended.set()

    async def end(self) -> list[int]:
        async with asyncio.timeout(DEADLINE_S):
            await self.ended.wait()
        return self.tokens


@dataclass
class PrefillRecord:
    """A prefill's sink."""

    blocks: dict[int, bytes] = field(default_factory=dict)
    num_tokens: dict[int, int] = field(default_factory=dict)
    num_cached_tokens: int | None = None
    error: MeshserveError | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def on_blocks(self, blocks: list[KVBlock]) -> None:
        assert blocks
        for index, num_tokens, payload in blocks:
            assert all(earlier < index for earlier in self.blocks)
            self.blocks[index], self.num_tokens[index] = payload, num_tokens

    def on_prefilled(self, num_cached_tokens: int) -> None:
        assert not self.ended.is_set()
        self.num_cached_tokens = num_cached_tokens
        self.ended.set()

    def on_prefill_failed(self, error: MeshserveError) -> None:
        self.error = error
        self.ended.set()

    async def end(self) -> dict[int, bytes]:
        async with asyncio.timeout(DEADLINE_S):
            await self.ended.wait()
        return self.blocks


@asynccontextmanager
async def running_engine(**options: object) -> AsyncIterator[DummyEngine]:
    values = {"kv_bytes_per_token": 24, "block_size": 4, "num_blocks": 256} | options
    engine = DummyEngine(EngineOptions(options={key: str(value) for key, value in values.items()}))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def a_request(tokens: "array[int]", request_id: str = "r", num_generated: int = 0, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(request_id, "dummy", tokens, Sampling(**{"max_tokens": 20, "ignore_eos": True} | sampling), num_generated)


def written(error: MeshserveError | None) -> None:
    """What a block's writer is told."""
    assert error is None


async def generated(engine: DummyEngine, request: GenerateRequest) -> list[int]:
    sink = GenerationRecord()
    engine.generate(request, sink)
    return await sink.end()


async def prefilled(engine: DummyEngine, tokens: "array[int]", first_block: int = 0) -> PrefillRecord:
    sink = PrefillRecord()
    engine.prefill("prefill", tokens, first_block, sink)
    await sink.end()
    return sink


async def write_prompt(reservation: Reservation, engine: DummyEngine, tokens: "array[int]") -> None:
    """Write all KV blocks of a prompt, of which `engine` computes all but the last token."""
    for index, payload in (await prefilled(engine, tokens[:-1])).blocks.items():
        reservation.write([(index, payload)], written)
