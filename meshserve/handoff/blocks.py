"""KV blocks on the move: what goes before them on the bulk path, and the window that bounds them. Pure."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import xxhash

from meshserve.errors import BlockRefused, ProtocolError


def checksum(payload: bytes | memoryview) -> bytes:
    """xxh3, 64 bits: catches every truncation and flip that TCP's checksum lets through, at memory speed."""
    return xxhash.xxh3_64_digest(payload)


@dataclass(frozen=True, slots=True)
class BlockMark:
    """Which block a payload is."""

    index: int
    num_tokens: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class BulkHeader:
    """Before a run of payloads: whose attempt they belong to, and which blocks they are."""

    decode_peer: str
    """Incarnation that the blocks are meant for."""
    request_id: str
    attempt: int
    marks: tuple[BlockMark, ...]
    computed_ms: float
    """What the worker's engine has taken so far, from the claim on, by its own clock."""

    def to_wire(self) -> list[Any]:
        """Plain data for :meth:`from_wire`."""
        return [
            self.decode_peer,
            self.request_id,
            self.attempt,
            [[mark.index, mark.num_tokens, mark.digest] for mark in self.marks],
            self.computed_ms,
        ]

    @classmethod
    def from_wire(cls, data: Any) -> "BulkHeader":
        """Raises ProtocolError for anything else."""
        if not isinstance(data, list) or [type(part) for part in data] != [str, str, int, list, float]:
            raise ProtocolError("malformed bulk header")
        for mark in data[3]:
            if not isinstance(mark, list) or [type(part) for part in mark] != [int, int, bytes]:
                raise ProtocolError("malformed bulk header")
        return cls(data[0], data[1], data[2], tuple(BlockMark(*mark) for mark in data[3]), data[4])

    def check(self, payloads: list[bytes]) -> None:
        """Raises BlockRefused unless each payload is what its mark says."""
        if len(payloads) != len(self.marks):
            raise BlockRefused(f"{len(self.marks)} blocks announced, {len(payloads)} came")
        for mark, payload in zip(self.marks, payloads, strict=True):
            if checksum(payload) != mark.digest:
                raise BlockRefused(f"the checksum of block {mark.index} is wrong")


class BlockWindow:
    """Blocks of one attempt on their way: computed, sent, acknowledged."""

    def __init__(self, window_bytes: int, max_blocks_per_message: int) -> None:
        self._window_bytes, self._max_blocks = window_bytes, max_blocks_per_message
        self._ready: deque[tuple[BlockMark, bytes]] = deque()
        self._unacknowledged_bytes = 0
        self.num_blocks = self.num_bytes = 0
        """Sent in all."""

    def add(self, index: int, num_tokens: int, payload: bytes) -> None:
        """The next block is computed."""
        self._ready.append((BlockMark(index, num_tokens, checksum(payload)), payload))

    def take(self) -> list[tuple[BlockMark, bytes]]:
        """What may go out now as one message; empty if the window is full or nothing is ready. A block wider than the window goes alone."""
        taken: list[tuple[BlockMark, bytes]] = []
        while self._ready and len(taken) < self._max_blocks:
            size_bytes = len(self._ready[0][1])
            if self._unacknowledged_bytes and self._unacknowledged_bytes + size_bytes > self._window_bytes:
                break
            taken.append(self._ready.popleft())
            self._unacknowledged_bytes += size_bytes
            self.num_bytes += size_bytes
        self.num_blocks += len(taken)
        return taken

    def acknowledged(self, num_bytes: int) -> None:
        """The receiver has taken so much."""
        self._unacknowledged_bytes = max(0, self._unacknowledged_bytes - num_bytes)

    @property
    def is_drained(self) -> bool:
        """All that was added is sent and acknowledged."""
        return not self._ready and not self._unacknowledged_bytes
