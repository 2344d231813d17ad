"""Blocks set aside by a decode engine while another worker computes what goes into them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from meshserve.engines.protocol import KVPayload
from meshserve.errors import BlockRefused, MeshserveError
from meshserve.kv.pool import BlockPool
from meshserve.wire.generation import GenerateRequest

WriteDone = Callable[[MeshserveError | None], None]
"""Called once, on the event loop, when written blocks are in the KV cache (None) or were refused."""


class BlockReservation:
    """Holds all the blocks of a prompt: those that were cached, and room for those that were not. Raises PoolFull without room.

    `write_blocks` is the model runner's, which takes them in.
    """

    def __init__(
        self,
        request: GenerateRequest,
        hashes: list[int],
        pool: BlockPool,
        block_size: int,
        write_blocks: Callable[["BlockReservation", list[tuple[int, bytes]], WriteDone], None],
        on_release: Callable[["BlockReservation"], None],
    ) -> None:
        self.tokens, self.num_tokens, self.block_size = request.tokens, len(request.tokens) - 1, block_size
        self.hashes = hashes
        self._write_blocks, self._on_release = write_blocks, on_release
        prefix = pool.lookup(hashes[: self.num_tokens // block_size])
        # room for the last token too: two full reservations that each wait for one more block would wait for ever
        self.blocks = pool.acquire(prefix, -(-len(request.tokens) // block_size) - len(prefix))
        self.num_cached_tokens = len(prefix) * block_size
        self._missing = set(range(len(prefix), -(-self.num_tokens // block_size)))
        self._in_hand: list[tuple[list[int], WriteDone]] = []
        """What the engine is taking in: the blocks of each write, and what is called then."""
        self.is_open = True
        self.state: Any = None
        """The model runner's own; the generation that takes the reservation over gets it."""

    def missing(self) -> list[int]:
        """Indexes of the blocks that are still to be written, ascending."""
        return sorted(self._missing)

    @property
    def num_unwritten(self) -> int:
        """Blocks that are missing, or that the engine is taking in."""
        return len(self._missing) + sum(len(indexes) for indexes, _ in self._in_hand)

    @property
    def is_complete(self) -> bool:
        """All blocks are written, and the engine has them."""
        return not self._missing and not self._in_hand

    @property
    def num_whole(self) -> int:
        """Full blocks at the prompt's start that the engine has, as far as they have hashes."""
        unwritten = self._missing.union(*(indexes for indexes, _ in self._in_hand))
        return min(unwritten | {self.num_tokens // self.block_size, len(self.hashes)})

    def tokens_in(self, index: int) -> int:
        """Of block `index`: whole blocks but for a partial last one."""
        return min(self.block_size, self.num_tokens - index * self.block_size)

    def write(self, blocks: Sequence[tuple[int, KVPayload]], on_done: WriteDone) -> None:
        """Take in blocks, given as index and payload: in any order, each once, all or none.

        `on_done` is called once, perhaps within this call, unless it raises. Raises BlockRefused if a
        block is not missing, or its payload is not what its place demands; all are missing then as before.
        """
        indexes = [index for index, _ in blocks]
        if not self.is_open:
            raise BlockRefused(f"block {indexes[0]} came after its reservation had ended")
        unfit = [index for index in indexes if index not in self._missing]
        if unfit or len(set(indexes)) < len(indexes):
            raise BlockRefused(f"block {unfit[0]} is not missing" if unfit else "a block comes twice")
        writing = indexes, on_done
        self._missing.difference_update(indexes)  # before the call below, which may be all there is
        self._in_hand.append(writing)
        try:
            payloads = [(index, b"".join(payload) if isinstance(payload, list) else bytes(payload)) for index, payload in blocks]
            self._write_blocks(self, payloads, partial(self._written, writing))
        except BlockRefused:
            self._take_back(writing)
            raise

    def _take_back(self, writing: tuple[list[int], WriteDone]) -> None:
        self._in_hand.remove(writing)
        self._missing.update(writing[0])

    def _written(self, writing: tuple[list[int], WriteDone], error: MeshserveError | None) -> None:
        if writing not in self._in_hand:  # the engine failed meanwhile, and its writer knows
            return
        if error is None:
            self._in_hand.remove(writing)
        else:
            self._take_back(writing)
        writing[1](error)

    def fail(self, error: MeshserveError) -> None:
        """The engine can compute no more: blocks that it was still to confirm are lost."""
        for writing in list(self._in_hand):
            self._written(writing, error)

    def release(self) -> None:
        """Give the blocks back; full ones stay as prefixes. Harmless after `generate` took the reservation, and when called twice."""
        if self.is_open:
            self.is_open = False
            self._on_release(self)
