"""Block hashes, the block pool of an engine, and the prefix index that mirrors the pools of all workers.

The idea is that of PagedAttention (Kwon et al., "Efficient Memory Management for Large Language Model Serving
with PagedAttention", SOSP 2023) with vLLM's automatic prefix caching: fixed-size blocks, reference counts, full
blocks found again by the hash of their prefix, least recently used ones evicted first. The pool knows no bytes
and no sequences.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import repeat

import xxhash

from meshserve.errors import PoolFull

_SWEPT_AT_ONCE = 4096
"""Hashes looked at in one call after a worker has gone: about a millisecond. Higher frees memory sooner, lower stalls less."""


def block_hashes(tokens: "array[int]", block_size: int, salt: str) -> list[int]:
    """Hashes of the full blocks of `tokens`, in order, as non-negative 64-bit integers.

    Each is xxh3_64 over the block's token bytes, seeded with the hash of the block before it: a hash stands
    for the whole prefix. The first is seeded with the hash of `salt`, which is the model's hash, since equal
    tokens of two models are not equal KV.
    """
    data = tokens.tobytes()
    size = block_size * tokens.itemsize
    digest = xxhash.xxh3_64_intdigest
    parent = _first_parent(salt)
    hashes = []
    for start in range(0, len(data) - size + 1, size):
        parent = digest(data[start : start + size], parent)
        hashes.append(parent)
    return hashes


def prefix_hashes(tokens: "array[int]", block_size: int, salt: str) -> list[int]:
    """The hashes of the full blocks, and after them one for a partial last block."""
    hashes = block_hashes(tokens, block_size, salt)
    rest = tokens[len(hashes) * block_size :]
    if rest:
        hashes.append(xxhash.xxh3_64_intdigest(rest.tobytes(), hashes[-1] if hashes else _first_parent(salt)))
    return hashes


@lru_cache(64)  # of models: requests of one model have it in common
def _first_parent(salt: str) -> int:
    return xxhash.xxh3_64_intdigest(salt.encode())


class BlockPool:
    """`num_blocks` blocks, numbered from 0. A block is free, held (by one or more sequences), or idle: cached, not held."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_used = 0
        """Blocks that are held."""
        self._holders: dict[int, int] = {}
        self._never_used = 0
        self._free: list[int] = []
        self.idle: OrderedDict[int, None] = OrderedDict()  # a plain dict pops its head in linear time
        """Cached blocks that are not held, least recently used first."""
        self._block_of: dict[int, int] = {}
        self._hash_of: dict[int, int] = {}
        self.on_freed: Callable[[Sequence[int]], None] | None = None
        """Called with blocks whose contents are lost: they are not held, and no hash finds them any more."""
        self._is_recording = False
        self.has_changes = False
        """Whether :meth:`take_changes` has something to return."""
        self._stored: dict[int, None] = {}
        self._evicted: dict[int, None] = {}

    @property
    def num_available(self) -> int:
        """Blocks that :meth:`allocate` could give out now: free ones and idle ones."""
        return self.num_blocks - self.num_used

    def hashes(self) -> list[int]:
        """The hashes of all blocks that can be found, held or idle."""
        return list(self._block_of)

    def lookup(self, hashes: Iterable[int]) -> list[int]:
        """The blocks registered under these hashes, up to the first that is not there. Holds nothing."""
        found = []
        block_of = self._block_of
        for block_hash in hashes:
            block = block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def allocate(self, num_blocks: int) -> list[int]:
        """`num_blocks` blocks, held once each; without free ones, idle ones are evicted. Raises PoolFull and
        then changes nothing."""
        if num_blocks > self.num_blocks - self.num_used:
            raise PoolFull(f"{num_blocks} blocks are needed and {self.num_available} of {self.num_blocks} are available")
        self.num_used += num_blocks
        free, blocks = self._free, []
        if free:
            first = max(0, len(free) - num_blocks)
            blocks = free[first:]
            del free[first:]
        num_new = min(num_blocks - len(blocks), self.num_blocks - self._never_used)
        if num_new:
            blocks += range(self._never_used, self._never_used + num_new)
            self._never_used += num_new
        while len(blocks) < num_blocks:  # no block is free: the least recently used prefix loses its end
            blocks.append(self._evict())
        holders = self._holders
        for block in blocks:
            holders[block] = 1
        return blocks

    def acquire(self, prefix: Sequence[int], num_fresh: int) -> list[int]:
        """Hold the blocks of `prefix` (as found by :meth:`lookup`) and allocate `num_fresh` more: all of them, or PoolFull and none."""
        if not prefix:
            return self.allocate(num_fresh)
        idle = self.idle
        # idle blocks of the prefix count as available, and are about to be held
        available = self.num_available - sum([block in idle for block in prefix])
        if num_fresh > available:
            raise PoolFull(f"{num_fresh} blocks are needed and {available} of {self.num_blocks} are available")
        self.retain(prefix)
        return [*prefix, *self.allocate(num_fresh)]

    def retain(self, blocks: Iterable[int]) -> None:
        """Hold each of these blocks once more; they must be held or idle."""
        holders, idle = self._holders, self.idle  # looked up once: a prompt of 100k tokens has thousands of blocks
        for block in blocks:
            if block in holders:
                holders[block] += 1
            else:
                del idle[block]
                holders[block] = 1
                self.num_used += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Hold each once less. A block that is not held any more becomes idle if it is registered, else free."""
        holders, idle, hash_of = self._holders, self.idle, self._hash_of
        num_free = len(self._free)
        # the last block first: a prefix is worth more than the blocks after it, so its end is evicted before its start
        for block in reversed(blocks):
            if holders[block] > 1:
                holders[block] -= 1
                continue
            del holders[block]
            self.num_used -= 1
            if block in hash_of:
                idle[block] = None
            else:
                self._free.append(block)
        if self.on_freed is not None and len(self._free) > num_free:
            self.on_freed(self._free[num_free:])

    def evict(self, blocks: Iterable[int]) -> bool:
        """Forget these blocks if none is held; else nothing changes, and the answer is False."""
        evicted = list(blocks)
        if not all(block in self.idle for block in evicted):
            return False
        for block in evicted:
            self._forget(block)
            del self.idle[block]
            self._free.append(block)
        return True

    def register(self, blocks: Sequence[int], hashes: Sequence[int]) -> int:
        """Make full, held blocks known under their hashes; returns how many became known."""
        block_of, hash_of, num_registered = self._block_of, self._hash_of, 0
        for block, block_hash in zip(blocks, hashes, strict=True):
            assert block in self._holders, "only a held block can be registered"
            if block_hash in block_of or block in hash_of:
                continue  # two sequences computed the same block: the first stays known
            block_of[block_hash] = block
            hash_of[block] = block_hash
            num_registered += 1
            # `pop` returns 0 where the hash was not there: an eviction that was not told yet cancels out
            if self._is_recording and self._evicted.pop(block_hash, 0) == 0:
                self._stored[block_hash] = None
        self.has_changes = self._is_recording
        return num_registered

    def evict_idle(self) -> None:
        """Forget all idle blocks: their contents are lost."""
        while self.idle:
            self._free.append(self._evict())

    def record_changes(self, is_recording: bool) -> None:
        """Whether to keep changes for :meth:`take_changes`; at first none are kept."""
        self._is_recording, self.has_changes = is_recording, False
        self._stored, self._evicted = {}, {}

    def take_changes(self) -> tuple[list[int], list[int]]:
        """Hashes stored and hashes evicted since the last call. Net: a block that came and went is in neither."""
        changes = list(self._stored), list(self._evicted)
        self._stored, self._evicted, self.has_changes = {}, {}, False
        return changes

    def _evict(self) -> int:
        block, _ = self.idle.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        if self._is_recording and self._stored.pop(block_hash, 0) == 0:
            self._evicted[block_hash] = None
        self.has_changes = self._is_recording
        if self.on_freed is not None:
            self.on_freed([block])


# --- the pools of all workers, as a router knows them


class PrefixIndex:
    """Which worker holds which prefix: what a router knows of all workers' block pools.

    A lookup goes along the prompt's hashes until nobody holds one. Workers are bits of an integer: the garbage
    collector does not walk one dict of integers, however many blocks there are. A block costs about 90 bytes,
    however many workers hold it (measured by `bench.index`).
    """

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._bits: dict[str, int] = {}
        self._free_bits: list[int] = []
        self._num_bits = 0
        self._num_blocks: dict[str, int] = {}
        # bits of workers that are gone are swept out in small steps: a million entries at once take 0.1 s
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
        """The worker holds these no longer; returns those that no worker holds any more. Unknown hashes are ignored."""
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
        """The worker is gone, or its watch begins anew: it holds nothing. The memory is freed in later calls."""
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
            if held != alive:  # the prefix of some workers ends before this block
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
        """Take the bits of workers that are gone out of some more entries; after the last, new workers get them."""
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
