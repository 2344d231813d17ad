"""The bytes of a KV block: what llama.cpp writes for a range of one sequence, parsed and checked here before it reads them.

llama.cpp believes what a block says: it takes moved positions, other counts and trailing bytes without a word. So every byte of a block
that is not KV data is compared with what this model's own blocks have there. Integers are little-endian, 32 bits wide unless named:

    magic, sequence id
    for each cache (a model with sliding-window layers has two):
        number of streams, number of cells; for each cell: position, number of sequence ids (1), sequence id
        whether V is transposed, number of layers, two sizes of rotations
        for each layer's K, then for each layer's V: element type, row size (64 bits), one row per cell
    for the state of a model with recurrent layers, which comes last:
        number of cells (1), position of the last token, number of sequence ids (0)
        whether states are transposed, number of layers
        for each recurrent layer's first part, then for each one's second part: element type, row size (64 bits), one row

The sequence ids are those of the exporting context; they are 0 in our blocks, and cells are in the order of their positions, so that
equal KV has equal bytes.

A recurrent layer keeps one state a sequence, whatever its length: only the state after a prompt's last token is worth anything. It is
given out with the step that computes that token, in as many pieces as the prompt has blocks, because a message of the mesh is shorter
than many a state.
"""

import contextlib
import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import xxhash

from meshserve.errors import BlockRefused

_CELL = struct.Struct("<iII")
_HEAD, _CACHE_HEAD, _LAYERS_HEAD, _ROWS_HEAD = struct.Struct("<II"), struct.Struct("<II"), struct.Struct("<IIII"), struct.Struct("<iQ")
_F32 = 0
_STATE_HEAD, _STATE_LAYERS_HEAD = struct.Struct("<IiI"), struct.Struct("<II")
MAX_PIECE_BYTES = 8 << 20
"""A longer piece might be more than one message holds."""
_PIECE_HEAD = struct.Struct("<IQ")
"""Before each piece: its index, and a digest of the whole state, so that pieces of two states are never joined."""


