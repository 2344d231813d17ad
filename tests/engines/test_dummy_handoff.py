"""The law that the whole mesh rests on: KV handed over gives the tokens that KV computed here gives, and nothing else does."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshserve.errors import BlockRefused, InvalidRequest, PoolFull
from tests.engines.dummy_harness import GenerationRecord, a_request, generated, prefilled, running_engine, tokens_of, write_prompt, written


async def handed_over(
    num_tokens: int, num_known: int, order_seed: int, kv_bytes: int, flip: int | None = None
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt computed at one engine, and of the same one whose KV went to another that knew `num_known` tokens."""
    tokens = tokens_of(num_tokens)
    async with running_engine(kv_bytes_per_token=kv_bytes) as prefill, running_engine(kv_bytes_per_token=kv_bytes) as decode:
        if num_known:
            await generated(decode, a_request(tokens[:num_known], max_tokens=1))
        reservation = decode.reserve(a_request(tokens))
        missing = list(reservation.missing())
        if missing:
            blocks = (await prefilled(prefill, tokens[:-1], missing[0])).blocks
            assert list(blocks) == missing
            for position, index in enumerate(sorted(missing, key=lambda found: hash((found, order_seed)))):
                payload = bytearray(blocks[index])
                if flip == position:
                    payload[len(payload) // 2] ^= 1
                assert len(payload) == reservation.tokens_in(index) * kv_bytes
                reservation.write([(index, memoryview(payload))], written)
        sink = GenerationRecord()
        decode.generate(a_request(tokens), sink, reservation)
        reservation.release()
        return await generated(prefill, a_request(tokens)), await sink.end()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 5), st.sampled_from([1, 7, 16, 24, 100]))
def test_kv_handed_over_gives_the_same_tokens_as_kv_computed_here(num_tokens: int, num_known: int, order_seed: int, kv_bytes: int) -> None:
    local, remote = asyncio.run(handed_over(num_tokens, min(num_known, num_tokens), order_seed, kv_bytes))
    assert local == remote


@pytest.mark.parametrize("flip", range(5))
def test_one_flipped_bit_in_any_block_gives_other_tokens(flip: int) -> None:
    local, remote = asyncio.run(handed_over(19, 0, 0, 24, flip))  # 18 tokens: four whole blocks and a partial one
    assert local != remote


def test_a_prefill_gives_out_whole_blocks_and_the_partial_last_one() -> None:
    async def run() -> None:
        async with running_engine() as engine:
            record = await prefilled(engine, tokens_of(10))
            assert record.num_tokens == {0: 4, 1: 4, 2: 2}
            assert [len(payload) for payload in record.blocks.values()] == [96, 96, 48]
            again = await prefilled(engine, tokens_of(10), first_block=1)
            assert again.num_cached_tokens == 8
            assert again.blocks == {1: record.blocks[1], 2: record.blocks[2]}
            assert engine.load().used_blocks == 0

    asyncio.run(run())


def test_a_reservation_refuses_what_it_did_not_ask_for() -> None:
    async def run() -> None:
        async with running_engine() as engine:
            reservation = engine.reserve(a_request(tokens_of(9)))
            assert (reservation.num_tokens, reservation.num_cached_tokens, list(reservation.missing())) == (8, 0, [0, 1])
            with pytest.raises(BlockRefused, match="not missing"):
                reservation.write([(2, bytes(96))], written)
            with pytest.raises(BlockRefused, match="95 bytes instead of 96"):
                reservation.write([(0, bytes(95))], written)
            reservation.write([(0, bytes(96))], written)
            with pytest.raises(BlockRefused, match="not missing"):
                reservation.write([(0, bytes(96))], written)
            with pytest.raises(BlockRefused, match="1 blocks"):
                engine.generate(a_request(tokens_of(9)), GenerationRecord(), reservation)
            reservation.release()
            reservation.release()
            with pytest.raises(BlockRefused, match="ended"):
                reservation.write([(1, bytes(96))], written)
            assert engine.load().used_blocks == 0

    asyncio.run(run())


