"""Contexts of llama.cpp on tiny models: steps, shared cells, blocks out and in, and what is refused."""

import random
import threading
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytest.importorskip("gguf")  # which the tiny models are made with

from meshserve.engines.llama.blocks import BlockFormat
from meshserve.engines.llama.context import LlamaContext, probe
from meshserve.engines.llama.model import LlamaModel
from meshserve.errors import BlockRefused, EngineFailed, PoolFull, StartupFailed
from tests.engines.conftest import KINDS_WITH_BLOCKS, KINDS_WITH_STATES
from tests.engines.tiny_models import VOCABULARY

TOKENS = array("i", random.Random(7).choices(range(5, VOCABULARY), k=400))


def compute(context: LlamaContext, sequence: int, first: int, end: int, chunk: int = 64) -> list[float]:
    """Decode these positions of TOKENS in chunks; returns the last one's logits."""
    for start in range(first, end, min(chunk, context.max_batch)):
        count = min(chunk, context.max_batch, end - start)
        wants = [False] * (count - 1) + [True]
        assert context.decode(TOKENS[start : start + count], range(start, start + count), [sequence] * count, wants)
    return list(context.logits(count - 1))


def is_whole(context: LlamaContext, sequence: int, first: int, num_tokens: int) -> bool:
    """Whether the sequence has the cells of all these tokens."""
    try:
        context.export_block(sequence, first, num_tokens)
    except BlockRefused:
        return False
    return True


# --- steps


@pytest.mark.parametrize("kind", KINDS_WITH_BLOCKS)
def test_logits_are_equal_whatever_the_chunks_and_whoever_shares_the_step(kind: str, contexts: Callable[..., LlamaContext]) -> None:
    context = contexts(kind)
    expected = compute(context, 0, 0, 100)
    for sequence, chunk in enumerate((1, 7, 64), start=1):
        assert compute(context, sequence, 0, 100, chunk) == expected
    followers = [1, 2, 3, 0]
    assert context.decode([TOKENS[100]] * 4, [100] * 4, followers, [True] * 4)
    assert len({tuple(context.logits(row)) for row in range(4)}) == 1


def test_a_shared_prefix_gives_the_logits_of_a_computed_one_and_outlives_its_source(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts()
    expected = compute(context, 0, 0, 90)
    context.share(0, 1, 0, 64)
    assert context.remove(0)
    assert compute(context, 1, 64, 90) == expected
    assert is_whole(context, 1, 0, 90) and not is_whole(context, 0, 0, 90)
    assert context.remove(1, 80)
    assert compute(context, 1, 80, 90, chunk=1) == expected


def test_a_full_pool_takes_nothing_and_changes_nothing(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts(num_cells=256)
    compute(context, 0, 0, 250)
    before = context.export_block(0, 192, 58)
    assert not context.decode(TOKENS[:8], range(8), [1] * 8, [False] * 8)
    assert context.export_block(0, 192, 58) == before
    assert context.decode(TOKENS[:6], range(6), [1] * 6, [False] * 6)


@pytest.mark.parametrize("kind", ["dense", "moe"])  # behind a sliding window cells are taken again in any case
def test_removed_cells_before_those_of_a_sequence_do_not_change_its_logits(kind: str, contexts: Callable[..., LlamaContext]) -> None:
    undisturbed, disturbed = contexts(kind), contexts(kind)
    for context in (undisturbed, disturbed):
        compute(context, 1, 0, 200)
        compute(context, 0, 0, 70)
    assert disturbed.remove(1)
    for position in range(70, 220):
        expected = compute(undisturbed, 0, position, position + 1)
        assert compute(disturbed, 0, position, position + 1) == expected, f"at position {position}"


def test_removed_cells_are_given_to_others_once_all_are_used(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts(num_cells=256)
    compute(context, 0, 0, 250)
    block = context.export_block(0, 0, 64)
    assert context.remove(0, 64) and context.remove(0)
    compute(context, 1, 0, 100)
    context.import_block(2, 0, 64, block)
    compute(context, 3, 0, 92)
    assert context.remove(3)
    context.import_block(4, 0, 64, block)
    assert is_whole(context, 1, 0, 100) and is_whole(context, 2, 0, 64) and is_whole(context, 4, 0, 64)
    assert not context.decode(TOKENS[:30], range(30), [3] * 30, [False] * 30)


def test_only_recurrent_layers_refuse_to_lose_a_part(contexts: Callable[..., LlamaContext]) -> None:
    for kind in [*KINDS_WITH_BLOCKS, "hybrid", "recurrent"]:
        context = contexts(kind)
        compute(context, 0, 0, 20)
        assert context.remove(0, 10) is (kind in KINDS_WITH_BLOCKS)
        assert context.remove(0)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (([], [], [], []), "1 to 64 rows"),
        (([5] * 65, range(65), [0] * 65, [0] * 65), "1 to 64 rows"),
        (([5], [0, 1], [0], [0]), "1 to 64 rows"),
        (([VOCABULARY], [0], [0], [0]), "tokens are from 0 to 511"),
        (([-1], [0], [0], [0]), "tokens are from 0"),
        (([5], [-1], [0], [0]), "positions are from 0 to 511"),
        (([5], [512], [0], [0]), "positions are from 0 to 511"),
        (([5], [0], [5], [0]), "sequences are from 0 to 4"),
        (([5], [0], [-1], [0]), "sequences are from 0 to 4"),
        (([5] * 9, range(9), [0] * 9, [1] * 9), "at most 8 logits"),
    ],
)
def test_steps_that_would_end_the_process_are_refused(
    contexts: Callable[..., LlamaContext], rows: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[bool]], words: str
) -> None:
    context = contexts()
    with pytest.raises(ValueError, match=words):
        context.decode(*rows)


