"""The dummy model's KV cache: real bytes, and digests of them that stand for what a model would attend to.

The KV row of a token is a function of the token and of the digest of all KV contents before it; a block's digest is seeded with
the digest of the block before. Every digest is taken from the bytes as they were stored or received, once, when they become
visible: from there on a corrupted, stale or missing block changes every row and token that follows.
"""

from collections.abc import Iterable, Iterator
from struct import Struct

import xxhash

_pack_state = Struct("<QI").pack
_NOT_WRITTEN = 0x6E6F_7468_696E_6721
"""Stands for the digest of a block that holds nothing yet: whoever reads it gets other tokens, not an error."""


class KVContents:
    """Bytes and digests by block number; memory is taken when a block is first used, and kept."""

    def __init__(self, block_size: int, kv_bytes_per_token: int, salt: str) -> None:
        self.block_size = block_size
        self.kv_bytes_per_token = kv_bytes_per_token
        self._root = xxhash.xxh3_64_intdigest(salt.encode())
        self._buffers: dict[int, bytearray] = {}
        self._digests: dict[int, int] = {}

    def buffer(self, block: int) -> bytearray:
        """The block's memory, block_size * kv_bytes_per_token bytes."""
        found = self._buffers.get(block)
        if found is None:
            found = self._buffers[block] = bytearray(self.block_size * self.kv_bytes_per_token)
        return found

    def read(self, block: int, num_tokens: int) -> bytes:
        """A copy of the block's first `num_tokens` rows."""
        return bytes(memoryview(self.buffer(block))[: num_tokens * self.kv_bytes_per_token])

    def write(self, block: int, payload: bytes | memoryview) -> None:
        """Take in rows that were computed elsewhere. They are visible once :meth:`digest` was called."""
        self._digests.pop(block, None)
        self.buffer(block)[: len(payload)] = payload

    def digest(self, blocks: list[int], index: int) -> None:
        """Digest block `index` of a sequence's blocks, which is full, from what it holds and from the digest before it."""
        hasher = xxhash.xxh3_64(self.buffer(blocks[index]), seed=self.parent(blocks, index))
        self._digests[blocks[index]] = hasher.intdigest()

    def keep_digest(self, block: int, digest: int) -> None:
        """What :meth:`digest` would find, from one who took it while writing the rows."""
        self._digests[block] = digest

    def parent(self, blocks: list[int], index: int) -> int:
        """The digest of all that stands before block `index` of a sequence's blocks."""
        return self._digests.get(blocks[index - 1], _NOT_WRITTEN) if index else self._root

    def contexts(self, blocks: list[int], start: int, end: int) -> Iterator[int]:
        """The digest of all rows before token `start`, and before each that follows it, up to `end` - 1: as a cursor found them."""
        size, row_bytes = self.block_size, self.kv_bytes_per_token
        for first in range(start - start % size, end, size):
            context = self.parent(blocks, first // size)
            rows = memoryview(self.buffer(blocks[first // size]))
            hasher = xxhash.xxh3_64(seed=context)
            for index in range(min(size, end - first)):
                if first + index >= start:
                    yield context
                hasher.update(rows[index * row_bytes : (index + 1) * row_bytes])
                context = hasher.intdigest()


class Cursor:
    """Where one sequence writes its next KV row. `context` is the digest of all rows before it.

    Opened on `num_tokens` rows that are there; those of a partial last block are digested now, from what it holds. `blocks` is
    the sequence's own list, which may grow meanwhile.
    """

    __slots__ = ("_block_bytes", "_blocks", "_buffer", "_contents", "_hasher", "_offset", "_repeats", "_row_bytes", "context", "num_tokens")

    def __init__(self, contents: KVContents, blocks: list[int], num_tokens: int) -> None:
        self._contents = contents
        self._blocks = blocks
        self._row_bytes = contents.kv_bytes_per_token
        self._repeats = -(-self._row_bytes // 16)
        self._block_bytes = contents.block_size * self._row_bytes
        self.num_tokens = num_tokens
        index, num_rows = divmod(num_tokens, contents.block_size)
        self.context = contents.parent(blocks, index)
        self._offset = num_rows * self._row_bytes
        self._buffer = contents.buffer(blocks[index]) if num_rows else bytearray()
        self._hasher = xxhash.xxh3_64(memoryview(self._buffer)[: self._offset], seed=self.context)
        if num_rows:
            self.context = self._hasher.intdigest()

    def append(self, token: int) -> None:
        """Compute and store the KV row of the next token."""
        offset = self._offset
        if not offset:
            self._enter_block()
        row = xxhash.xxh3_128_digest(_pack_state(self.context, token)) * self._repeats
        end = offset + self._row_bytes
        if len(row) != self._row_bytes:
            row = row[: self._row_bytes]
        self._buffer[offset:end] = row
        self._hasher.update(row)
        self.context = self._hasher.intdigest()
        self.num_tokens += 1
        if end == self._block_bytes:
            self._contents.keep_digest(self._blocks[self.num_tokens // self._contents.block_size - 1], self.context)
            end = 0
        self._offset = end

    def extend(self, tokens: Iterable[int]) -> None:
        """:meth:`append` for each."""
        append = self.append
        for token in tokens:
            append(token)

    def _enter_block(self) -> None:
        self._buffer = self._contents.buffer(self._blocks[self.num_tokens // self._contents.block_size])
        self._hasher = xxhash.xxh3_64(seed=self.context)
