"""The dummy model's KV cache: real bytes, and digests of them that stand for what a model would attend to.

The KV row of a token is a function of the token and of the digest of all KV contents before it; a block's digest is seeded with
the digest of the block before. Every digest is taken from the bytes as they were stored or received, once, when they become
visible: from there on a corrupted, stale or missing block changes every row and token that follows.

A row repeats a seed of 16 bytes, and a block is kept as the seeds of its rows (1.5 % of it) until somebody reads its bytes. What came from
elsewhere is kept so only if its rows are found to repeat, byte by byte: else as it came. A block that is being written is a list of seeds,
to which one more costs a fifth of what it costs in a bytearray (0.02 us of 0.1); a full one is their bytes, which the garbage collector
does not walk.
"""

from collections.abc import Iterator, Sequence
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
        self._seeds: dict[int, bytes | list[bytes]] = {}
        self._foreign: dict[int, bytearray] = {}
        """Blocks of which some rows do not repeat, as they came."""
        self._digests: dict[int, int] = {}

    def begin(self, block: int) -> list[bytes]:
        """Where the seeds of a block that is written from its start go: whatever came into it before is gone."""
        self._foreign.pop(block, None)
        seeds = self._seeds[block] = []
        return seeds

    def resume(self, block: int, num_rows: int) -> list[bytes]:
        """The same for one that goes on after its first rows, which were written or came here."""
        found = self._joined(block)[: num_rows * _SEED_BYTES].ljust(num_rows * _SEED_BYTES, b"\0")
        seeds = self._seeds[block] = [found[start : start + _SEED_BYTES] for start in range(0, len(found), _SEED_BYTES)]
        return seeds

    def complete(self, block: int, seeds: list[bytes], digest: int) -> None:
        """All rows of a block are written; `digest` is what :meth:`digest` would find."""
        self._seeds[block] = b"".join(seeds)
        self._digests[block] = digest

    def _joined(self, block: int) -> bytes:
        seeds = self._seeds.get(block, b"")
        return b"".join(seeds) if isinstance(seeds, list) else seeds

    def foreign(self, block: int) -> bytearray | None:
        """The rows of a block that are kept as they came, and whatever follows them in it."""
        return self._foreign.get(block)

    def read(self, block: int, num_tokens: int) -> bytes:
        """The block's first `num_tokens` rows."""
        foreign = self._foreign.get(block)
        if foreign is not None:
            return bytes(foreign[: num_tokens * self.kv_bytes_per_token])
        rows = self._rows(self._joined(block)[: num_tokens * _SEED_BYTES])
        return rows.ljust(num_tokens * self.kv_bytes_per_token, b"\0")

    def _rows(self, seeds: bytes) -> bytes:
        repeats = self._repeats
        rows = [seeds[start : start + _SEED_BYTES] * repeats for start in range(0, len(seeds), _SEED_BYTES)]
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

    def _seeds_of(self, payload: bytes) -> bytes | None:
        """None if these rows are not all what their seeds stand for."""
        row_bytes, starts = self.kv_bytes_per_token, range(0, len(payload), self.kv_bytes_per_token)
        if row_bytes >= _SEED_BYTES:
            seeds = b"".join([payload[start : start + _SEED_BYTES] for start in starts])
        else:
            seeds = b"".join([payload[start : start + row_bytes].ljust(_SEED_BYTES, b"\0") for start in starts])
        return seeds if self._rows(seeds) == payload else None

    def digest(self, blocks: list[int], index: int, rows: bytes | None = None) -> None:
        """Digest block `index` of a sequence's blocks, which is full, from what it holds and from the digest before it.

        `rows` is what it holds, from one who wrote it just now.
        """
        held = self.read(blocks[index], self.block_size) if rows is None else rows
        self._digests[blocks[index]] = xxhash.xxh3_64_intdigest(held, self.parent(blocks, index))

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
        "_block_end",
        "_block_size",
        "_blocks",
        "_contents",
        "_foreign",
        "_hasher",
        "_is_plain",
        "_repeats",
        "_row_bytes",
        "_seeds",
        "context",
        "num_tokens",
    )

    def __init__(self, contents: KVContents, blocks: list[int], num_tokens: int) -> None:
        self._contents = contents
        self._blocks = blocks
        self._block_size = size = contents.block_size
        self._row_bytes = contents.kv_bytes_per_token
        self._repeats = -(-self._row_bytes // _SEED_BYTES)
        self.num_tokens = num_tokens
        index, num_rows = divmod(num_tokens, size)
        self.context = contents.parent(blocks, index)
        self._hasher: xxhash.xxh3_64 | None = None
        """None: the next row begins a block."""
        if num_rows:
            self._resume(blocks[index], num_rows)

    def _resume(self, block: int, num_rows: int) -> None:
        contents = self._contents
        self._hasher = xxhash.xxh3_64(contents.read(block, num_rows), seed=self.context)
        self.context = self._hasher.intdigest()
        self._seeds = contents.resume(block, num_rows)
        self._foreign = contents.foreign(block)
        self._is_plain = self._foreign is None and not self._row_bytes % _SEED_BYTES
        self._block_end = self.num_tokens - num_rows + self._block_size

    def _enter_block(self) -> "xxhash.xxh3_64":
        num_tokens = self.num_tokens
        self._seeds = self._contents.begin(self._blocks[num_tokens // self._block_size])
        self._foreign = None
        self._is_plain = not self._row_bytes % _SEED_BYTES
        self._block_end = num_tokens + self._block_size
        self._hasher = hasher = xxhash.xxh3_64(seed=self.context)
        return hasher

    def append(self, token: int) -> None:
        """Compute and store the KV row of the next token."""
        hasher = self._hasher or self._enter_block()
        seed = _digest(_pack_state(self.context, token))
        self._seeds.append(seed)
        row = seed * self._repeats
        if not self._is_plain:
            row = self._keep_foreign(row[: self._row_bytes])
        hasher.update(row)
        self.context = hasher.intdigest()
        self.num_tokens = num_tokens = self.num_tokens + 1
        if num_tokens == self._block_end:
            self._complete_block()

    def _keep_foreign(self, row: bytes) -> bytes:
        if self._foreign is not None:
            first = (self.num_tokens + self._block_size - self._block_end) * self._row_bytes
            self._foreign[first : first + self._row_bytes] = row
        return row

    def _complete_block(self) -> None:
        self._contents.complete(self._blocks[self.num_tokens // self._block_size - 1], self._seeds, self.context)
        self._hasher = None

    def extend(self, tokens: Sequence[int]) -> None:
        """:meth:`append` for each."""
        place, num_tokens = 0, len(tokens)
        while place < num_tokens:
            if self._hasher is None:
                self._enter_block()
            end = min(num_tokens, place + self._block_end - self.num_tokens)
            if self._is_plain:
                self._extend_block(tokens[place:end])
            else:
                for token in tokens[place:end]:
                    self.append(token)
            place = end

    def _extend_block(self, tokens: Sequence[int]) -> None:
        """With all that it takes at hand: 0.24 us a token, of 0.38 where each is appended."""
        hasher, context, repeats = self._hasher, self.context, self._repeats
        assert hasher is not None, "its block was entered"
        keep, update, digest_rows = self._seeds.append, hasher.update, hasher.intdigest
        pack, digest = _pack_state, _digest
        for token in tokens:
            seed = digest(pack(context, token))
            keep(seed)
            update(seed * repeats)
            context = digest_rows()
        self.context = context
        self.num_tokens += len(tokens)
        if self.num_tokens == self._block_end:
            self._complete_block()
