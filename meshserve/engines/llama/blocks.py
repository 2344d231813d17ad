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

import contextlib
import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

from meshserve.errors import BlockRefused

_CELL = struct.Struct("<iII")
_HEAD, _CACHE_HEAD, _LAYERS_HEAD, _ROWS_HEAD = struct.Struct("<II"), struct.Struct("<II"), struct.Struct("<IIII"), struct.Struct("<iQ")


@dataclass(frozen=True)
class CacheFormat:
    """One cache of a model: the bytes before its layers' rows, and the rows' heads and sizes, K of all layers first."""

    layers_head: bytes
    rows: tuple[tuple[bytes, int], ...]

    def size_bytes(self, num_tokens: int) -> int:
        """Length of this cache's part of a block."""
        rows = sum(len(head) + row_bytes * num_tokens for head, row_bytes in self.rows)
        return _CACHE_HEAD.size + _CELL.size * num_tokens + len(self.layers_head) + rows


@dataclass(frozen=True)
class BlockFormat:
    """What the blocks of one model, in one build of llama.cpp, have in common. Learned from a block that the model's context exported."""

    magic: int
    caches: tuple[CacheFormat, ...]

    @classmethod
    def learn(cls, exported: bytes, num_tokens: int) -> "BlockFormat":
        """Read the format from a block of this context. Raises BlockRefused if it is not of the form above."""
        for parts_per_layer in (2, 1):  # models with latent attention keep no V
            with contextlib.suppress(struct.error):
                learned = cls(_HEAD.unpack_from(exported)[0], tuple(_learn_caches(exported, num_tokens, parts_per_layer)))
                if learned.size_bytes(num_tokens) == len(exported):
                    return learned
        raise BlockRefused("llama.cpp writes blocks of this model in a form that is not known here")

    def size_bytes(self, num_tokens: int) -> int:
        """Length of a block of so many tokens."""
        return _HEAD.size + sum(cache.size_bytes(num_tokens) for cache in self.caches)

    def fingerprint(self, *shared: str) -> str:
        """Digest of the format, and of all else that two peers' caches must share to exchange blocks."""
        parts = (part for cache in self.caches for part in (cache.layers_head, *(head for head, _ in cache.rows)))
        described = b"".join((_HEAD.pack(self.magic, len(self.caches)), *parts))
        return hashlib.sha256("\n".join((*shared, described.hex())).encode()).hexdigest()[:32]

    def check(self, payload: bytes | bytearray, first_position: int, num_tokens: int) -> None:
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

    def normalize(self, exported: bytearray, first_position: int, num_tokens: int) -> None:
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
        self.check(exported, first_position, num_tokens)


def _reorder(view: memoryview, cache: CacheFormat, order: list[int]) -> None:
    offset = 0
    for head, size in cache.rows:
        offset += len(head)
        rows = bytes(view[offset : offset + size * len(order)])
        view[offset : offset + len(rows)] = b"".join(rows[index * size : (index + 1) * size] for index in order)
        offset += len(rows)


def _learn_caches(exported: bytes, num_tokens: int, parts_per_layer: int) -> Iterator[CacheFormat]:
    offset = _HEAD.size
    while offset < len(exported):
        if _CACHE_HEAD.unpack_from(exported, offset) != (1, num_tokens):
            raise struct.error
        offset += _CACHE_HEAD.size + _CELL.size * num_tokens
        layers_head = exported[offset : offset + _LAYERS_HEAD.size]
        is_v_transposed, num_layers, *_ = _LAYERS_HEAD.unpack(layers_head)
        if is_v_transposed:
            raise struct.error
        offset += len(layers_head)
        rows = []
        for _ in range(num_layers * parts_per_layer):
            row_bytes = _ROWS_HEAD.unpack_from(exported, offset)[1]
            rows.append((exported[offset : offset + _ROWS_HEAD.size], row_bytes))
            offset += _ROWS_HEAD.size + row_bytes * num_tokens
        yield CacheFormat(layers_head, tuple(rows))
