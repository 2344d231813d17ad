"""The bytes of a KV block: what llama.cpp writes for a range of one sequence, parsed and checked here before it reads them.

llama.cpp believes what a block says: it takes moved positions, other counts and trailing bytes without a word. So every byte of a block
that is not KV data is compared with what this model's own blocks have there. Integers are little-endian, 32 bits wide unless named:

    magic, sequence id
    for each cache (a model with sliding-window layers has two):
        number of streams, number of cells; for each cell: position, number of sequence ids (1), sequence id
        whether V is transposed, number of layers, two sizes of rotations
        for each layer's K, then for each layer's V: element type, row size (64 bits), one row per cell

The sequence ids are those of the exporting context; they are 0 in our blocks, and cells are in the order of their positions, so that
equal KV has equal bytes.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

from meshserve.errors import BlockRefused

_CELL = struct.Struct("<iII")
_HEAD, _CACHE_HEAD, _LAYERS_HEAD, _ROWS_HEAD = struct.Struct("<II"), struct.Struct("<II"), struct.Struct("<IIII"), struct.Struct("<iQ")
_MAX_CACHES, _MAX_LAYERS, _MAX_ROW_BYTES = 4, 4096, 1 << 24


@dataclass(frozen=True)
class CacheFormat:
    """One cache of a model: the bytes before its layers' rows, and the rows' heads and sizes, K of all layers first."""

    layers_head: bytes
    rows: tuple[tuple[bytes, int], ...]

    def size_bytes(self, num_tokens: int) -> int:
        """Length of this cache's part of a block."""
        rows = sum(_ROWS_HEAD.size + row_bytes * num_tokens for _, row_bytes in self.rows)
        return _CACHE_HEAD.size + _CELL.size * num_tokens + _LAYERS_HEAD.size + rows


@dataclass(frozen=True)
class BlockFormat:
    """What the blocks of one model, in one build of llama.cpp, have in common. Learned from a block that the model's context exported."""

    magic: int
    caches: tuple[CacheFormat, ...]

    @classmethod
    def learn(cls, exported: bytes, num_tokens: int) -> "BlockFormat":
        """Read the format from a block of this context. Raises BlockRefused if it is not of the form above."""
        for has_v in (True, False):  # models with latent attention keep no V
            reader = _Reader(exported)
            try:
                magic, _ = reader.take(_HEAD)
                caches = tuple(_learn_cache(reader, num_tokens, has_v) for _ in range(_MAX_CACHES) if reader.left)
            except _Unreadable:
                continue
            if not reader.left:
                return cls(magic, caches)
        raise BlockRefused("llama.cpp writes blocks of this model in a form that is not known here")

    def size_bytes(self, num_tokens: int) -> int:
        """Length of a block of so many tokens."""
        return _HEAD.size + sum(cache.size_bytes(num_tokens) for cache in self.caches)

    def describe(self) -> bytes:
        """All that blocks of equal formats share, for a fingerprint."""
        parts = (part for cache in self.caches for part in (cache.layers_head, *(head for head, _ in cache.rows)))
        return b"".join((_HEAD.pack(self.magic, len(self.caches)), *parts))

    def check(self, payload: bytes | memoryview, first_position: int, num_tokens: int) -> None:
        """Compare all but the KV data with what a block of these tokens has there. Raises BlockRefused; nothing of it was used then."""
        if len(payload) != self.size_bytes(num_tokens):
            raise BlockRefused(f"a block of {num_tokens} tokens has {self.size_bytes(num_tokens)} bytes, not {len(payload)}")
        view = memoryview(payload)
        for offset, expected in self._frame(first_position, num_tokens):
            if view[offset : offset + len(expected)] != expected:
                raise BlockRefused(f"the block is not one of {num_tokens} tokens from position {first_position}: byte {offset} or after it")

    def _frame(self, first_position: int, num_tokens: int) -> Iterator[tuple[int, bytes]]:
        """Offset and content of all bytes that are not KV data."""
        cells = b"".join(map(_CELL.pack, range(first_position, first_position + num_tokens), repeat(1), repeat(0)))
        yield 0, _HEAD.pack(self.magic, 0)
        offset = _HEAD.size
        for cache in self.caches:
            head = _CACHE_HEAD.pack(1, num_tokens) + cells + cache.layers_head
            yield offset, head
            offset += len(head)
            for rows_head, row_bytes in cache.rows:
                yield offset, rows_head
                offset += len(rows_head) + row_bytes * num_tokens

    def normalize(self, exported: bytearray | memoryview, first_position: int, num_tokens: int) -> None:
        """Give a block that llama.cpp wrote, of the right length, sequence ids of 0 and cells in the order of their positions.

        A pool with holes has a sequence's cells in any order. Raises BlockRefused if it is not a block of these tokens.
        """
        view = memoryview(exported)
        _HEAD.pack_into(view, 0, self.magic, 0)
        offset = _HEAD.size
        for cache in self.caches:
            start = offset + _CACHE_HEAD.size
            cells = view[start : start + _CELL.size * num_tokens]
            positions = [position for position, _, _ in _CELL.iter_unpack(cells)]
            order = sorted(range(num_tokens), key=positions.__getitem__)
            cells[:] = b"".join(_CELL.pack(positions[index], 1, 0) for index in order)
            if order != list(range(num_tokens)):
                _reorder(view[start + len(cells) + _LAYERS_HEAD.size :], cache, order)
            offset += cache.size_bytes(num_tokens)
        self.check(view, first_position, num_tokens)


