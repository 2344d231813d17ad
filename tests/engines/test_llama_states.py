"""Whole states in pieces, without llama.cpp."""

import random

import pytest

from meshserve.engines.llama.blocks import StatePieces, cut
from meshserve.errors import BlockRefused

STATE = random.Random(1).randbytes(1003)


@pytest.mark.parametrize("num_pieces", [1, 2, 7, 1003, 1500])
def test_pieces_in_any_order_make_the_state(num_pieces: int) -> None:
    pieces, found = cut(STATE, num_pieces), StatePieces(len(STATE), num_pieces)
    order = random.Random(2).sample(range(num_pieces), num_pieces)
    assert [found.add([(index, pieces[index])]) for index in order] == [False] * (num_pieces - 1) + [True]
    assert found.joined() == STATE
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_what_is_not_this_piece_is_refused() -> None:
    pieces, found = cut(STATE, 4), StatePieces(len(STATE), 4)
    for unfit in (b"", pieces[1][:-1], pieces[1] + b"\0", pieces[1] * 2, pieces[2], pieces[0]):
        with pytest.raises(BlockRefused, match="not piece 1 of a state in 4 pieces"):
            found.add([(1, unfit)])


def test_pieces_of_two_states_are_not_joined_until_the_wrong_one_is_replaced() -> None:
    pieces, others, found = cut(STATE, 3), cut(STATE[::-1], 3), StatePieces(len(STATE), 3)
    for index in range(3):
        found.add([(index, pieces[index])])
    for wrong in (others[1], pieces[1][:-1] + bytes([pieces[1][-1] ^ 1])):
        assert found.add([(1, wrong)])
        with pytest.raises(BlockRefused, match="not of one state"):
            found.joined()
    assert found.add([(1, pieces[1])])
    assert found.joined() == STATE
