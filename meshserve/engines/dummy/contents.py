"""The dummy model's KV cache: real bytes, and digests of them that stand for what a model would attend to.

The KV row of a token is a function of the token and of the digest of all KV contents before it; a block's digest is seeded with
the digest of the block before. Every digest is taken from the bytes as they were stored or received, once, when they become
visible: from there on a corrupted, stale or missing block changes every row and token that follows.

A row repeats a seed of 16 bytes, and a block is kept as the seeds of its rows (1.5 % of it) until somebody reads its bytes. What came from
elsewhere is kept so only if its rows are found to repeat, byte by byte: else as it came.
"""

from collections.abc import Iterable, Iterator
from struct import Struct

import xxhash

_pack_state = Struct("<QI").pack
_NOT_WRITTEN = 0x6E6F_7468_696E_6721
"""Stands for the digest of a block that holds nothing yet: whoever reads it gets other tokens, not an error."""


_SEED_BYTES = 16
_digest = xxhash.xxh3_128_digest


class KVContents:
    """Bytes and digests by block number; memory is taken when a block is first used, and kept."""

    def __init__(self, block_size: int, kv_bytes_per_token: int, salt: str) -> None:
        self.block_size = block_size
        self.kv_bytes_per_token = kv_bytes_per_token
        self._repeats = -(-kv_bytes_per_token // _SEED_BYTES)
        self._root = xxhash.xxh3_64_intdigest(salt.encode())
        self._seeds: dict[int, bytearray] = {}
        self._foreign: dict[int, bytearray] = {}
        """Blocks of which some rows do not repeat, as they came."""
        self._digests: dict[int, int] = {}

    def seeds(self, block: int) -> bytearray:
        """Where rows are written, a seed each."""
        found = self._seeds.get(block)
        if found is None:
            found = self._seeds[block] = bytearray(self.block_size * _SEED_BYTES)
        return found

    def renew(self, block: int) -> bytearray:
        """The same for a block that is written from its start: whatever came into it before is gone."""
        self._foreign.pop(block, None)
        return self.seeds(block)

    def foreign(self, block: int) -> bytearray | None:
        """The rows of a block that are kept as they came, and whatever follows them in it."""
        return self._foreign.get(block)

    def read(self, block: int, num_tokens: int) -> bytes:
        """The block's first `num_tokens` rows."""
        foreign = self._foreign.get(block)
        if foreign is not None:
            return bytes(foreign[: num_tokens * self.kv_bytes_per_token])
        seeds = self._seeds.get(block)
        if seeds is None:
            return bytes(num_tokens * self.kv_bytes_per_token)
        return self._rows(seeds, num_tokens)

    def _rows(self, seeds: bytearray, num_tokens: int) -> bytes:
        starts, repeats = range(0, num_tokens * _SEED_BYTES, _SEED_BYTES), self._repeats
        rows = [seeds[start : start + _SEED_BYTES] * repeats for start in starts]
        cut = self.kv_bytes_per_token
        return b"".join(rows if cut % _SEED_BYTES == 0 else [row[:cut] for row in rows])

    def write(self, block: int, payload: bytes) -> None:
        """Take in rows that were computed elsewhere. They are visible once :meth:`digest` was called."""
        self._digests.pop(block, None)
        self._foreign.pop(block, None)
        seeds = self._seeds_of(payload)
        if seeds is not None:
            self._seeds[block] = seeds
            return
        self._foreign[block] = bytearray(self.block_size * self.kv_bytes_per_token)
        self._foreign[block][: len(payload)] = payload

    def _seeds_of(self, payload: bytes) -> bytearray | None:
        """None if these rows are not all what their seeds stand for."""
        row_bytes, starts = self.kv_bytes_per_token, range(0, len(payload), self.kv_bytes_per_token)
        if row_bytes >= _SEED_BYTES:
            parts = [payload[start : start + _SEED_BYTES] for start in starts]
        else:
            parts = [payload[start : start + row_bytes].ljust(_SEED_BYTES, b"\0") for start in starts]
        seeds = bytearray().join(parts)
        if self._rows(seeds, len(parts)) != payload:
            return None
        seeds.extend(bytes(self.block_size * _SEED_BYTES - len(seeds)))
        return seeds

    def digest(self, blocks: list[int], index: int, rows: bytes | None = None) -> None:
        """Digest block `index` of a sequence's blocks, which is full, from what it holds and from the digest before it.

        `rows` is what it holds, from one who wrote it just now.
        """
        held = self.read(blocks[index], self.block_size) if rows is None else rows
        self._digests[blocks[index]] = xxhash.xxh3_64_intdigest(held, self.parent(blocks, index))

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
            rows = memoryview(self.read(blocks[first // size], size))
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

    __slots__ = (
        "_block_bytes",
        "_blocks",
        "_contents",
        "_foreign",
        "_hasher",
        "_is_cut",
        "_offset",
        "_repeats",
        "_row_bytes",
        "_seeds",
        "context",
        "num_tokens",
    )

    def __init__(self, contents: KVContents, blocks: list[int], num_tokens: int) -> None:
        self._contents = contents
        self._blocks = blocks
        self._row_bytes = contents.kv_bytes_per_token
        self._repeats = -(-self._row_bytes // _SEED_BYTES)
        self._is_cut = self._row_bytes % _SEED_BYTES != 0
        self._block_bytes = contents.block_size * _SEED_BYTES
        self.num_tokens = num_tokens
        index, num_rows = divmod(num_tokens, contents.block_size)
        self.context = contents.parent(blocks, index)
        self._offset = num_rows * _SEED_BYTES
        rows = contents.read(blocks[index], num_rows) if num_rows else b""
        self._seeds = contents.seeds(blocks[index]) if num_rows else bytearray()
        self._foreign = contents.foreign(blocks[index]) if num_rows else None
        self._hasher = xxhash.xxh3_64(rows, seed=self.context)
        if num_rows:
            self.context = self._hasher.intdigest()

    def append(self, token: int) -> None:
        """Compute and store the KV row of the next token."""
        offset = self._offset
        if not offset:
            self._enter_block()
        seed = _digest(_pack_state(self.context, token))
        self._offset = end = offset + _SEED_BYTES
        self._seeds[offset:end] = seed
        row = seed * self._repeats
        hasher = self._hasher
        if self._is_cut:
            row = row[: self._row_bytes]
        hasher.update(row)
        if self._foreign is not None:
            first = offset // _SEED_BYTES * self._row_bytes
            self._foreign[first : first + self._row_bytes] = row
        self.context = context = hasher.intdigest()
        self.num_tokens += 1
        if end == self._block_bytes:
            self._contents.keep_digest(self._blocks[self.num_tokens // self._contents.block_size - 1], context)
            self._offset = 0

    def extend(self, tokens: Iterable[int]) -> None:
        """:meth:`append` for each."""
        if self._foreign is not None or self._is_cut:
            for token in tokens:
                self.append(token)
            return
        rows, block_bytes, repeats = self._seeds, self._block_bytes, self._repeats
        offset, context, hasher = self._offset, self.context, self._hasher
        for token in tokens:
            if not offset:
                self.context = context
                self._enter_block()
                rows, hasher = self._seeds, self._hasher
            seed = _digest(_pack_state(context, token))
            rows[offset : offset + _SEED_BYTES] = seed
            offset += _SEED_BYTES
            hasher.update(seed * repeats)
            context = hasher.intdigest()
            self.num_tokens += 1
            if offset == block_bytes:
                self._contents.keep_digest(self._blocks[self.num_tokens // self._contents.block_size - 1], context)
                offset = 0
        self._offset, self.context = offset, context

    def _enter_block(self) -> None:
        self._seeds = self._contents.renew(self._blocks[self.num_tokens // self._contents.block_size])
        self._foreign = None
        self._hasher = xxhash.xxh3_64(seed=self.context)
