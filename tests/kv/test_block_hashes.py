"""Chained hashes: equal hashes, equal prefixes."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from meshserve.kv.pool import block_hashes, prefix_hashes

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=64).map(lambda found: array("I", found))


@given(TOKENS, st.integers(1, 9))
def test_only_full_blocks_have_a_hash(tokens: "array[int]", block_size: int) -> None:
    hashes = block_hashes(tokens, block_size, "model")
    assert len(hashes) == len(tokens) // block_size
    assert all(0 <= found < 2**64 for found in hashes)


@given(TOKENS, TOKENS, st.integers(1, 9))
def test_prompts_share_exactly_the_hashes_of_their_common_whole_blocks(one: "array[int]", other: "array[int]", block_size: int) -> None:
    common = next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    hashes = zip(block_hashes(one, block_size, "model"), block_hashes(other, block_size, "model"), strict=False)
    assert sum(a == b for a, b in hashes) == common // block_size


def test_equal_blocks_after_different_prefixes_have_different_hashes() -> None:
    assert block_hashes(array("I", [1, 2, 9, 9]), 2, "m")[1] != block_hashes(array("I", [1, 3, 9, 9]), 2, "m")[1]


def test_another_model_has_other_hashes_for_the_same_tokens() -> None:
    tokens = array("I", range(8))
    assert not set(block_hashes(tokens, 2, "one")) & set(block_hashes(tokens, 2, "other"))


def test_a_partial_last_block_has_a_hash_of_all_tokens_too() -> None:
    tokens = array("I", range(10))
    assert prefix_hashes(tokens, 4, "m")[:2] == block_hashes(tokens, 4, "m")
    assert len(prefix_hashes(tokens, 4, "m")) == 3 and len(prefix_hashes(tokens[:8], 4, "m")) == 2
    others = tokens[:9], array("I", [9, *range(1, 10)])
    assert prefix_hashes(tokens, 4, "m")[2] not in [prefix_hashes(other, 4, "m")[2] for other in others]
    assert len({prefix_hashes(array("I", [1]), 4, salt)[0] for salt in "ab"}) == 2
