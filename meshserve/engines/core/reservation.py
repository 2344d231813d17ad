"""Blocks set aside by a decode engine while another worker computes what goes into them."""

from collections.abc import Callable
from typing import Any, Protocol

from meshserve.errors import BlockRefused, MeshserveError
from meshserve.kv.pool import BlockPool
from meshserve.wire.generation import GenerateRequest


class BlockWriter(Protocol):
    """What takes a reservation's blocks in: the model runner."""

    def write_block(
        self, reservation: "BlockReservation", index: int, payload: bytes, on_done: Callable[[MeshserveError | None], None]
    ) -> None:
        """See :class:`~meshserve.engines.core.runner.ModelRunner`."""


class BlockReservation:
    """Holds all the blocks of a prompt: those that were cached, and room for those that were not. Raises PoolFull without room."""

    def __init__(
        self,
        request: GenerateRequest,
        hashes: list[int],
        pool: BlockPool,
        block_size: int,
        writer: BlockWriter,
        on_release: Callable[["BlockReservation"], None],
    ) -> None:
        self.tokens, self.hashes = request.tokens, hashes
        self.num_tokens = len(request.tokens) - 1
        self.block_size = block_size
        self._writer, self._on_release = writer, on_release
        prefix = pool.lookup(hashes[: self.num_tokens // block_size])
        # room for the last token too: two full reservations that each wait for one more block would wait for ever
        self.blocks = pool.acquire(prefix, -(-len(request.tokens) // block_size) - len(prefix))
        self.num_cached_tokens = len(prefix) * block_size
        self._missing = dict.fromkeys(range(len(prefix), -(-self.num_tokens // block_size)))
        self._unconfirmed: dict[int, Callable[[MeshserveError | None], None]] = {}
        self.is_open = True
        self.state: Any = None
        """The model runner's own; the generation that takes the reservation over gets it."""

    def missing(self) -> list[int]:
        """Indexes of the blocks that are still to be written, ascending."""
        return sorted(self._missing)

    @property
    def num_unwritten(self) -> int:
        """Blocks that the engine does not have yet."""
        return len(self._missing) + len(self._unconfirmed)

    @property
    def is_complete(self) -> bool:
        """All blocks are written, and the engine has them."""
        return not self.num_unwritten

    def tokens_in(self, index: int) -> int:
        """Of block `index`: whole blocks but for a partial last one."""
        return min(self.block_size, self.num_tokens - index * self.block_size)

    def write(self, index: int, payload: bytes | memoryview, on_done: Callable[[MeshserveError | None], None]) -> None:
        """Take in block `index`, in any order, once. `on_done` is called once, perhaps within this call, unless it raises.

        Raises BlockRefused if the block is not missing, or its payload is not what this place demands; it is missing then as before.
        """
        if not self.is_open:
            raise BlockRefused(f"block {index} came after its reservation had ended")
        if index not in self._missing:
            raise BlockRefused(f"block {index} is not missing")
        del self._missing[index]
        self._unconfirmed[index] = on_done
        try:
            self._writer.write_block(self, index, bytes(payload), lambda error: self._written(index, error))
        except BlockRefused:
            self._missing[index] = None
            del self._unconfirmed[index]
            raise

    def _written(self, index: int, error: MeshserveError | None) -> None:
        on_done = self._unconfirmed.pop(index, None)
        if on_done is None:  # the engine failed meanwhile, and whoever wrote it knows
            return
        if error is not None:
            self._missing[index] = None
        on_done(error)

    def fail(self, error: MeshserveError) -> None:
        """The engine can compute no more: blocks that it was still to confirm are lost."""
        for index in list(self._unconfirmed):
            self._written(index, error)

    def release(self) -> None:
        """Give the blocks back. Harmless after `generate` took the reservation (`is_open` is False), and when called twice."""
        if self.is_open:
            self.is_open = False
            self._on_release(self)