def test_other_misuse_is_refused_too(contexts: Callable[..., LlamaContext], tiny_files: dict[str, Path]) -> None:
    context = contexts()
    compute(context, 0, 0, 3, chunk=1)
    for misuse in (
        lambda: context.logits(1),
        lambda: context.logits(-1),
        lambda: context.share(0, 5, 0, 1),
        lambda: context.share(-1, 0, 0, 1),
        lambda: context.remove(5),
        lambda: context.remove(0, 3, 2),
        lambda: context.export_block(5, 0, 1),
        lambda: context.export_block(0, -1, 1),
        lambda: context.import_block(5, 0, 1, b""),
        lambda: contexts(num_sequences=257),
        lambda: contexts(max_outputs=65),
        lambda: contexts(num_cells=1 << 28),
    ):
        with pytest.raises(ValueError):
            misuse()
    with pytest.raises(EngineFailed, match=r"a step failed: .*position"):
        context.decode([5], [9], [0], [True])
    model = LlamaModel(tiny_files["dense"])
    model.close()
    with pytest.raises(StartupFailed, match="no memory for 256 cells of KV cache"):
        LlamaContext(model, num_cells=256, num_sequences=2, max_batch=8, max_outputs=1, num_threads=1)


def test_an_abort_from_another_thread_ends_the_steps(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts()
    stopper = threading.Thread(target=context.abort)
    with pytest.raises(EngineFailed, match="the step was aborted"):
        for number in range(100_000):
            if number == 3:
                stopper.start()
            compute(context, 0, 0, 200)
            context.clear()
    stopper.join()


# --- blocks


@pytest.mark.parametrize("kind", KINDS_WITH_BLOCKS)
def test_imported_blocks_give_the_logits_of_computed_ones(kind: str, contexts: Callable[..., LlamaContext]) -> None:
    source, target = contexts(kind), contexts(kind, num_cells=1024, num_sequences=40, max_batch=32, num_threads=2)
    compute(target, 3, 0, 50)
    for first in range(0, 128, 32):
        compute(source, 0, first, first + 32)
        target.import_block(7, first, 32, source.export_block(0, first, 32))
    assert compute(source, 0, 128, 129) == compute(target, 7, 128, 129)
    assert target.export_block(7, 32, 64) == source.export_block(0, 32, 64)
    assert source.export_block(0, 100, 29) == source.export_block(0, 100, 29)


@pytest.mark.parametrize("kind", KINDS_WITH_BLOCKS)
def test_a_pool_with_holes_gives_blocks_in_the_order_of_positions_and_takes_them(kind: str, contexts: Callable[..., LlamaContext]) -> None:
    whole, holed = contexts(kind), contexts(kind, num_cells=256)
    compute(whole, 0, 0, 64)
    compute(holed, 0, 0, 32)
    compute(holed, 1, 0, 223)
    for first in range(2, 222, 4):
        holed.remove(1, first, first + 1)
    for first in (28, 12, 0):  # cells that are found again in another order than they were given out
        holed.remove(0, first)
        compute(holed, 0, first, 32, chunk=5)
    compute(holed, 0, 32, 64, chunk=3)
    block, found = whole.export_block(0, 0, 64), holed.export_block(0, 0, 64)
    # attention adds up in the order of cells, so that single values may differ in their last bit: rows elsewhere would differ in all
    assert sum(one != other for one, other in zip(found, block, strict=True)) < len(block) // 100
    holed.remove(0)
    holed.import_block(2, 0, 64, block)
    assert holed.export_block(2, 0, 64) == block


def test_an_import_takes_as_many_free_cells_as_it_has_tokens_and_leaves_none_taken_if_it_fails(
    contexts: Callable[..., LlamaContext],
) -> None:
    context = contexts(num_cells=256)
    compute(context, 0, 0, 256)
    block = context.export_block(0, 0, 16)
    for first in range(0, 150, 10):
        context.remove(0, first, first + 1)
    with pytest.raises(PoolFull, match="no room for a block of 16 tokens"):
        context.import_block(1, 0, 16, block)
    context.remove(0, 155, 156)
    context.import_block(1, 0, 16, block)
    assert context.export_block(1, 0, 16) == block
    assert not context.decode([5], [16], [1], [False])


def test_a_block_behind_a_sliding_window_whose_cells_were_reused_is_not_given_out(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts("sliding-window", num_cells=256)
    compute(context, 0, 0, 10)
    compute(context, 1, 0, 246)
    context.remove(0)
    compute(context, 0, 0, 10)
    context.remove(1, 190)
    assert is_whole(context, 1, 0, 64)
    compute(context, 0, 10, 60)
    assert not is_whole(context, 1, 0, 64)
    with pytest.raises(BlockRefused, match="lacks some of 64 tokens from position 0"):
        context.export_block(1, 0, 64)


@pytest.mark.parametrize("kind", KINDS_WITH_STATES)
def test_an_imported_state_gives_the_logits_of_the_computed_one(kind: str, contexts: Callable[..., LlamaContext]) -> None:
    source, target = contexts(kind), contexts(kind, num_cells=1024, num_sequences=40, max_batch=32, num_threads=2)
    compute(source, 1, 0, 70)
    compute(target, 3, 0, 50)
    for length in (1, 2, 64, 129):
        compute(source, 0, 0, length)
        state = source.export_block(0, 0, length)
        target.import_block(7, 0, length, state)
        assert compute(source, 0, length, length + 1) == compute(target, 7, length, length + 1)
        assert source.remove(0) and target.remove(7)
        compute(source, 0, 0, length)
        assert source.export_block(0, 0, length) == state
        assert source.remove(0)
    assert compute(source, 1, 70, 71) == compute(contexts(kind), 0, 0, 71)


@pytest.mark.parametrize("kind", KINDS_WITH_STATES)
def test_numbers_that_are_not_finite_are_refused_since_they_would_outlive_their_sequence(
    kind: str, contexts: Callable[..., LlamaContext]
) -> None:
    context = contexts(kind)
    compute(context, 0, 0, 5)
    state = context.export_block(0, 0, 5)
    for number in (b"\0\0\xc0\x7f", b"\0\0\x80\xff"):
        with pytest.raises(BlockRefused, match="not finite"):
            context.import_block(1, 0, 5, state[:-64] + number * 16 if kind == "recurrent" else state[:-76] + number * 16 + state[-12:])


def test_every_byte_of_a_state_that_is_no_number_of_it_is_checked(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts("hybrid")
    compute(context, 0, 0, 4)
    form, state = context.block_format, context.export_block(0, 0, 4)
    assert form is not None
    num_refused = sum(not fits(form, bytes((*state[:at], state[at] ^ 1, *state[at + 1 :])), 0, 4) for at in range(len(state)))
    assert num_refused == len(state) - sum(row_bytes * cache.num_cells(4) for cache in form.caches for _, row_bytes in cache.rows)
    for first, count in ((0, 3), (0, 5), (1, 4)):
        assert not fits(form, state, first, count)


@pytest.mark.parametrize("kind", KINDS_WITH_BLOCKS)
def test_every_byte_that_is_not_kv_data_is_checked(kind: str, contexts: Callable[..., LlamaContext]) -> None:
    context = contexts(kind)
    compute(context, 0, 0, 20)
    form, block = context.block_format, context.export_block(0, 8, 4)
    assert form is not None and form == BlockFormat.learn(block, 4)
    refused = [offset for offset in range(len(block)) if not fits(form, flipped(block, offset), 8, 4)]
    assert len(refused) == len(block) - 4 * sum(row_bytes for cache in form.caches for _, row_bytes in cache.rows)
    for offset in refused:
        with pytest.raises(BlockRefused, match=r"not one of 4 tokens from position 8: byte \d+"):
            context.import_block(1, 8, 4, flipped(block, offset))
    assert not is_whole(context, 1, 8, 4)


def flipped(block: bytes, offset: int) -> bytes:
    changed = bytearray(block)
    changed[offset] ^= 1 << offset % 8
    return bytes(changed)


def fits(form: BlockFormat, payload: bytes, first_position: int, num_tokens: int) -> bool:
    try:
        form.check(payload, first_position, num_tokens)
    except BlockRefused:
        return False
    return True


def test_blocks_of_other_lengths_positions_counts_and_models_are_refused(contexts: Callable[..., LlamaContext]) -> None:
    context, other = contexts(), contexts("sliding-window")
    compute(context, 0, 0, 20)
    compute(other, 0, 0, 20)
    form, block = context.block_format, context.export_block(0, 8, 4)
    assert form is not None and fits(form, block, 8, 4)
    wrong = [(block[:size], 8, 4) for size in range(0, len(block), 3)]
    wrong += [(block + b"\0", 8, 4), (block * 2, 8, 4), (block, 7, 4), (block, 12, 4), (block, 8, 3), (block, 8, 5), (block, 0, 400)]
    wrong += [(other.export_block(0, 8, 4), 8, 4), (context.export_block(0, 8, 5), 8, 4)]
    assert not any(fits(form, *each) for each in wrong)


def test_what_is_not_a_block_of_a_known_form_is_not_learned(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts()
    compute(context, 0, 0, 8)
    block = context.export_block(0, 0, 8)
    for changed, count in (
        (b"", 8),
        (block[:7], 8),
        (block[:-1], 8),
        (block + b"\0", 8),
        (block + block[8:100], 8),
        (b"\1" + block, 8),
        (block, 7),
    ):
        with pytest.raises(BlockRefused, match="a form that is not known here"):
            BlockFormat.learn(changed, count)


def test_a_layouts_fingerprint_is_equal_exactly_if_all_of_it_is(contexts: Callable[..., LlamaContext]) -> None:
    dense, other, moe = (contexts(kind).block_format for kind in ("dense", "sliding-window", "moe"))
    assert dense is not None and other is not None and moe is not None
    assert dense.fingerprint("model", "64") == moe.fingerprint("model", "64")  # the model's hash tells them apart
    found = [dense.fingerprint("model", "64"), other.fingerprint("model", "64"), dense.fingerprint("m", "64"), dense.fingerprint("model64")]
    assert len(set(found)) == 4


def test_a_window_that_is_shorter_than_a_block_is_refused(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts("sliding-window")
    assert probe(context, 80) == ""
    assert "sliding window of 80 tokens is shorter than a block of 81" in probe(context, 81)
