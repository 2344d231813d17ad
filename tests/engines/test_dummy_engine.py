"""The dummy engine on a real event loop."""

import asyncio
import time
from itertools import pairwise
from typing import Any

import pytest

from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import ContextLengthExceeded, EngineFailed, InvalidRequest
from meshserve.wire.generation import TokenLogprobs
from tests.engines.dummy_harness import (
    DEADLINE_S,
    GenerationRecord,
    PrefillRecord,
    a_request,
    generated,
    prefilled,
    running_engine,
    tokens_of,
)
from tests.harness.pressure import allowance_s


def test_another_worker_continues_at_any_position_with_the_same_tail() -> None:
    async def run() -> None:
        prompt = tokens_of(11)
        for temperature in (0.0, 0.9):
            async with running_engine() as one, running_engine() as other:
                whole = await generated(one, a_request(prompt, temperature=temperature, seed=5))
                for position in (1, 6, 19):
                    so_far = prompt[:]
                    so_far.extend(whole[:position])
                    tail = await generated(other, a_request(so_far, "t", position, temperature=temperature, seed=5))
                    assert tail == whole[position:]

    asyncio.run(run())


def test_the_seed_matters_only_above_temperature_zero() -> None:
    async def run() -> None:
        async with running_engine() as engine:

            async def tokens(**sampling: Any) -> list[int]:
                return await generated(engine, a_request(tokens_of(9), **sampling))

            assert await tokens(seed=1) == await tokens(seed=2)
            assert await tokens(seed=1, temperature=1.0) != await tokens(seed=2, temperature=1.0)
            assert await tokens(seed=1, temperature=1.0, top_k=1) == await tokens(seed=1)

    asyncio.run(run())


def test_preempted_sequences_give_the_tokens_they_would_have_given() -> None:
    async def run() -> None:
        async with running_engine(num_blocks=12) as small, running_engine() as large:
            sinks = [GenerationRecord() for _ in range(4)]
            for seed, sink in enumerate(sinks):
                small.generate(a_request(tokens_of(10, seed), f"r{seed}", max_tokens=30), sink)
            for seed, sink in enumerate(sinks):
                assert await sink.end() == await generated(large, a_request(tokens_of(10, seed), max_tokens=30))
            assert small.load().used_blocks == 0

    asyncio.run(run())


def test_a_repeated_prompt_finds_its_whole_blocks_but_never_its_last_token() -> None:
    async def run() -> None:
        async with running_engine() as engine:
            first = await generated(engine, a_request(tokens_of(12)))
            assert engine.num_cached_tokens(a_request(tokens_of(12))) == 8
            assert engine.num_cached_tokens(a_request(tokens_of(13))) == 12
            assert engine.num_cached_tokens(a_request(tokens_of(12, seed=1))) == 0
            sink = GenerationRecord()
            engine.generate(a_request(tokens_of(12)), sink)
            assert await sink.end() == first
            assert sink.stats is not None
            assert sink.stats.num_cached_tokens == 8

    asyncio.run(run())


def test_cancelling_releases_all_blocks_and_silences_the_sink() -> None:
    async def run() -> None:
        async with running_engine() as engine:
            sink, prefill, queued = GenerationRecord(), PrefillRecord(), GenerationRecord()
            engine.generate(a_request(tokens_of(20), "g", max_tokens=500), sink)
            engine.prefill("p", tokens_of(700, seed=1), 0, prefill)
            async with asyncio.timeout(DEADLINE_S):
                await sink.progressed.wait()
            engine.generate(a_request(tokens_of(20), "q"), queued)
            assert engine.overdue_s("g") is not None
            for request_id in ("g", "p", "q", "unknown"):
                engine.cancel(request_id)
                assert engine.overdue_s(request_id) is None
            count = len(sink.tokens)
            await generated(engine, a_request(tokens_of(5)))
            assert (len(sink.tokens), sink.reason, queued.tokens) == (count, None, [])
            assert engine.load().used_blocks == engine.load().num_running == engine.load().waiting_prefill_tokens == 0

    asyncio.run(run())


