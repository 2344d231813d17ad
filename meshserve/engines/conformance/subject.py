"""The engine under test: how the checks make one, use it, and look whether it kept the protocol."""

import asyncio
import random
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from meshserve.engines.conformance.recorders import Blocks, Output, Recorder, demand
from meshserve.engines.protocol import Engine, Reservation
from meshserve.errors import MeshserveError, Unsupported
from meshserve.wire.generation import GenerateRequest, Sampling

_LEAST_BLOCKS, _LEAST_TOKENS = 8, 64
GREEDY: dict[str, Any] = {}
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 5}


class Promise(IntEnum):
    """How far an engine promises equal tokens for equal requests; each promise includes those before it."""

    ALONE = 0
    """In two engines of one model that did the same so far."""
    PATHS = 1
    """Also whether KV is computed, found in the cache, or handed over, in pools that hold little else."""
    COMPANY = 2
    """Also whatever runs beside it, and in however many steps its tokens are computed."""
    ALWAYS = 3
    """Also in a full pool, after evictions and preemptions, and in whatever order blocks came."""


@dataclass(frozen=True)
class Subject:
    """What the checks are told of an engine. `make` gives a new one, not started, of the same model each time.

    The engine has room for at least 8 blocks, and for sequences as long, 64 tokens at least. Small ones are tested soonest: some checks
    fill the pool.
    """

    make: Callable[[], Engine]
    tokens: Sequence[int] = range(5, 250)
    """What prompts are made of: ordinary tokens of the model."""
    end_token: int | None = None
    """A token with which the model ends its output; None leaves out what can only be tried with one."""
    promise: Promise = Promise.ALWAYS
    """What the engine promises is tried; equality beyond it is not."""
    deadline_s: float = 60.0
    """For each thing that is waited for."""

    @asynccontextmanager
    async def trial(self) -> AsyncIterator["Trial"]:
        """A started engine. When the body is through, nothing may be left in it, and no sink may have been called out of turn."""
        engine = self.make()
        await engine.start()
        try:
            trial = Trial(self, engine)
            yield trial
            await trial.settle()
        finally:
            await engine.close()

    def prompt(self, num_tokens: int, number: int = 0) -> "array[int]":
        """A prompt, the same for the same number; prompts of two numbers differ within their first block."""
        return array("I", random.Random(number).choices(self.tokens, k=num_tokens))

    def demand_promise(self, promise: Promise) -> None:
        """Raises Unsupported, with which a check is skipped, if the engine does not promise as much."""
        if self.promise < promise:
            raise Unsupported(f"the engine promises equal tokens up to {self.promise.name}, not {promise.name}")


