"""A sequence's whole state on its way out and in, cut into as many pieces as its prompt has blocks.

A recurrent layer keeps one state a sequence, whatever its length: only the state after a prompt's last token is worth anything. It is
given out with the step that computes that token, and in pieces, because a message of the mesh is shorter than many a state.
"""

import struct
from collections.abc import Iterator, Sequence

import xxhash

from meshserve.errors import BlockRefused

MAX_PIECE_BYTES = 8 << 20
"""A longer piece might be more than one message holds."""
_HEAD = struct.Struct("<IQ")
"""Before each piece: its index, and a digest of the whole state, so that pieces of two states are never joined."""


def cut(state: bytes, num_pieces: int) -> list[bytes]:
    """The pieces, of nearly equal lengths."""
    digest = xxhash.xxh3_64_intdigest(state)
    return [_HEAD.pack(index, digest) + state[begin:end] for index, (begin, end) in enumerate(_bounds(len(state), num_pieces))]


def _bounds(size_bytes: int, num_pieces: int) -> Iterator[tuple[int, int]]:
    for index in range(num_pieces):
        yield size_bytes * index // num_pieces, size_bytes * (index + 1) // num_pieces


class StatePieces:
    """The pieces of one state that have come."""

    def __init__(self, size_bytes: int, num_pieces: int) -> None:
        self._lengths = [_HEAD.size + end - begin for begin, end in _bounds(size_bytes, num_pieces)]
        self._pieces: dict[int, bytes] = {}

    def add(self, pieces: Sequence[tuple[int, bytes]]) -> bool:
        """Keep pieces, given as index and bytes, in any order, or some again; returns whether all are here.

        Raises BlockRefused, and keeps none, if one has bytes that are not this piece.
        """
        for index, piece in pieces:
            if len(piece) != self._lengths[index] or _HEAD.unpack_from(piece)[0] != index:
                raise BlockRefused(f"it is not piece {index} of a state in {len(self._lengths)} pieces")
        self._pieces.update(pieces)
        return len(self._pieces) == len(self._lengths)

    def joined(self) -> bytes:
        """The state, once all are here. Raises BlockRefused if they are of two states, as from workers whose processors differ."""
        state = b"".join(self._pieces[index][_HEAD.size :] for index in range(len(self._lengths)))
        if {_HEAD.unpack_from(piece)[1] for piece in self._pieces.values()} != {xxhash.xxh3_64_intdigest(state)}:
            raise BlockRefused("the pieces are not of one state")
        return state