def _reorder(view: memoryview, cache: CacheFormat, order: list[int]) -> None:
    offset = 0
    for head, size in cache.rows:
        offset += len(head)
        rows = bytes(view[offset : offset + size * len(order)])
        view[offset : offset + len(rows)] = b"".join(rows[index * size : (index + 1) * size] for index in order)
        offset += len(rows)


def layout_fingerprint(
    block_format: BlockFormat, *, model_hash: str, build: str, type_k: str, type_v: str, flash_attention: bool, block_size: int
) -> str:
    """Digest of all that two peers' caches must have in common to exchange blocks."""
    parts = (model_hash, build, type_k, type_v, str(flash_attention), str(block_size), block_format.describe().hex())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


class _Unreadable(Exception):
    """A block is not of the form that is tried."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._offset

    def take(self, form: struct.Struct) -> tuple[int, ...]:
        self.skip(form.size)
        return form.unpack_from(self._data, self._offset - form.size)

    def skip(self, size: int) -> None:
        if size > self.left:
            raise _Unreadable
        self._offset += size


def _learn_cache(reader: _Reader, num_tokens: int, has_v: bool) -> CacheFormat:
    if reader.take(_CACHE_HEAD) != (1, num_tokens):
        raise _Unreadable
    for _ in range(num_tokens):
        if reader.take(_CELL)[1] != 1:
            raise _Unreadable
    is_v_transposed, num_layers, *rotations = reader.take(_LAYERS_HEAD)
    if is_v_transposed or not 0 < num_layers <= _MAX_LAYERS:
        raise _Unreadable
    rows = tuple(_learn_rows(reader, num_tokens) for _ in range(num_layers * (2 if has_v else 1)))
    return CacheFormat(_LAYERS_HEAD.pack(is_v_transposed, num_layers, *rotations), rows)


def _learn_rows(reader: _Reader, num_tokens: int) -> tuple[bytes, int]:
    element_type, row_bytes = reader.take(_ROWS_HEAD)
    if not 0 < row_bytes <= _MAX_ROW_BYTES:
        raise _Unreadable
    reader.skip(row_bytes * num_tokens)
    return _ROWS_HEAD.pack(element_type, row_bytes), row_bytes