class Trial:
    """A running engine, and all who were called by it."""

    def __init__(self, subject: Subject, engine: Engine) -> None:
        self.subject, self.engine = subject, engine
        self.block_size = engine.kv_layout.block_size
        self.num_blocks = engine.load().num_blocks
        demand(self.num_blocks >= _LEAST_BLOCKS, f"the checks need an engine of at least {_LEAST_BLOCKS} blocks, not {self.num_blocks}")
        least = max(_LEAST_TOKENS, _LEAST_BLOCKS * self.block_size)
        demand(engine.card.context_length >= least, f"the checks need a context of at least {least} tokens")
        self._recorders: list[Recorder] = []
        self._num_requests = 0

    def request(self, tokens: "array[int]", num_generated: int = 0, request_id: str = "", **sampling: Any) -> GenerateRequest:
        """A request with an id of its own, for 12 tokens whatever the model would end with."""
        self._num_requests += 1
        values = {"max_tokens": 12, "ignore_eos": True} | sampling
        request_id = request_id or f"request-{self._num_requests}"
        return GenerateRequest(request_id, self.engine.card.model, tokens, Sampling(**values), num_generated)

    def generate(
        self, request: GenerateRequest, reservation: Reservation | None = None, on_call: Callable[[], None] | None = None
    ) -> Output:
        """Queue it. `on_call` is called within each call of the sink."""
        output = Output(request, self.subject.deadline_s, on_call)
        self._recorders.append(output)
        try:
            self.engine.generate(request, output, reservation)
        except BaseException:
            output.silence("its request was refused")
            raise
        return output

    async def output(self, tokens: "array[int]", num_generated: int = 0, **sampling: Any) -> list[int]:
        """The tokens of a request that is queued now, once it has ended."""
        return await self.generate(self.request(tokens, num_generated, **sampling)).end()

    def prefill(
        self, tokens: "array[int]", first_block: int = 0, request_id: str = "", on_call: Callable[[], None] | None = None
    ) -> Blocks:
        """Queue a prefill."""
        self._num_requests += 1
        blocks = Blocks(len(tokens), first_block, self.block_size, self.subject.deadline_s, on_call)
        blocks.request_id = request_id or f"prefill-{self._num_requests}"
        self._recorders.append(blocks)
        try:
            self.engine.prefill(blocks.request_id, tokens, first_block, blocks)
        except BaseException:
            blocks.silence("its prefill was refused")
            raise
        return blocks

    def cancel(self, recorder: Recorder) -> None:
        """Cancel what it records; every later call is one too many."""
        self.engine.cancel(recorder.request_id)
        recorder.silence("it was cancelled")

    async def write(self, reservation: Reservation, index: int, payload: bytes) -> MeshserveError | None:
        """Write a block; returns what its `on_done` was told. Raises what `write` raises."""
        return await self.write_all(reservation, [(index, payload)])

    async def write_all(self, reservation: Reservation, blocks: Sequence[tuple[int, bytes]]) -> MeshserveError | None:
        """The same for several at once."""
        told: asyncio.Future[MeshserveError | None] = asyncio.get_running_loop().create_future()
        reservation.write(blocks, told.set_result)  # a second call raises
        return await self._wait(told)

    async def hand_over(self, source: "Trial", request: GenerateRequest, *, is_backwards: bool = False) -> Reservation:
        """A reservation here, filled with blocks that `source` computes."""
        reservation = self.engine.reserve(request)
        missing = list(reservation.missing())
        demand(missing == sorted({*missing}), "missing blocks are listed once each, ascending")
        if missing:
            blocks = await source.prefill(request.tokens[:-1], missing[0]).end()
            for index in reversed(missing) if is_backwards else missing:
                demand(blocks[index][0] == reservation.tokens_in(index), f"block {index} has as many tokens as are reserved for it")
                error = await self.write(reservation, index, blocks[index][1])
                demand(error is None, f"block {index} of an equal engine is taken, not refused: {error}")
        demand(reservation.is_complete and not reservation.missing(), "a reservation is complete once all blocks are written")
        return reservation

    def demand_handoff(self) -> None:
        """Raises Unsupported, with which a check is skipped, if this engine does not hand over KV."""
        if not self.engine.kv_layout.can_hand_over:
            raise Unsupported(self.engine.kv_layout.refusal)

    async def until(self, is_so: Callable[[], bool], what: str) -> None:
        """Let the engine work until something is so."""
        try:
            async with asyncio.timeout(self.subject.deadline_s):
                while not is_so():
                    await asyncio.sleep(0.001)
        except TimeoutError:
            demand(False, f"{what}, within {self.subject.deadline_s:g} s")

    async def _wait(self, awaited: "Awaitable[MeshserveError | None]") -> MeshserveError | None:
        async with asyncio.timeout(self.subject.deadline_s):
            return await awaited

    async def settle(self) -> None:
        """Everything that was begun has ended, and holds nothing. Time enough goes by for calls that nobody waits for any more."""
        await self.until(lambda: all(recorder.is_over for recorder in self._recorders), "every request ends")
        for _ in range(20):
            await asyncio.sleep(0.001)
        for recorder in self._recorders:
            recorder.check()
        load = self.engine.load()
        held = (load.num_running, load.num_waiting, load.waiting_prefill_tokens, load.used_blocks)
        demand(held == (0, 0, 0, 0), f"an engine without requests holds nothing: (running, waiting, tokens, blocks) are {held}")