@dataclass(frozen=True)
class CacheFormat:
    """One cache of a model: the bytes before its layers' rows, and the rows' heads and sizes, K of all layers first."""

    layers_head: bytes
    rows: tuple[tuple[bytes, int], ...]
    is_state: bool = False
    """It has one cell, the state after the last token."""

    def num_cells(self, num_tokens: int) -> int:
        """Rows of each layer for so many tokens."""
        return 1 if self.is_state else num_tokens

    def head(self, first_position: int, num_tokens: int) -> bytes:
        """The bytes before the first layer's rows."""
        if self.is_state:
            return _STATE_HEAD.pack(1, first_position + num_tokens - 1, 0) + self.layers_head
        cells = b"".join(map(_CELL.pack, range(first_position, first_position + num_tokens), repeat(1), repeat(0)))
        return _CACHE_HEAD.pack(1, num_tokens) + cells + self.layers_head

    def size_bytes(self, num_tokens: int) -> int:
        """Length of this cache's part of a block."""
        cells_bytes = _STATE_HEAD.size if self.is_state else _CACHE_HEAD.size + _CELL.size * num_tokens
        rows_bytes = sum(len(head) + row_bytes * self.num_cells(num_tokens) for head, row_bytes in self.rows)
        return cells_bytes + len(self.layers_head) + rows_bytes


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
        """Compare all but the KV data with what a block of these tokens has there. Raises BlockRefused; nothing of it was used then.

        A state has finite numbers only: multiplied by 0, others would be the beginning of the next sequence's state.
        """
        if len(payload) != self.size_bytes(num_tokens):
            raise BlockRefused(f"a block of {num_tokens} tokens has {self.size_bytes(num_tokens)} bytes, not {len(payload)}")
        view = memoryview(payload)
        for offset, expected in self._frame(first_position, num_tokens):
            if view[offset : offset + len(expected)] != expected:
                raise BlockRefused(f"the block is not one of {num_tokens} tokens from position {first_position}: byte {offset} or after it")
        if not all(np.isfinite(numbers).all() for numbers in self._state_numbers(payload)):
            raise BlockRefused("the state has numbers that are not finite")

    def _state_numbers(self, payload: bytes | bytearray) -> "Iterator[np.ndarray[Any, np.dtype[np.float32]]]":
        """The rows of the state, which comes last."""
        cache = self.caches[-1]
        offset = len(payload) - sum(len(head) + row_bytes for head, row_bytes in cache.rows)
        for head, row_bytes in cache.rows if cache.is_state else ():
            offset += len(head)
            yield np.frombuffer(payload, np.float32, row_bytes // 4, offset)
            offset += row_bytes

    def _frame(self, first_position: int, num_tokens: int) -> Iterator[tuple[int, bytes]]:
        """Offset and content of all bytes that are not KV data."""
        yield 0, _HEAD.pack(self.magic, 0)
        offset = _HEAD.size
        for cache in self.caches:
            head = cache.head(first_position, num_tokens)
            yield offset, head
            offset += len(head)
            for rows_head, row_bytes in cache.rows:
                yield offset, rows_head
                offset += len(rows_head) + row_bytes * cache.num_cells(num_tokens)

    def normalize(self, exported: bytearray, first_position: int, num_tokens: int) -> None:
        """Give a block that llama.cpp wrote, of the right length, sequence ids of 0 and cells in the order of their positions.

        A pool with holes has a sequence's cells in any order. A state begins as another one multiplied by 0: what was never written again
        is 0 or -0, and 0 here. Raises BlockRefused if it is not a block of these tokens.
        """
        view = memoryview(exported)
        _HEAD.pack_into(view, 0, self.magic, 0)
        offset = _HEAD.size
        for cache in self.caches:
            if cache.is_state:
                continue  # it has neither, and comes last
            start = offset + _CACHE_HEAD.size
            cells = view[start : start + _CELL.size * num_tokens]
            positions = [position for position, _, _ in _CELL.iter_unpack(cells)]
            order = sorted(range(num_tokens), key=positions.__getitem__)
            cells[:] = b"".join(_CELL.pack(positions[index], 1, 0) for index in order)
            if order != list(range(num_tokens)):
                _reorder(view[start + len(cells) + _LAYERS_HEAD.size :], cache, order)
            offset += cache.size_bytes(num_tokens)
        for numbers in self._state_numbers(exported):
            numbers += 0.0  # of -0, this makes 0
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
        if _STATE_HEAD.unpack_from(exported, offset) == (1, num_tokens - 1, 0):
            yield _learn_state(exported, offset + _STATE_HEAD.size)
            return
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


def _learn_state(exported: bytes, offset: int) -> CacheFormat:
    """Layers without a state are left out, so the rows' number is known by where the block ends."""
    layers_head = exported[offset : offset + _STATE_LAYERS_HEAD.size]
    is_transposed, _ = _STATE_LAYERS_HEAD.unpack(layers_head)
    offset, rows = offset + len(layers_head), []
    while offset < len(exported):
        element_type, row_bytes = _ROWS_HEAD.unpack_from(exported, offset)
        if is_transposed or element_type != _F32:
            raise struct.error
        rows.append((exported[offset : offset + _ROWS_HEAD.size], row_bytes))
        offset += _ROWS_HEAD.size + row_bytes
    return CacheFormat(layers_head, tuple(rows), is_state=True)


# --- a state in pieces


def cut(state: bytes, num_pieces: int) -> list[bytes]:
    """The pieces, of nearly equal lengths."""
    digest = xxhash.xxh3_64_intdigest(state)
    return [_PIECE_HEAD.pack(index, digest) + state[begin:end] for index, (begin, end) in enumerate(_bounds(len(state), num_pieces))]


def _bounds(size_bytes: int, num_pieces: int) -> Iterator[tuple[int, int]]:
    for index in range(num_pieces):
        yield size_bytes * index // num_pieces, size_bytes * (index + 1) // num_pieces


class StatePieces:
    """The pieces of one state that have come."""

    def __init__(self, size_bytes: int, num_pieces: int) -> None:
        self._lengths = [_PIECE_HEAD.size + end - begin for begin, end in _bounds(size_bytes, num_pieces)]
        self._pieces: dict[int, bytes] = {}

    def add(self, pieces: Sequence[tuple[int, bytes]]) -> bool:
        """Keep pieces, given as index and bytes, in any order, or some again; returns whether all are here.

        Raises BlockRefused, and keeps none, if one has bytes that are not this piece.
        """
        for index, piece in pieces:
            if len(piece) != self._lengths[index] or _PIECE_HEAD.unpack_from(piece)[0] != index:
                raise BlockRefused(f"it is not piece {index} of a state in {len(self._lengths)} pieces")
        self._pieces.update(pieces)
        return len(self._pieces) == len(self._lengths)

    def joined(self) -> bytes:
        """The state, once all are here. Raises BlockRefused if they are of two states, as from workers whose processors differ."""
        state = b"".join(self._pieces[index][_PIECE_HEAD.size :] for index in range(len(self._lengths)))
        if {_PIECE_HEAD.unpack_from(piece)[1] for piece in self._pieces.values()} != {xxhash.xxh3_64_intdigest(state)}:
            raise BlockRefused("the pieces are not of one state")
        return state
