"""KV blocks on the move: their checksums, the window that bounds them, the rate. Pure."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from meshserve.engines.protocol import KVBlock
from meshserve.errors import BlockRefused
from meshserve.wire.handoff import BlockMark, BulkHeader, Claim, HeldPart

_QUICK_S = 0.2
"""A link that brings an acknowledgement so soon after the one before carries long messages: 10 Mbit/s and more. On a slower
one, and on one that nobody knows yet, a message is one frame, so that its sender hears of progress in time."""
BURST_S = 0.002
"""How far a limited link may be ahead of its rate: timers have steps of a millisecond, and the rate must be
reached all the same."""

checksum = xxhash.xxh3_64_digest
"""Of a payload: 64 bits catch every truncation and flip that TCP's checksum lets through, at memory speed."""


def held_part(pieces: Sequence[bytes | memoryview]) -> HeldPart:
    """Describes the first pieces of a block to the worker that sent them."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return HeldPart(sum(map(len, pieces)), digest.digest())


def check_blocks(header: BulkHeader, payloads: Sequence[bytes | memoryview]) -> None:
    """Raises BlockRefused unless each payload, a block or a piece of one, is what its mark says. The caller checks the tokens."""
    if len(payloads) != len(header.marks):
        raise BlockRefused(f"{len(header.marks)} payloads announced, {len(payloads)} came")
    for mark, payload in zip(header.marks, payloads, strict=True):
        if checksum(payload) != mark.digest:
            raise BlockRefused(f"the checksum of block {mark.index} is wrong", is_checksum=True)


def began_s(claim: Claim, queued_s: float, now_s: float) -> float | None:
    """When the prefill worker began on the offer whose blocks this claim brings, on the clock of the decode
    worker, where the ticket left at `queued_s`. None for a claim without blocks.
    """
    if claim.header is None:
        return None
    # of the time since then that was neither waiting nor computing, half is taken for the ticket's way
    computed_s, took_s = claim.header.computed_ms / 1000, now_s - queued_s
    way_s = max(0.0, took_s - computed_s - claim.waited_ms / 1000)
    return now_s - min(took_s, computed_s + way_s / 2)


@dataclass(slots=True)
class Link:
    """What a sender knows of its link to one decode worker, from the acknowledgements of all attempts there."""

    progressed_s: float = 0.0
    """When the latest acknowledgement came."""
    is_quick: bool = False


class BlockWindow:
    """Blocks of one attempt on their way: computed, sent, acknowledged.

    A block that is longer than a frame leaves in pieces: ZeroMQ's heartbeat counts whole frames, and would end a
    connection on which a long one takes its time.
    """

    def __init__(
        self,
        window_bytes: int,
        max_message_bytes: int,
        max_frames_per_message: int,
        max_frame_bytes: int,
        link: Link,
        held: HeldPart | None = None,
    ) -> None:
        """`held` is the part of the first block that the decode worker has."""
        self._window_bytes, self._max_frames = window_bytes, max_frames_per_message
        self._max_message_bytes, self._max_frame_bytes = max_message_bytes, max_frame_bytes
        self.link = link
        self._ready: deque[KVBlock] = deque()
        self._offset = 0
        """What has left of the first of them."""
        self._held = held
        self._unacknowledged_bytes = 0

    def add(self, blocks: Sequence[KVBlock]) -> None:
        """The next blocks are computed."""
        if self._held is not None and blocks:
            self._skip_held(blocks[0][2])
        self._ready.extend(blocks)

    def _skip_held(self, block: bytes) -> None:
        # a block that is computed again, beside other prompts, may differ in its last bits: two halves would not match
        held, self._held = self._held, None
        assert held is not None, "it was looked at"
        if held.num_bytes < len(block) and checksum(memoryview(block)[: held.num_bytes]) == held.digest:
            self._offset = held.num_bytes

    @property
    def num_ready(self) -> int:
        """Blocks that have not left as a whole."""
        return len(self._ready)

    @property
    def ready_bytes(self) -> int:
        """Their bytes."""
        return sum([len(payload) for _, _, payload in self._ready])

    def take_all(self) -> tuple[list[BlockMark], list[bytes]]:
        """All ready blocks, whatever the bounds: they leave with a claim, which is acknowledged as a whole."""
        ready, self._ready = self._ready, deque()
        marks = [BlockMark(index, num_tokens, checksum(payload)) for index, num_tokens, payload in ready]
        return marks, [payload for _, _, payload in ready]

    @property
    def can_send(self) -> bool:
        """Whether :meth:`take` has something now."""
        return bool(self._ready) and self._has_room(self._next_bytes())

    @property
    def is_waiting(self) -> bool:
        """Whether bytes were sent that are not acknowledged."""
        return self._unacknowledged_bytes > 0

    def _has_room(self, size_bytes: int) -> bool:
        # what is wider than the window goes alone: it could never go otherwise
        return not self._unacknowledged_bytes or self._unacknowledged_bytes + size_bytes <= self._window_bytes

    def _next_bytes(self) -> int:
        return min(len(self._ready[0][2]) - self._offset, self._max_frame_bytes)

    def take(self) -> tuple[list[BlockMark], list[bytes | memoryview]]:
        """What may go out now as one message: blocks, and pieces of long ones. Nothing if the window is full or nothing is ready."""
        marks: list[BlockMark] = []
        payloads: list[bytes | memoryview] = []
        num_bytes, max_bytes = 0, self._max_message_bytes if self.link.is_quick else self._max_frame_bytes
        while self._ready and len(marks) < self._max_frames:
            size_bytes = self._next_bytes()
            if not self._has_room(size_bytes) or (marks and num_bytes + size_bytes > max_bytes):
                break
            mark, payload = self._cut(size_bytes)
            marks.append(mark)
            payloads.append(payload)
            num_bytes += size_bytes
            self._unacknowledged_bytes += size_bytes
        return marks, payloads

    def _cut(self, size_bytes: int) -> tuple[BlockMark, bytes | memoryview]:
        """The next piece of the first block that is ready, without a copy."""
        index, num_tokens, block = self._ready[0]
        offset, left_bytes = self._offset, len(block) - self._offset - size_bytes
        payload = memoryview(block)[offset : offset + size_bytes] if offset or left_bytes else block
        self._offset += size_bytes
        if not left_bytes:
            self._ready.popleft()
            self._offset = 0
        return BlockMark(index, num_tokens, checksum(payload), offset, left_bytes), payload

    def acknowledged(self, num_bytes: int, waited_s: float) -> None:
        """So many bytes have come, `waited_s` after the acknowledgement before."""
        self._unacknowledged_bytes = max(0, self._unacknowledged_bytes - num_bytes)
        self.link.is_quick = waited_s < _QUICK_S


class RateLimit:
    """So many bytes a second, with a burst of :data:`BURST_S`: a message may go while nothing is owed, and its excess is owed."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0

    def wait_s(self, now_s: float) -> float:
        """Until the next message may go; 0 or less: now. Without a limit, always now."""
        return self._free_at_s - BURST_S - now_s if self._bytes_per_s else 0.0

    def sent(self, size_bytes: int, now_s: float) -> None:
        """A message of this size went out."""
        if self._bytes_per_s:
            self._free_at_s = max(self._free_at_s, now_s) + size_bytes / self._bytes_per_s
