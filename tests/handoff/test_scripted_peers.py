"""The decode worker's side against a scripted prefill worker, which speaks the real protocol over real sockets and does not keep to it."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from meshserve.config import HandoffConfig
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import Gone
from meshserve.handoff.blocks import checksum
from meshserve.handoff.provider import PrefillProvider
from meshserve.handoff.task import TaskState
from meshserve.observe.worker_report import WorkerReporter
from meshserve.roles.prefill import PrefillRole
from meshserve.roles.router import RouterRole
from meshserve.routing.fleet import RESERVATION_TIMEOUT_S, Question
from meshserve.routing.workers import Prompt
from meshserve.wire.generation import GenerateRequest
from meshserve.wire.structs import replace
from tests.handoff.scripted import (
    DEADLINE_S,
    HASHES,
    PROMPT,
    Block,
    CountingEngine,
    Decode,
    blocks_of,
    cut_short,
    flipped,
    misplaced,
    new_engine,
    pair,
    peer,
    started_pair,
    text_of,
    undisturbed,
)
from tests.harness import run_async, until


@pytest.mark.parametrize("damage", [flipped, cut_short])
@pytest.mark.parametrize("which", [0, 3, 6])
def test_row_7_a_damaged_block_is_refused_and_the_prompt_computed_again(damage: Callable[[Block], Block], which: int) -> None:
    async def run() -> None:
        async with started_pair() as (decode, scripted, blocks):
            assert (await scripted.claim()).task is not None
            scripted.send(blocks[:which])
            scripted.send([damage(blocks[which])], digest=checksum(blocks[which][2]))
            result = await decode.result()
            assert result.state is TaskState.LOCAL and result.attempts[0]["outcome"].startswith("block refused")
            assert decode.count("kv_blocks_refused") == 1
            assert result.num_blocks == which + 1, "what was refused has crossed the network too"
            assert await text_of(decode.engine, None) == await undisturbed()
            assert decode.engine.load().used_blocks == 0

    run_async(run())


def test_row_7_a_block_of_the_wrong_length_or_place_with_a_right_checksum_is_refused_too() -> None:
    async def run() -> None:
        async with started_pair() as (decode, scripted, blocks):
            await scripted.claim()
            scripted.send([misplaced(blocks[0])])
            scripted.send([cut_short(blocks[0])])
            result = await decode.result()
            assert result.state is TaskState.LOCAL and "block refused" in result.attempts[0]["outcome"]
            assert decode.count("kv_blocks_received") == 0

    run_async(run())


@pytest.mark.parametrize("says", [{"layout": "another"}, {"prefix_hash": 1}, {"prefix_hash": HASHES[0]}], ids=["layout", "tokens", "place"])
def test_row_44_a_block_of_another_layout_or_of_other_tokens_is_refused_before_the_engine_sees_it(says: dict[str, Any]) -> None:
    async def run() -> None:
        async with started_pair() as (decode, scripted, blocks):
            await scripted.claim()
            scripted.send(blocks[:2], **says)
            result = await decode.result()
            assert result.state is TaskState.LOCAL and "block refused" in result.attempts[0]["outcome"]
            assert decode.count("kv_blocks_received") == 0
            assert await text_of(decode.engine, None) == await undisturbed()

    run_async(run())


def test_row_8_of_a_thousand_blocks_of_other_attempts_and_incarnations_none_is_accepted() -> None:
    async def run() -> None:
        blocks = await blocks_of(PROMPT[:-1])
        rng = random.Random(1)
        wrong: list[dict[str, Any]] = [
            {"attempt": 0},
            {"attempt": 2},
            {"attempt": -1},
            {"prefill_peer": "f" * 16},
            {"decode_peer": "0" * 16},
        ]
        async with pair() as (decode, scripted):
            decode.start()
            await scripted.claim()
            for _ in range(1000):
                bad = rng.choice(blocks)
                scripted.send([(bad[0], bad[1], rng.randbytes(len(bad[2])))], **rng.choice(wrong))
                if rng.random() < 0.1:
                    await asyncio.sleep(0)
            await until(lambda: decode.count("kv_blocks_stale") == 1000, DEADLINE_S, "all are refused")
            assert decode.count("kv_blocks_received") == 0 and not decode.results
            scripted.send(blocks)
            result = await decode.result()
            assert result.state is TaskState.DONE and decode.count("kv_blocks_received") == len(blocks)
            assert await text_of(decode.engine, result) == await undisturbed()

    run_async(run())


def test_row_8_blocks_that_come_twice_or_after_the_end_change_nothing() -> None:
    async def run() -> None:
        async with started_pair() as (decode, scripted, blocks):
            await scripted.claim()
            scripted.send(blocks[:3])
            scripted.send(blocks[:3])
            scripted.send(blocks[3:])
            scripted.send(blocks)
            result = await decode.result()
            await until(lambda: decode.count("kv_blocks_stale") == len(blocks), DEADLINE_S, "the late ones are refused")
            assert decode.count("kv_blocks_double") == 3 and decode.count("kv_blocks_received") == len(blocks)
            assert await text_of(decode.engine, result) == await undisturbed()

    run_async(run())


def test_row_9_the_first_claim_wins_and_late_ones_are_gone() -> None:
    async def run() -> None:
        async with started_pair() as (decode, scripted, blocks):
            first, second = await scripted.claim(), await scripted.claim()
            assert first.task is not None and isinstance(second.error, Gone)
            scripted.send(blocks)
            await until(lambda: first.is_done, DEADLINE_S, "the claim ends")
            assert isinstance((await scripted.claim()).error, Gone), "after the end"
            assert isinstance((await scripted.claim("unheard of")).error, Gone)
            assert len(decode.results) == 1 and decode.results[0].state is TaskState.DONE
            assert decode.count("claims_granted") == 1

    run_async(run())


def test_a_routers_reservation_ends_when_the_prefill_worker_reports_the_ticket() -> None:
    async def run() -> None:
        engine = await new_engine()
        async with peer("decode", engine) as decode_mesh:
            decode, router = Decode(decode_mesh, engine), RouterRole(decode_mesh, "kv")
            async with peer("prefill", engine, (f"127.0.0.1:{decode_mesh.own.port}",)) as prefill_mesh:
                provider = PrefillProvider(prefill_mesh, engine, HandoffConfig())
                reporter = WorkerReporter(prefill_mesh, engine, provider)
                PrefillRole(provider, reporter)
                await until(lambda: decode_mesh.peers_with("prefill") and prefill_mesh.peers_with("decode"), DEADLINE_S, "both meet")

                def wait_ms(request_id: str) -> float:
                    """At the prefill worker, for a prompt of 1,000 tokens that is reserved there now."""
                    prompt = Prompt(1000, 16)
                    asked = Question(request_id, prompt, [decode_mesh.incarnation], [prefill_mesh.incarnation])
                    return router.fleet.choose("kv", asked, decode_mesh.now_s()).prefill[0].wait_ms

                await until(lambda: prefill_mesh.counters.snapshot().get("watches_opened"), DEADLINE_S, "the router follows it")
                assert wait_ms("r1") == 0 and wait_ms("other") > 0
                router.fleet.release(prefill_mesh.incarnation, "other")
                decode.start()
                await decode.result()

                def is_over() -> bool:
                    found = wait_ms("probe")
                    router.fleet.release(prefill_mesh.incarnation, "probe")
                    return found == 0

                await until(is_over, RESERVATION_TIMEOUT_S / 2, "the reservation is over before its time")
                for closing in (provider, reporter, router):
                    closing.close()
            decode.close()
        await engine.close()

    run_async(run())


def test_row_9_the_same_ticket_ten_times_is_prefilled_once() -> None:
    async def run() -> None:
        engine, counting = await new_engine(), CountingEngine(EngineOptions(None, {"kv_bytes_per_token": "64"}))
        await counting.start()
        async with peer("decode", engine) as decode_mesh:
            decode = Decode(decode_mesh, engine)
            async with peer("prefill", counting, (f"127.0.0.1:{decode_mesh.own.port}",)) as prefill_mesh:
                provider = PrefillProvider(prefill_mesh, counting, HandoffConfig())
                await until(lambda: decode_mesh.peers_with("prefill") and prefill_mesh.peers_with("decode"), DEADLINE_S, "both meet")
                decode.start()
                ticket = [decode_mesh.incarnation, "r1", 1, len(PROMPT)]
                for _ in range(10):
                    decode.sender.push_soon(prefill_mesh.incarnation, ticket, lambda: None)
                await decode.result()
                for _ in range(10):
                    decode.sender.push_soon(prefill_mesh.incarnation, ticket, lambda: None)
                received = prefill_mesh.counters.snapshot
                await until(lambda: provider.is_idle and received().get("tickets_received", 0) >= 11, DEADLINE_S, "all tickets came")
                await until(lambda: provider.queue.num_queued == 0, DEADLINE_S, "none is left")
                assert counting.num_prefills == 1 and decode.results[0].state is TaskState.DONE
                provider.close()
            decode.close()
        await engine.close()
        await counting.close()

    run_async(run())


def test_a_decode_engine_that_fails_ends_the_handoffs_that_it_had_reserved_for() -> None:
    async def run() -> None:
        async with started_pair() as (decode, scripted, blocks):
            claim = await scripted.claim()
            scripted.send(blocks[:1])
            await until(lambda: scripted.answers, DEADLINE_S, "a block is acknowledged")
            await decode.engine.close()  # what was reserved is gone, as after a failure
            decode.requester.engine_failed()
            result = await decode.result()
            assert result.state is TaskState.LOCAL and result.reservation is None
            assert [attempt["outcome"] for attempt in result.attempts] == ["the decode engine failed"]
            await until(lambda: claim.error, DEADLINE_S, "the prefill worker is told")
            assert decode.count("kv_blocks_refused") == 0

    run_async(run())


def test_a_prefill_worker_of_the_same_model_with_another_layout_is_named_and_gets_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        own, unlike = await new_engine(), await new_engine()
        unlike.runner.kv_layout = replace(unlike.kv_layout, fingerprint="another KV type")
        async with peer("decode", own) as decode_mesh:
            decode = Decode(decode_mesh, own)
            async with peer("prefill", unlike, (f"127.0.0.1:{decode_mesh.own.port}",)) as prefill_mesh:
                warning = f"{prefill_mesh.own.name} keeps its KV in another way"
                await until(lambda: warning in caplog.text, DEADLINE_S, "people are told")
                assert decode.requester.choice.candidates(GenerateRequest("r1", "dummy", PROMPT)) == []
            decode.close()
        for engine in (own, unlike):
            await engine.close()

    run_async(run())
