"""Blocks set aside by a decode engine while another worker computes what goes into them."""

from array import array
from collections.abc import Callable

from meshserve.engines.dummy.contents import KVContents
from meshserve.errors import BlockRefused
from meshserve.kv.pool import BlockPool


class DummyReservation:
    """Holds all the blocks of a prompt but for its last token: those that were cached, and room for those that were not."""

    def __init__(
        self,
        tokens: "array[int]",
        hashes: list[int],
        pool: BlockPool,
        contents: KVContents,
        on_release: Callable[["DummyReservation"], None],
    ) -> None:
        self.tokens = tokens
        self.hashes = hashes
        self.num_tokens = len(tokens) - 1
        self._contents = contents
        self._on_release = on_release
        size = contents.block_size
        prefix = pool.lookup(hashes[: self.num_tokens // size])
        # room for the last token too: two full reservations that each wait for one more block would wait for ever
        self.blocks = pool.acquire(prefix, -(-len(tokens) // size) - len(prefix))
        self.num_cached_tokens = len(prefix) * size
        self._missing = dict.fromkeys(range(len(prefix), -(-self.num_tokens // size)))
        self._next_digest = len(prefix)
        self.is_open = True

    def missing(self) -> list[int]:
        """Indexes of the blocks that are still to be written, ascending."""
        return list(self._missing)

    def expected_bytes(self, index: int) -> int:
        """Length of block `index`'s payload in bytes."""
        size = self._contents.block_size
        return min(size, self.num_tokens - index * size) * self._contents.kv_bytes_per_token

    def write(self, index: int, payload: bytes | memoryview) -> None:
        """Take in block `index`, in any order, once. Raises BlockRefused if it is not missing or its length is wrong."""
        if not self.is_open:
            raise BlockRefused(f"block {index} came after its reservation had ended")
        if index not in self._missing:
            raise BlockRefused(f"block {index} is not missing")
        size_bytes = memoryview(payload).nbytes
        if size_bytes != self.expected_bytes(index):
            raise BlockRefused(f"block {index} has {size_bytes} bytes instead of {self.expected_bytes(index)}")
        rows = bytes(payload)
        self._contents.write(self.blocks[index], rows)
        del self._missing[index]
        self._digest_what_is_complete(index, rows)

    def release(self) -> None:
        """Give the blocks back. Harmless after `generate` took the reservation (`is_open` is False), and when called twice."""
        if self.is_open:
            self.is_open = False
            self._on_release(self)

    def _digest_what_is_complete(self, written: int, rows: bytes) -> None:
        """A digest needs that of the block before: what came ahead of its turn waits. A partial last block is digested by its reader."""
        num_full = self.num_tokens // self._contents.block_size
        while self._next_digest < num_full and self._next_digest not in self._missing:
            self._contents.digest(self.blocks, self._next_digest, rows if self._next_digest == written else None)
            self._next_digest += 1
