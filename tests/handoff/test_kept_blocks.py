"""What one attempt brought is kept for the next one: whole blocks whoever goes on, half a block for the same incarnation only."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from meshserve.errors import Gone
from meshserve.handoff.blocks import BlockWindow, Link, held_part
from meshserve.handoff.task import TaskState
from meshserve.wire.handoff import Claim, Grant
from meshserve.wire.structs import read
from tests.handoff.scripted import (
    DEADLINE_S,
    PROMPT,
    Block,
    ClaimSink,
    Decode,
    Scripted,
    blocks_of,
    decode_peer,
    scripted_peer,
    text_of,
    undisturbed,
)
from tests.harness import run_async, until

KV_BYTES_PER_TOKEN = 4096
FRAME_BYTES = 16_384
PIECES = 4
"""Frames of a whole block of 16 tokens."""
BLOCK_BYTES = FRAME_BYTES * PIECES


@asynccontextmanager
async def half_a_block_sent() -> AsyncIterator[tuple[Decode, Scripted, list[Block], ClaimSink]]:
    """A decode worker that has the first block of `PROMPT` and half of the second from a scripted prefill worker."""
    blocks = await blocks_of(PROMPT[:-1], KV_BYTES_PER_TOKEN)
    async with decode_peer(KV_BYTES_PER_TOKEN) as decode, scripted_peer(decode) as scripted:
        decode.start()
        claim = await scripted.claim()
        assert granted(claim).first_block == 0 and granted(claim).held is None
        send_frames(scripted, blocks, 1, PIECES + PIECES // 2)
        await until(lambda: scripted.answers, DEADLINE_S, "the pieces are acknowledged")
        yield decode, scripted, blocks, claim


def granted(claim: ClaimSink) -> Grant:
    found: Grant = read(Grant, claim.task)
    return found


def send_frames(scripted: Scripted, blocks: list[Block], attempt: int, num_frames: int, **window: Any) -> None:
    """The next so many frames of these blocks, as a real sender cuts them, in one message."""
    cut = BlockWindow(1 << 30, 1 << 30, 64, FRAME_BYTES, Link(is_quick=True), **window)
    cut.add(blocks)
    marks, pieces = cut.take()
    scripted.send_pieces(marks[:num_frames], pieces[:num_frames], attempt)


def bytes_of(blocks: list[Block]) -> int:
    return sum(len(payload) for _, _, payload in blocks)


async def assert_text_is_right(decode: Decode) -> None:
    assert await text_of(decode.engine, decode.results[0]) == await undisturbed(KV_BYTES_PER_TOKEN)


def test_a_sender_whose_connection_broke_in_the_middle_of_a_block_is_told_what_came_and_sends_the_rest() -> None:
    async def run() -> None:
        async with half_a_block_sent() as (decode, scripted, blocks, first):
            second = await scripted.claim(body=Claim("r1", resumes=1))
            grant = granted(second)
            assert (grant.attempt, grant.first_block) == (2, 1)
            assert grant.held == held_part([blocks[1][2][: BLOCK_BYTES // 2]])
            await until(lambda: first.error, DEADLINE_S, "the claim before it has ended")
            send_frames(scripted, blocks[1:], 2, 64, held=grant.held)
            result = await decode.result()
            assert result.state is TaskState.DONE and second.error is None
            assert [(past["outcome"], past["blocks"]) for past in result.attempts] == [("its link broke", 1), ("done", len(blocks) - 1)]
            assert result.num_bytes == bytes_of(blocks), "no byte travelled twice"
            assert decode.count("kv_blocks_refused") == decode.count("kv_blocks_double") == 0
            await assert_text_is_right(decode)

    run_async(run())


def test_frames_of_an_attempt_that_is_over_are_refused_and_counted() -> None:
    async def run() -> None:
        async with half_a_block_sent() as (decode, scripted, blocks, _):
            grant = granted(await scripted.claim(body=Claim("r1", resumes=1)))
            send_frames(scripted, blocks[1:], 1, PIECES, held=grant.held)
            await until(lambda: decode.count("kv_blocks_stale"), DEADLINE_S, "they are refused")
            assert decode.count("kv_blocks_stale") == 2 and decode.count("kv_blocks_received") == 1
            send_frames(scripted, blocks[1:], 2, 64, held=grant.held)
            result = await decode.result()
            late_bytes = PIECES * FRAME_BYTES
            assert result.num_bytes == bytes_of(blocks) + late_bytes, "what was refused has crossed the network too"
            assert result.attempts[0]["bytes"] == BLOCK_BYTES + BLOCK_BYTES // 2 + late_bytes
            send_frames(scripted, blocks, 2, PIECES)
            await until(lambda: decode.count("kv_blocks_stale") == 3, DEADLINE_S, "so is what comes after the task's end")
            await assert_text_is_right(decode)

    run_async(run())


def test_a_block_that_begins_otherwise_the_second_time_is_sent_as_a_whole() -> None:
    async def run() -> None:
        async with half_a_block_sent() as (decode, scripted, blocks, _):
            held = granted(await scripted.claim(body=Claim("r1", resumes=1))).held
            assert held is not None
            held.digest = bytes(8)
            send_frames(scripted, blocks[1:], 2, 64, held=held)
            result = await decode.result()
            assert result.state is TaskState.DONE and result.num_bytes == bytes_of(blocks) + BLOCK_BYTES // 2
            await assert_text_is_right(decode)

    run_async(run())


def test_another_incarnation_begins_the_block_anew_and_keeps_the_whole_ones() -> None:
    async def run() -> None:
        async with half_a_block_sent() as (decode, scripted, blocks, _), scripted_peer(decode) as other:
            await until(lambda: len(decode.mesh.peers_with("prefill")) == 2, DEADLINE_S, "the other one is known")
            scripted.give_up()
            await until(lambda: decode.count("prefill_attempts_failed"), DEADLINE_S, "the attempt has ended")
            grant = granted(await other.claim())
            assert (grant.attempt, grant.first_block, grant.held) == (2, 1, None)
            send_frames(other, blocks[1:], 2, 64)
            result = await decode.result()
            assert [past["blocks"] for past in result.attempts] == [1, len(blocks) - 1]
            assert result.num_bytes == bytes_of(blocks) + BLOCK_BYTES // 2
            await assert_text_is_right(decode)

    run_async(run())


def test_a_piece_that_goes_on_where_another_incarnation_stopped_is_refused() -> None:
    async def run() -> None:
        async with half_a_block_sent() as (decode, scripted, blocks, _), scripted_peer(decode) as other:
            await until(lambda: len(decode.mesh.peers_with("prefill")) == 2, DEADLINE_S, "the other one is known")
            scripted.give_up()
            await until(lambda: decode.count("prefill_attempts_failed"), DEADLINE_S, "the attempt has ended")
            await other.claim()
            send_frames(other, blocks[1:], 2, 64, held=held_part([blocks[1][2][: BLOCK_BYTES // 2]]))
            await until(lambda: decode.count("kv_blocks_refused"), DEADLINE_S, "it is refused")

    run_async(run())


def test_whole_blocks_of_a_failed_attempt_are_prefix_hits_of_the_prompt_that_is_computed_here() -> None:
    async def run() -> None:
        async with half_a_block_sent() as (decode, scripted, _, _):
            scripted.give_up()
            result = await decode.result()
            assert result.state is TaskState.LOCAL and result.reservation is None
            assert (result.num_blocks, result.num_tokens) == (1, 16), "the receipt does not count them as its own prefix hits"
            assert decode.engine.load().used_blocks == 0 and decode.engine.load().cached_blocks == 1
            await assert_text_is_right(decode)

    run_async(run())


def test_whole_blocks_of_a_request_that_is_cancelled_stay_as_prefixes() -> None:
    async def run() -> None:
        async with half_a_block_sent() as (decode, _, _, first):
            decode.requester.cancel("r1")
            await until(lambda: first.error, DEADLINE_S, "the claim has ended")
            assert isinstance(first.error, Gone) and not decode.results
            assert decode.engine.load().used_blocks == 0 and decode.engine.load().cached_blocks == 1
            assert await text_of(decode.engine, None) == await undisturbed(KV_BYTES_PER_TOKEN)

    run_async(run())


def test_a_connection_that_breaks_before_anything_came_is_not_tried_again() -> None:
    async def run() -> None:
        async with decode_peer(KV_BYTES_PER_TOKEN) as decode, scripted_peer(decode) as scripted:
            decode.start()
            await scripted.claim()
            assert isinstance((await scripted.claim(body=Claim("r1", resumes=1))).error, Gone)
            result = await decode.result()
            assert result.state is TaskState.LOCAL and [past["outcome"] for past in result.attempts] == ["its link broke"]

    run_async(run())
