"""Which sequence of a llama.cpp context holds which blocks, without llama.cpp: the operations are played on sets of cells."""

import random
from typing import Any

import pytest

from meshserve.engines.llama.slots import Share, Slots
from meshserve.errors import PoolFull
from meshserve.kv.pool import BlockPool

SIZE = 4


class Owner:
    """A sequence, of hashed blocks and one more."""

    def __init__(self, pool: BlockPool, hashes: list[int]) -> None:
        self.hashes = hashes
        self.state: Any = None
        prefix = pool.lookup(hashes)
        self.num_prefix = len(prefix)
        self.blocks = pool.acquire(prefix, len(hashes) + 1 - len(prefix))

    def compute(self, pool: BlockPool) -> None:
        for block, block_hash in zip(self.blocks, self.hashes, strict=False):
            pool.register(block, block_hash)

    def end(self, pool: BlockPool) -> None:
        blocks, self.blocks = self.blocks, []
        pool.release(blocks)


class Cells:
    """Contents by sequence and position: what a context would have."""

    def __init__(self) -> None:
        self.found: dict[int, dict[int, int]] = {}

    def play(self, slots: Slots) -> None:
        for operation in slots.take_operations():
            positions = range(operation.first_position, min(operation.end_position, 1000))
            if isinstance(operation, Share):
                source, target = self.found[operation.source], self.found.setdefault(operation.target, {})
                target |= {position: source[position] for position in positions}
            else:
                for position in positions:
                    self.found.get(operation[0], {}).pop(position, None)

    def compute(self, owner: Owner) -> None:
        cells = self.found.setdefault(owner.state.number, {})
        start = owner.num_prefix * SIZE
        assert sorted(cells) == list(range(start)), "what a sequence goes on from is there, and nothing else"
        assert [cells[index * SIZE] for index in range(owner.num_prefix)] == owner.hashes[: owner.num_prefix]
        for position in range(start, len(owner.hashes) * SIZE + 1):
            cells[position] = owner.hashes[position // SIZE] if position // SIZE < len(owner.hashes) else -1


def run(slots: Slots, pool: BlockPool, cells: Cells, owner: Owner) -> Owner:
    owner.state = slots.open(owner, owner.num_prefix)
    cells.play(slots)
    cells.compute(owner)
    owner.compute(pool)
    return owner


def test_a_sequence_goes_on_in_the_chain_that_it_needs_if_no_other_slot_is_left() -> None:
    pool, cells = BlockPool(20), Cells()
    slots = Slots(2, pool, SIZE)
    run(slots, pool, cells, Owner(pool, [1, 2, 3])).end(pool)
    held = run(slots, pool, cells, Owner(pool, [9]))
    again = run(slots, pool, cells, Owner(pool, [1, 2, 7]))
    assert (again.num_prefix, again.state.number) == (2, 0)
    assert pool.lookup([1, 2, 3]) == again.blocks[:2]
    with pytest.raises(PoolFull):
        slots.open(Owner(pool, [4]), 0)
    held.end(pool)
    run(slots, pool, cells, Owner(pool, [4]))


def test_sequences_of_one_step_that_go_on_from_one_chain_are_opened_in_some_order() -> None:
    pool, cells = BlockPool(20), Cells()
    slots = Slots(2, pool, SIZE)
    run(slots, pool, cells, Owner(pool, [1, 2, 3])).end(pool)
    run(slots, pool, cells, Owner(pool, [8])).end(pool)
    short, long = Owner(pool, [1]), Owner(pool, [1, 2, 3])
    slots.open(short, short.num_prefix)  # takes the other chain's slot
    assert slots.open(long, long.num_prefix).number == 0


@pytest.mark.parametrize("seed", range(30))
def test_whatever_comes_and_goes_a_sequence_finds_its_prefix_and_a_slot(seed: int) -> None:
    rnd, pool, cells = random.Random(seed), BlockPool(14), Cells()
    slots = Slots(3, pool, SIZE)
    running: list[Owner] = []
    for _ in range(300):
        if len(running) == 3 or (running and rnd.random() < 0.4):
            running.pop(rnd.randrange(len(running))).end(pool)
            continue
        number = rnd.randrange(4)
        hashes = [1 if index == 0 else 1000 * (number if index > 1 else number // 2) + 10 + index for index in range(rnd.randrange(4))]
        try:
            owner = Owner(pool, hashes)
        except PoolFull:
            continue
        running.append(run(slots, pool, cells, owner))
    assert slots.num_available == 3 - len(running)
