"""Which worker holds which prefix: what a router knows of all workers' block pools. Pure.

A block's hash stands for its whole prefix, so a lookup goes along the prompt's hashes until nobody holds one. Workers are bits of
an integer: one dict of integers, which the garbage collector does not walk, however many blocks there are.
"""

from collections.abc import Iterable, Sequence


class PrefixIndex:
    """Block hashes and the workers that hold them."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._bits: dict[str, int] = {}
        self._free_bits: list[int] = []
        self._num_blocks: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def num_blocks(self, worker: str) -> int:
        """Blocks that this worker holds."""
        return self._num_blocks.get(worker, 0)

    def stored(self, worker: str, hashes: Iterable[int]) -> None:
        """The worker holds these blocks now. Saying so twice changes nothing."""
        bit = self._bit(worker)
        holders, added = self._holders, 0
        for block_hash in hashes:
            before = holders.get(block_hash, 0)
            if not before & bit:
                holders[block_hash] = before | bit
                added += 1
        self._num_blocks[worker] += added

    def evicted(self, worker: str, hashes: Iterable[int]) -> list[int]:
        """The worker holds these no longer; returns those that nobody holds any more. Unknown ones are ignored."""
        bit = self._bit(worker)
        lost = []
        for block_hash in hashes:
            before = self._holders.get(block_hash, 0)
            if before & bit:
                self._num_blocks[worker] -= 1
                self._set(block_hash, before & ~bit)
                if before == bit:
                    lost.append(block_hash)
        return lost

    def forget(self, worker: str) -> None:
        """The worker is gone, or its watch begins anew: it holds nothing."""
        bit = self._bits.pop(worker, None)
        self._num_blocks.pop(worker, None)
        if bit is None:
            return
        for block_hash in [found for found, holders in self._holders.items() if holders & bit]:
            self._set(block_hash, self._holders[block_hash] & ~bit)
        self._free_bits.append(bit)

    def overlaps(self, hashes: Sequence[int], workers: Sequence[str]) -> list[int]:
        """For each worker, how many blocks of this prompt it holds from the start on."""
        depths = dict.fromkeys(workers, 0)
        alive = {self._bits[worker]: worker for worker in workers if worker in self._bits}
        mask = sum(alive)
        for depth, block_hash in enumerate(hashes, 1):
            held = self._holders.get(block_hash, 0) & mask
            if held != mask:
                for bit in [bit for bit in alive if not held & bit]:
                    depths[alive.pop(bit)] = depth - 1
                mask = held
            if not mask:
                break
        for worker in alive.values():
            depths[worker] = len(hashes)
        return [depths[worker] for worker in workers]

    def _set(self, block_hash: int, holders: int) -> None:
        if holders:
            self._holders[block_hash] = holders
        else:
            del self._holders[block_hash]

    def _bit(self, worker: str) -> int:
        if worker not in self._bits:
            self._bits[worker] = self._free_bits.pop() if self._free_bits else 1 << len(self._bits)
            self._num_blocks[worker] = 0
        return self._bits[worker]