def test_blocks_taken_from_a_reservation_are_cached_for_the_next_prompt() -> None:
    async def run() -> None:
        tokens = tokens_of(14)
        async with running_engine() as prefill, running_engine() as decode:
            reservation = decode.reserve(a_request(tokens))
            await write_prompt(reservation, prefill, tokens)
            assert decode.num_cached_tokens(a_request(tokens)) == 0
            sink = GenerationRecord()
            decode.generate(a_request(tokens), sink, reservation)
            assert decode.num_cached_tokens(a_request(tokens)) == 12
            await sink.end()
            assert sink.stats is not None
            assert (sink.stats.num_prompt_tokens, sink.stats.num_cached_tokens) == (14, 0)
            assert decode.load().used_blocks == 0

    asyncio.run(run())


@pytest.mark.parametrize(("order", "num_kept"), [((), 0), ((0,), 1), ((0, 1), 2), ((1, 2), 0), ((0, 2), 1), ((0, 1, 2, 3), 3)])
def test_full_blocks_of_a_reservation_that_is_released_are_cached_up_to_the_first_gap(order: tuple[int, ...], num_kept: int) -> None:
    async def run() -> None:
        tokens = tokens_of(14)
        async with running_engine() as prefill, running_engine() as decode:
            reservation = decode.reserve(a_request(tokens))
            blocks = (await prefilled(prefill, tokens[:-1])).blocks
            for index in order:
                reservation.write([(index, blocks[index])], written)
            reservation.release()
            assert decode.num_cached_tokens(a_request(tokens)) == 4 * num_kept
            assert decode.load().used_blocks == 0
            assert await generated(decode, a_request(tokens)) == await generated(prefill, a_request(tokens))

    asyncio.run(run())


def test_a_reservation_of_an_engine_that_is_closed_leaves_no_blocks() -> None:
    async def run() -> None:
        tokens = tokens_of(14)
        async with running_engine() as prefill, running_engine() as decode:
            reservation = decode.reserve(a_request(tokens))
            await write_prompt(reservation, prefill, tokens)
            await decode.close()
            await decode.start()
            assert decode.num_cached_tokens(a_request(tokens)) == 0

    asyncio.run(run())


def test_a_reservation_that_finds_no_room_holds_nothing() -> None:
    async def run() -> None:
        async with running_engine(num_blocks=4) as engine:
            first = engine.reserve(a_request(tokens_of(9)))
            with pytest.raises(PoolFull):
                engine.reserve(a_request(tokens_of(9, seed=1)))
            assert engine.load().used_blocks == 3
            first.release()
            with pytest.raises(InvalidRequest):
                engine.reserve(a_request(tokens_of(0)))

    asyncio.run(run())


def test_two_reservations_that_fill_the_pool_both_come_to_their_end() -> None:
    async def run() -> None:
        async with running_engine(num_blocks=6) as decode, running_engine() as prefill:
            sinks = []
            for seed in range(2):
                tokens = tokens_of(9, seed)
                reservation = decode.reserve(a_request(tokens))
                await write_prompt(reservation, prefill, tokens)
                sinks.append(GenerationRecord())
                decode.generate(a_request(tokens, f"r{seed}", max_tokens=12), sinks[-1], reservation)
            for seed, sink in enumerate(sinks):
                assert await sink.end() == await generated(prefill, a_request(tokens_of(9, seed), max_tokens=12))

    asyncio.run(run())


def test_nobody_is_reserved_room_that_an_earlier_prompt_waits_for() -> None:
    async def run() -> None:
        async with running_engine(num_blocks=6) as engine:
            first = engine.reserve(a_request(tokens_of(16)))
            waiting = GenerationRecord()
            engine.generate(a_request(tokens_of(20, seed=1), "waiting", max_tokens=4), waiting)
            await asyncio.sleep(0)
            with pytest.raises(PoolFull):
                engine.reserve(a_request(tokens_of(4, seed=2)))
            first.release()
            assert len(await waiting.end()) == 4
            engine.reserve(a_request(tokens_of(4, seed=2))).release()

    asyncio.run(run())
