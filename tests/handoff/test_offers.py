"""Short prompts that go with their tickets and come back with their claims, over real sockets."""

from collections.abc import Callable
from typing import Any

import pytest

from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import Gone, InvalidRequest
from meshserve.handoff.blocks import checksum
from meshserve.handoff.task import TaskState
from meshserve.wire.handoff import Offer, Ticket
from tests.handoff.scripted import (
    DEADLINE_S,
    PROMPT,
    Block,
    CountingEngine,
    cut_short,
    decode_peer,
    flipped,
    misplaced,
    real_pair,
    scripted_peer,
    started_pair,
    text_of,
    undisturbed,
)
from tests.harness import run_async, until


def test_a_claim_that_brings_all_blocks_is_all_there_is_to_a_short_prompt() -> None:
    async def run() -> None:
        async with started_pair() as (decode, scripted, blocks):
            await until(lambda: scripted.tickets, DEADLINE_S, "the ticket comes")
            offer = Ticket.from_wire(scripted.tickets[0]).offer
            assert offer is not None and offer.tokens == PROMPT[:-1] and offer.first_block == 0
            claim = await scripted.claim_with(blocks)
            result = await decode.result()
            assert claim.is_done and claim.task is None and result.state is TaskState.DONE
            assert result.num_blocks == len(blocks) and decode.count("claims_granted") == 1
            assert await text_of(decode.engine, result) == await undisturbed()
            assert isinstance((await scripted.claim_with(blocks)).error, Gone), "the second time"
            assert decode.count("kv_blocks_received") == len(blocks)

    run_async(run())


@pytest.mark.parametrize("damage", [flipped, cut_short, misplaced])
def test_row_7_a_damaged_block_that_came_with_its_claim_is_refused(damage: Callable[[Block], Block]) -> None:
    async def run() -> None:
        async with started_pair() as (decode, scripted, blocks):
            digest = checksum(blocks[3][2]) if damage is not misplaced else b""
            claim = await scripted.claim_with([damage(blocks[3])], digest=digest)
            result = await decode.result()
            assert isinstance(claim.error, Gone) and result.state is TaskState.LOCAL
            assert result.attempts[0]["outcome"].startswith("block refused") and decode.count("kv_blocks_received") == 0
            assert await text_of(decode.engine, None) == await undisturbed()

    run_async(run())


@pytest.mark.parametrize("wrong", [{"attempt": 2}, {"attempt": 0}, {"prefill_peer": "f" * 16}, {"decode_peer": "0" * 16}])
def test_row_8_blocks_of_another_attempt_that_come_with_a_claim_are_left_and_it_gets_the_task(wrong: dict[str, Any]) -> None:
    async def run() -> None:
        async with started_pair() as (decode, scripted, blocks):
            claim = await scripted.claim_with(blocks, **wrong)
            assert claim.task is not None and claim.task["attempt"] == 1 and claim.task["first_block"] == 0
            assert decode.count("kv_blocks_stale") == len(blocks) and decode.count("kv_blocks_received") == 0
            scripted.send(blocks)
            assert (await decode.result()).state is TaskState.DONE

    run_async(run())


def test_a_claim_that_brings_too_little_gets_the_task_from_there_on() -> None:
    async def run() -> None:
        async with started_pair() as (decode, scripted, blocks):
            claim = await scripted.claim_with(blocks[:2])
            assert claim.task is not None and claim.task["first_block"] == 2
            scripted.send(blocks[2:])
            result = await decode.result()
            assert result.state is TaskState.DONE and result.num_blocks == len(blocks)
            assert await text_of(decode.engine, result) == await undisturbed()

    run_async(run())


def test_who_says_goodbye_with_an_offer_did_not_die_of_it() -> None:
    async def run() -> None:
        async with decode_peer() as decode:
            async with scripted_peer(decode) as scripted:
                decode.start()
                await until(lambda: scripted.tickets, DEADLINE_S, "the ticket comes")
            result = await decode.result()
            assert result.state is TaskState.LOCAL and not result.lost_peers

    run_async(run())


def test_row_9_the_same_offer_ten_times_is_prefilled_once() -> None:
    async def run() -> None:
        counting = CountingEngine(EngineOptions(None, {"kv_bytes_per_token": "64"}))
        async with real_pair(counting) as (decode, mesh, provider):
            offer = Offer(1, 0, PROMPT[:-1])
            decode.start()
            await decode.result()
            for _ in range(10):
                decode.sender.push_soon(
                    mesh.incarnation, Ticket(decode.mesh.incarnation, "r1", 1, len(PROMPT), offer), lambda: None
                )
            await until(lambda: mesh.counters.snapshot().get("tickets_received", 0) == 11, DEADLINE_S, "all tickets came")
            await until(lambda: provider.is_idle and not provider.queue.num_queued, DEADLINE_S, "none is left")
            assert counting.num_prefills == 1 and mesh.counters.snapshot()["prefills_begun_on_offer"] == 1
            assert decode.results[0].state is TaskState.DONE

    run_async(run())


def test_an_offer_that_takes_long_is_claimed_and_its_blocks_follow() -> None:
    async def run() -> None:
        slow = CountingEngine(EngineOptions(None, {"kv_bytes_per_token": "64", "prefill_tokens_per_s": "1000"}))
        async with real_pair(slow) as (decode, _, _):
            decode.start()
            await until(lambda: decode.count("claims_granted"), DEADLINE_S, "it is claimed")
            assert not decode.results, "long before it is computed"
            result = await decode.result()
            assert result.state is TaskState.DONE and slow.num_prefills == 1 and decode.count("kv_blocks_stale") == 0
            assert result.prefill_ms > 50
            assert await text_of(decode.engine, result) == await undisturbed()

    run_async(run())


def test_an_offer_that_the_engine_cannot_take_is_given_back_at_once() -> None:
    class Failing(DummyEngine):
        def prefill(self, *arguments: Any) -> None:
            raise InvalidRequest("not this one")

    async def run() -> None:
        async with real_pair(Failing(EngineOptions(None, {"kv_bytes_per_token": "64"}))) as (decode, _, provider):
            decode.start()
            result = await decode.result()
            assert result.state is TaskState.LOCAL and result.attempts[0]["outcome"] == "the worker gave up"
            await until(lambda: provider.is_idle and not provider.queue.num_queued, DEADLINE_S, "nothing is left")

    run_async(run())
