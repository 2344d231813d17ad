"""Blocks that come in pieces: put together in order, and refused in any other."""

import pytest

from meshserve.errors import BlockRefused
from meshserve.handoff.blocks import BlockWindow, Link, check_blocks
from meshserve.handoff.intake import HalfBlock
from meshserve.wire.handoff import BlockMark, BulkHeader

FRAME_BYTES = 16_384
BLOCK = bytes(range(256)) * 200
"""Three frames and a bit."""


def pieces() -> tuple[list[BlockMark], list[bytes | memoryview]]:
    """The block, cut as a sender cuts it."""
    window = BlockWindow(1 << 20, 1 << 20, 64, FRAME_BYTES, Link())
    window.add([(0, 16, BLOCK)])
    marks, payloads = [], []
    while window.can_send:
        more = window.take()
        marks += more[0]
        payloads += more[1]
    return marks, payloads


def test_a_block_comes_out_of_its_pieces_as_it_went_in() -> None:
    marks, payloads = pieces()
    assert [len(payload) for payload in payloads] == [FRAME_BYTES] * 3 + [len(BLOCK) - 3 * FRAME_BYTES]
    half, found = HalfBlock(0, len(BLOCK), "p1", 1), None
    for mark, payload in zip(marks, payloads, strict=True):
        assert found is None
        found = half.add(mark, payload)
    assert found is not None and b"".join(found) == BLOCK


@pytest.mark.parametrize("order", [[1], [0, 2], [0, 0], [0, 1, 3]], ids=str)
def test_a_piece_that_does_not_follow_is_refused(order: list[int]) -> None:
    marks, payloads = pieces()
    half = HalfBlock(0, len(BLOCK), "p1", 1)
    with pytest.raises(BlockRefused):
        for which in order:
            half.add(marks[which], payloads[which])


def test_pieces_that_are_too_short_or_of_another_length_are_refused() -> None:
    for mark in (BlockMark(0, 16, b"", 0, len(BLOCK) - 1), BlockMark(0, 16, b"", 0, len(BLOCK))):
        with pytest.raises(BlockRefused):
            HalfBlock(0, len(BLOCK), "p1", 1).add(mark, BLOCK[:1])


def test_a_flipped_bit_in_one_piece_is_found() -> None:
    marks, payloads = pieces()
    header = BulkHeader("d", "p", "r1", 1, tuple(marks), 1.0)
    check_blocks(header, payloads)
    assert header.num_blocks == header.num_ended == 1
    damaged = bytearray(payloads[2])
    damaged[100] ^= 4
    with pytest.raises(BlockRefused):
        check_blocks(header, [*payloads[:2], bytes(damaged), payloads[3]])