class CancelsAtFirstToken(GenerationRecord):
    """A client that leaves as soon as it has seen something."""

    def on_tokens(self, tokens: list[int], logprobs: list[TokenLogprobs] | None = None) -> None:
        super().on_tokens(tokens)
        self.leave()

    def leave(self) -> None:
        raise NotImplementedError


def test_a_sink_may_cancel_from_within_its_own_call() -> None:
    async def run() -> None:
        async with running_engine() as engine:

            class Leaving(CancelsAtFirstToken):
                def leave(self) -> None:
                    engine.cancel("leaving")

            leaving, staying = Leaving(), GenerationRecord()
            engine.generate(a_request(tokens_of(9), "leaving"), leaving)
            engine.generate(a_request(tokens_of(9), "staying"), staying)
            assert len(await staying.end()) == 20
            assert (len(leaving.tokens), leaving.reason) == (1, None)

    asyncio.run(run())


def test_a_sink_that_raises_ends_alone() -> None:
    async def run() -> None:
        async with running_engine() as engine:
            broken, healthy = CancelsAtFirstToken(), GenerationRecord()
            engine.generate(a_request(tokens_of(9), "broken"), broken)
            engine.generate(a_request(tokens_of(9), "healthy"), healthy)
            assert len(await healthy.end()) == 20
            assert isinstance(broken.error, EngineFailed)
            assert engine.load().used_blocks == 0

    asyncio.run(run())


def test_every_step_is_a_turn_of_the_event_loop_of_its_own() -> None:
    async def run() -> None:
        async with running_engine() as engine:
            sink = GenerationRecord()
            engine.generate(a_request(tokens_of(9)), sink)
            counts = []
            while not sink.ended.is_set():
                await asyncio.sleep(0)
                counts.append(len(sink.tokens))
            assert max(after - before for before, after in pairwise(counts)) == 1

    asyncio.run(run())


def test_a_prompt_of_100k_tokens_is_computed_in_many_short_turns() -> None:
    async def run() -> None:
        async with running_engine(kv_bytes_per_token=1, block_size=16, num_blocks=8192) as engine:
            sink, short = GenerationRecord(), GenerationRecord()
            engine.generate(a_request(tokens_of(100_000), "long", max_tokens=1), sink)
            engine.generate(a_request(tokens_of(9), "short", max_tokens=1), short)
            num_turns = 0
            while not sink.ended.is_set():
                await asyncio.sleep(0)
                num_turns += 1
            assert num_turns >= 100_000 / 512
            assert short.ended.is_set()

    asyncio.run(run())


def test_a_cached_prompt_of_many_blocks_is_read_in_many_short_turns_and_given_out_at_once() -> None:
    async def run() -> None:
        async with running_engine(kv_bytes_per_token=1, block_size=16) as engine:
            first = await prefilled(engine, tokens_of(4000))
            sink = PrefillRecord()
            engine.prefill("again", tokens_of(4000), 0, sink)
            num_turns = 0
            while not sink.ended.is_set():
                await asyncio.sleep(0)
                num_turns += 1
                assert len(sink.blocks) in (0, 250)
            assert sink.blocks == first.blocks
            assert sink.num_cached_tokens == 4000 and num_turns >= 4000 / 512

    asyncio.run(run())


def test_a_preempted_prefill_gives_no_block_out_twice() -> None:
    async def run() -> None:
        async with running_engine(num_blocks=18, max_batch_tokens=4) as engine, running_engine() as calm:
            early, late = GenerationRecord(), PrefillRecord()
            engine.generate(a_request(tokens_of(4), "early", max_tokens=30), early)
            engine.prefill("late", tokens_of(62, seed=1), 0, late)  # its sink refuses indexes that do not ascend
            await early.end()
            assert await late.end() == (await prefilled(calm, tokens_of(62, seed=1))).blocks

    asyncio.run(run())


def test_timed_steps_take_their_time_and_do_not_drift() -> None:
    async def run() -> None:
        async with running_engine(step_ms=4, prefill_tokens_per_s=500) as engine:
            sink, began_s = GenerationRecord(), time.monotonic()
            engine.generate(a_request(tokens_of(10), max_tokens=21), sink)
            await sink.end()
            assert sink.stats is not None
            most_ms = 500 + 1000 * allowance_s(began_s)
            assert 20 <= sink.stats.prefill_ms < most_ms
            assert 79 <= sink.stats.decode_ms < most_ms  # 80 on an idle machine

    asyncio.run(run())


