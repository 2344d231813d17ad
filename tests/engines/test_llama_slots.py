"""Which sequence of a llama.cpp context holds which blocks, without llama.cpp: the operations are played on sets of cells."""

import random
from typing import Any

import pytest

from meshserve.engines.llama import slots as slots_module
from meshserve.engines.llama.slots import Operation, Slots
from meshserve.errors import PoolFull
from meshserve.kv.pool import BlockPool

SIZE = 4


class Owner:
    """A sequence, of hashed blocks and one more."""

    def __init__(self, pool: BlockPool, hashes: list[int]) -> None:
        self.hashes = hashes
        self.state: Any = None
        self.num_computed = 0
        prefix = pool.lookup(hashes)
        self.num_prefix = len(prefix)
        self.blocks = pool.acquire(prefix, len(hashes) + 1 - len(prefix))

    def compute(self, pool: BlockPool) -> None:
        for block, block_hash in zip(self.blocks, self.hashes, strict=False):
            pool.register([block], [block_hash])

    def end(self, pool: BlockPool) -> None:
        blocks, self.blocks = self.blocks, []
        pool.release(blocks)


class Cells:
    """Cells in a row, as a context takes them: what each sequence has, where, and what is in it."""

    def __init__(self) -> None:
        self.found: dict[int, dict[int, int]] = {}
        """Cell by sequence and position."""
        self.content: dict[int, int] = {}
        self.removed: set[int] = set()
        self.head = 0

    def take(self, content: int) -> int:
        while self.head in self.content:
            self.head += 1
        self.content[self.head] = content
        return self.head

    def play(self, slots: Slots) -> None:
        self.play_all(slots.take_operations())

    def play_all(self, operations: list[Operation]) -> None:
        for name, *arguments in operations:
            getattr(self, name)(*arguments)

    def share(self, source: int, target: int, first_position: int, end_position: int) -> None:
        found = self.found.setdefault(target, {})
        found |= {position: self.found[source][position] for position in range(first_position, end_position)}

    def remove(self, sequence: int, first_position: int = 0, end_position: int = 1000) -> None:
        for position in range(first_position, end_position):
            cell = self.found.get(sequence, {}).pop(position, None)
            if cell is not None and not any(cell in cells.values() for cells in self.found.values()):
                self.removed.add(cell)

    def move(self, sequences: tuple[int, ...], first_position: int, num_tokens: int) -> None:
        first, end_position = self.found[sequences[0]], first_position + num_tokens
        content = [self.content[first[position]] for position in range(first_position, end_position)]
        assert len({tuple(self.found[sequence][place] for place in range(first_position, end_position)) for sequence in sequences}) == 1
        for sequence in sequences:
            self.remove(sequence, first_position, end_position)
        for position, found in enumerate(content, first_position):
            cell = self.take(found)
            for sequence in sequences:
                self.found[sequence][position] = cell

    def release_removed(self) -> None:
        for cell in self.removed:
            del self.content[cell]
        self.head, self.removed = 0, set()

    def compute(self, owner: Owner) -> None:
        cells = self.found.setdefault(owner.state.number, {})
        start = owner.num_prefix * SIZE
        assert sorted(cells) == list(range(start)), "what a sequence goes on from is there, and nothing else"
        assert [self.content[cells[index * SIZE]] for index in range(owner.num_prefix)] == owner.hashes[: owner.num_prefix]
        for position in range(start, len(owner.hashes) * SIZE + 1):
            cells[position] = self.take(owner.hashes[position // SIZE] if position // SIZE < len(owner.hashes) else -1)
        owner.num_computed = len(cells)
        self.check_order(owner)

    def check_order(self, owner: Owner) -> None:
        cells = self.found[owner.state.number]
        assert [cells[position] for position in sorted(cells)] == sorted(cells.values()), "cells follow each other as positions do"


def run(slots: Slots, pool: BlockPool, cells: Cells, owner: Owner) -> Owner:
    slots.release_removed()
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
    slots, running = Slots(3, pool, SIZE), []  # type: Slots, list[Owner]
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


@pytest.mark.parametrize("seed", range(30))
def test_cells_follow_each_other_as_positions_do_whatever_is_released_and_when(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "_FEWEST_RELEASED", 8)
    monkeypatch.setattr(slots_module, "_MOST_REMOVED", 16)
    rnd, pool, cells = random.Random(seed), BlockPool(40), Cells()
    slots, running, num_releases = Slots(8, pool, SIZE), list[Owner](), 0
    for _ in range(300):
        if len(running) == 3 or (running and rnd.random() < 0.4):
            running.pop(rnd.randrange(len(running))).end(pool)
            continue
        number, length = rnd.randrange(3), rnd.randrange(6)
        running.append(run(slots, pool, cells, Owner(pool, [1000 * number * (index > 0) + index for index in range(length)])))
        for owner in running:
            cells.check_order(owner)
        num_releases += cells.head < 100
        assert len(cells.content) <= 40 * SIZE + 200
    assert num_releases


def test_long_sequences_are_moved_no_more_often_than_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "_MOST_REMOVED", 16)
    pool, cells = BlockPool(200), Cells()
    slots = Slots(8, pool, SIZE)
    for number in range(2):
        run(slots, pool, cells, Owner(pool, [1000 * number + index for index in range(20)]))
    num_removed = num_releases = 0
    for number in range(40):
        owner = run(slots, pool, cells, Owner(pool, [1_000_000 + number]))
        owner.end(pool)
        pool.evict_idle()
        num_removed += 2 * SIZE
        slots.release_removed()
        operations = slots.take_operations()
        num_releases += ("release_removed",) in operations
        cells.play_all(operations)
    assert 1 < num_releases <= num_removed // 16
