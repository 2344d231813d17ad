"""Blocks set aside by a decode engine while another worker computes what goes into them."""

from collections.abc import Callable
from typing import Any

from meshserve.errors import BlockRefused, MeshserveError
from meshserve.kv.pool import BlockPool
from meshserve.wire.generation import GenerateRequest

WriteDone = Callable[[MeshserveError | None], None]
"""Called once, on the event loop, when a written block is in the KV cache (None) or was refused."""


class BlockReservation:
    """Holds all the blocks of a prompt: those that were cached, and room for those that were not. Raises PoolFull without room.

    `write_block` is the model runner's, which takes them in.
    """

    def __init__(
        self,
        request: GenerateRequest,
        hashes: list[int],
        pool: BlockPool,
        block_size: int,
        write_block: Callable[["BlockReservation", int, bytes, WriteDone], None],
        on_release: Callable[["BlockReservation"], None],
    ) -> None:
        self.tokens, self.num_tokens, self.block_size = request.tokens, len(request.tokens) - 1, block_size
        self._write_block, self._on_release = write_block, on_release
        prefix = pool.lookup(hashes[: self.num_tokens // block_size])
        # room for the last token too: two full reservations that each wait for one more block would wait for ever
        self.blocks = pool.acquire(prefix, -(-len(request.tokens) // block_size) - len(prefix))
        self.num_cached_tokens = len(prefix) * block_size
        self.unwritten: dict[int, WriteDone | None] = dict.fromkeys(range(len(prefix), -(-self.num_tokens // block_size)))
        """By index: who waits for a block that the engine is taking in; None if it is still missing."""
        self.is_open = True
        self.state: Any = None
        """The model runner's own; the generation that takes the reservation over gets it."""

    def missing(self) -> list[int]:
        """Indexes of the blocks that are still to be written, ascending."""
        return [index for index, on_done in self.unwritten.items() if on_done is None]

    @property
    def is_complete(self) -> bool:
        """All blocks are written, and the engine has them."""
        return not self.unwritten

    def tokens_in(self, index: int) -> int:
        """Of block `index`: whole blocks but for a partial last one."""
        return min(self.block_size, self.num_tokens - index * self.block_size)

    def write(self, index: int, payload: bytes | memoryview, on_done: WriteDone) -> None:
        """Take in block `index`, in any order, once. `on_done` is called once, perhaps within this call, unless it raises.

        Raises BlockRefused if the block is not missing, or its payload is not what this place demands; it is missing then as before.
        """
        if not self.is_open:
            raise BlockRefused(f"block {index} came after its reservation had ended")
        if self.unwritten.get(index, on_done) is not None:
            raise BlockRefused(f"block {index} is not missing")
        self.unwritten[index] = on_done
        try:
            self._write_block(self, index, bytes(payload), lambda error: self._written(index, error))
        except BlockRefused:
            self.unwritten[index] = None
            raise

    def _written(self, index: int, error: MeshserveError | None) -> None:
        on_done = self.unwritten.get(index)
        if on_done is None:  # the engine failed meanwhile, and whoever wrote it knows
            return
        if error is None:
            del self.unwritten[index]
        else:
            self.unwritten[index] = None
        on_done(error)

    def fail(self, error: MeshserveError) -> None:
        """The engine can compute no more: blocks that it was still to confirm are lost."""
        for index in list(self.unwritten):
            self._written(index, error)

    def release(self) -> None:
        """Give the blocks back. Harmless after `generate` took the reservation (`is_open` is False), and when called twice."""
        if self.is_open:
            self.is_open = False
            self._on_release(self)