def test_load_tells_what_runs_and_what_waits() -> None:
    async def run() -> None:
        async with running_engine(max_batch=1, step_ms=1000) as engine:
            sink = GenerationRecord()
            engine.generate(a_request(tokens_of(10), "running"), sink)
            engine.generate(a_request(tokens_of(7, seed=1), "waiting"), GenerationRecord())
            assert engine.load().waiting_prefill_tokens == 17
            async with asyncio.timeout(DEADLINE_S):
                await sink.progressed.wait()
            load = engine.load()
            assert (load.num_running, load.num_waiting, load.waiting_prefill_tokens) == (1, 1, 7)
            assert (load.used_blocks, load.cached_blocks, load.num_blocks) == (3, 0, 256)

    asyncio.run(run())


def test_stored_and_evicted_blocks_are_reported() -> None:
    async def run() -> None:
        async with running_engine(num_blocks=4) as engine:
            await generated(engine, a_request(tokens_of(8), max_tokens=1))
            known = set(engine.watch_blocks(None))
            assert len(known) == 2

            def follow(stored: object, evicted: object) -> None:
                assert isinstance(stored, list)
                assert isinstance(evicted, list)
                known.update(stored)
                known.difference_update(evicted)

            assert set(engine.watch_blocks(follow)) == known
            await generated(engine, a_request(tokens_of(12, seed=1), max_tokens=1))
            await asyncio.sleep(0)
            assert known == set(engine.watch_blocks(None))
            assert len(known) == 4

    asyncio.run(run())


def test_requests_that_cannot_be_served_are_refused_in_words() -> None:
    async def run() -> None:
        async with running_engine(context_length=100, num_blocks=8) as engine:
            sink = GenerationRecord()
            with pytest.raises(ContextLengthExceeded, match=r"context length is 32 tokens.*requested 40 tokens .20 in the prompt, 20 in"):
                engine.check(a_request(tokens_of(20)))
            five = tokens_of(5)
            for request, param in (
                (a_request(tokens_of(0)), "prompt"),
                (a_request(five, max_tokens=0), "max_tokens"),
                (a_request(five, temperature=-1.0), "temperature"),
                (a_request(five, top_p=0.0), "top_p"),
                (a_request(tokens_of(30), num_generated=20), "num_generated"),
            ):
                with pytest.raises(InvalidRequest) as refused:
                    engine.generate(request, sink)
                assert refused.value.param == param
            with pytest.raises(ContextLengthExceeded, match=r"context length is 32 tokens.*resulted in 39 tokens"):
                engine.generate(a_request(tokens_of(39)), sink)
            engine.generate(a_request(tokens_of(5)), sink)
            with pytest.raises(InvalidRequest, match="already"):
                engine.generate(a_request(tokens_of(5)), sink)
            assert len(await sink.end()) == 20

    asyncio.run(run())


def test_an_engine_that_closes_calls_nobody_any_more() -> None:
    async def run() -> None:
        sink = GenerationRecord()
        async with running_engine() as engine:
            engine.generate(a_request(tokens_of(9), max_tokens=500), sink)
            async with asyncio.timeout(DEADLINE_S):
                await sink.progressed.wait()
        count = len(sink.tokens)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (len(sink.tokens), sink.ended.is_set()) == (count, False)

    asyncio.run(run())


def test_an_engine_says_how_far_it_is_behind_its_schedule() -> None:
    async def run() -> None:
        now = [100.0]
        engine = DummyEngine(EngineOptions(), clock=lambda: now[0])
        await engine.start()
        sink = GenerationRecord()
        engine.generate(a_request(tokens_of(9)), sink)
        assert engine.overdue_s("r") == 0.0
        now[0] += 0.9
        assert engine.overdue_s("r") == pytest.approx(0.9)
        await asyncio.sleep(0)
        assert engine.overdue_s("r") == 0.0
        assert len(await sink.end()) == 20
        assert engine.overdue_s("r") is None
        await engine.close()

    asyncio.run(run())
