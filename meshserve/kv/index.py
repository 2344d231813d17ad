"""Which worker holds which prefix: what a router knows of all workers' block pools. Pure.

A block's hash stands for its whole prefix, so a lookup goes along the prompt's hashes until nobody holds one. Workers are bits of
an integer: one dict of integers, which the garbage collector does not walk, however many blocks there are. A block costs about 90
bytes, whoever holds it (measured by `bench.index`).
"""

from collections.abc import Iterable, Sequence
from itertools import repeat

_SWEPT_AT_ONCE = 4096
"""Hashes looked at in one call after a worker has gone: about a millisecond. Higher frees memory sooner, lower stalls less."""


class PrefixIndex:
    """Block hashes and the workers that hold them."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._bits: dict[str, int] = {}
        self._free_bits: list[int] = []
        self._num_bits = 0
        self._num_blocks: dict[str, int] = {}
        # the bits of workers that are gone stay in the dict for a while: taking them out of a million entries at once takes 0.1 s
        self._gone = 0
        self._being_swept = 0
        self._to_sweep: list[int] = []

    def __len__(self) -> int:
        return len(self._holders)

    def num_blocks(self, worker: str) -> int:
        """Blocks that this worker holds."""
        return self._num_blocks.get(worker, 0)

    def held_by(self, worker: str) -> set[int]:
        """All of them. Walks the whole index: for checks, not for routing."""
        bit = self._bits.get(worker, 0)
        return {block_hash for block_hash, holders in self._holders.items() if holders & bit}

    def stored(self, worker: str, hashes: Iterable[int]) -> None:
        """The worker holds these blocks now. Saying so twice changes nothing."""
        bit = self._bits.get(worker) or self._new_bit(worker)
        holders, added = self._holders, 0
        for block_hash in hashes:
            before = holders.get(block_hash)
            if before is None:
                holders[block_hash] = bit  # the same object for all of a worker's blocks: `0 | bit` would be a new one each
                added += 1
            elif not before & bit:
                holders[block_hash] = before | bit
                added += 1
        self._num_blocks[worker] += added
        if self._gone or self._being_swept:
            self._sweep()

    def evicted(self, worker: str, hashes: Iterable[int]) -> list[int]:
        """The worker holds these no longer; returns those that nobody holds any more. Unknown ones are ignored."""
        bit = self._bits.get(worker) or self._new_bit(worker)
        lost, removed = [], 0
        gone = self._gone | self._being_swept
        for block_hash in hashes:
            before = self._holders.get(block_hash, 0)
            if before & bit:
                removed += 1
                self._set(block_hash, before & ~bit & ~gone)
                if not before & ~bit & ~gone:
                    lost.append(block_hash)
        self._num_blocks[worker] -= removed
        if self._gone or self._being_swept:
            self._sweep()
        return lost

    def forget(self, worker: str) -> None:
        """The worker is gone, or its watch begins anew: it holds nothing, at once. The memory is freed bit by bit in later calls."""
        bit = self._bits.pop(worker, None)
        self._num_blocks.pop(worker, None)
        if bit is not None:
            self._gone |= bit
            self._sweep()

    def overlaps(self, hashes: Sequence[int], workers: Sequence[str]) -> list[int]:
        """For each worker, how many blocks of this prompt it holds from the start on."""
        bits = list(map(self._bits.get, workers, repeat(0)))
        alive = 0
        for bit in bits:
            alive |= bit
        everybody, depth, get = alive, 0, self._holders.get
        depth_of: dict[int, int] = {}
        for block_hash in hashes:
            held = get(block_hash, 0) & alive
            if held != alive:
                if not held:
                    break
                _note(depth_of, alive ^ held, depth)
                alive = held
            depth += 1
        if alive == everybody:  # nearly always: a prefix that all hold, or none at all
            return [depth if bit else 0 for bit in bits] if depth and 0 in bits else [depth] * len(bits)
        _note(depth_of, alive, depth)
        return [depth_of.get(bit, 0) for bit in bits]

    def _set(self, block_hash: int, holders: int) -> None:
        if holders:
            self._holders[block_hash] = holders
        else:
            del self._holders[block_hash]

    def _new_bit(self, worker: str) -> int:
        if not self._free_bits:
            self._free_bits.append(1 << self._num_bits)
            self._num_bits += 1
        bit = self._bits[worker] = self._free_bits.pop()
        self._num_blocks[worker] = 0
        return bit

    def _sweep(self) -> None:
        """Take the bits of workers that are gone out of some more entries; once through, give them to others."""
        if not self._being_swept:
            self._being_swept, self._gone = self._gone, 0
            self._to_sweep = list(self._holders)
        mask, holders = self._being_swept, self._holders
        for block_hash in self._to_sweep[-_SWEPT_AT_ONCE:]:
            before = holders.get(block_hash, 0)
            if before & mask:
                self._set(block_hash, before & ~mask)
        del self._to_sweep[-_SWEPT_AT_ONCE:]
        if not self._to_sweep:
            self._free_bits += _bits_of(mask)
            self._being_swept = 0


def _bits_of(mask: int) -> list[int]:
    bits = []
    while mask:
        bits.append(mask & -mask)
        mask &= mask - 1
    return bits


def _note(depth_of: dict[int, int], mask: int, depth: int) -> None:
    for bit in _bits_of(mask):
        depth_of[bit] = depth
