"""The block pool: tables for its rules, and a random walk for its invariants."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshserve.errors import PoolFull
from meshserve.kv.pool import BlockPool


def idle_chain(pool: BlockPool, hashes: list[int]) -> list[int]:
    blocks = pool.allocate(len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.register([block], [block_hash])
    pool.release(blocks)
    return blocks


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    with pytest.raises(PoolFull):
        pool.allocate(2)
    assert (pool.num_used, pool.num_available) == (2, 1)


def test_lookup_stops_at_the_first_hash_that_is_not_there() -> None:
    pool = BlockPool(4)
    blocks = idle_chain(pool, [10, 11, 13])
    assert pool.lookup([10, 11, 12, 13]) == blocks[:2]


def test_the_first_block_registered_under_a_hash_keeps_it() -> None:
    pool = BlockPool(4)
    one, other = pool.allocate(2)
    assert pool.register([one], [7])
    assert not pool.register([other], [7])
    pool.release([one, other])
    assert pool.lookup([7]) == [one]
    assert len(pool.idle) == 1


def test_the_least_recently_used_chain_is_evicted_first_and_from_its_end() -> None:
    pool = BlockPool(4)
    idle_chain(pool, [1, 2])
    idle_chain(pool, [3, 4])
    pool.acquire(pool.lookup([1, 2]), 0)
    pool.allocate(1)
    assert pool.hashes() == [1, 2, 3]


def test_acquire_never_evicts_the_prefix_it_was_given() -> None:
    pool = BlockPool(3)
    idle_chain(pool, [1, 2, 3])
    with pytest.raises(PoolFull):
        pool.acquire(pool.lookup([1, 2]), 2)
    assert pool.num_used == 0
    assert len(pool.acquire(pool.lookup([1, 2]), 1)) == 3
    assert pool.hashes() == [1, 2]


def test_what_came_and_went_between_two_looks_is_not_reported() -> None:
    pool = BlockPool(1)
    pool.record_changes(True)
    idle_chain(pool, [1])
    idle_chain(pool, [2])
    assert pool.take_changes() == ([2], [])
    idle_chain(pool, [3])
    idle_chain(pool, [2])
    assert pool.take_changes() == ([], [])


class PoolWalk(RuleBasedStateMachine):
    """Holders come and go; a replica is kept up to date from the reported changes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.pool.record_changes(True)
        self.held: list[list[int]] = []
        self.replica: set[int] = set()

    @rule(num_blocks=st.integers(0, 7))
    def allocate(self, num_blocks: int) -> None:
        available = self.pool.num_available
        try:
            self.held.append(self.pool.allocate(num_blocks))
        except PoolFull:
            assert num_blocks > available
        else:
            assert num_blocks <= available

    @rule(hashes=st.lists(st.integers(0, 9), max_size=4, unique=True), num_fresh=st.integers(0, 3))
    def acquire(self, hashes: list[int], num_fresh: int) -> None:
        prefix = self.pool.lookup(hashes)
        try:
            blocks = self.pool.acquire(prefix, num_fresh)
        except PoolFull:
            return
        assert blocks[: len(prefix)] == prefix
        assert self.pool.lookup(hashes)[: len(prefix)] == prefix
        self.held.append(blocks)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), block_hash=st.integers(0, 9))
    def register(self, data: st.DataObject, block_hash: int) -> None:
        block = data.draw(st.sampled_from([block for blocks in self.held for block in blocks]))
        was_known = bool(self.pool.lookup([block_hash]))
        if self.pool.register([block], [block_hash]):
            assert not was_known
            assert self.pool.lookup([block_hash]) == [block]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def follow(self) -> None:
        stored, evicted = self.pool.take_changes()
        assert not set(stored) & self.replica
        assert set(evicted) <= self.replica
        self.replica = (self.replica | set(stored)) - set(evicted)
        assert self.replica == set(self.pool.hashes())

    @invariant()
    def every_block_is_free_held_or_idle(self) -> None:
        held = {block for blocks in self.held for block in blocks}
        known = self.pool.hashes()
        blocks = [self.pool.lookup([block_hash])[0] for block_hash in known]
        assert len(set(blocks)) == len(blocks)
        assert self.pool.num_used == len(held)
        assert len(self.pool.idle) == len(set(blocks) - held)
        assert self.pool.num_used + self.pool.num_available == self.pool.num_blocks


PoolWalk.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_random_walks_keep_every_block_accounted_for = PoolWalk.TestCase
