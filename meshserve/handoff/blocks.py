"""KV blocks on the move: their checksums, the window that bounds them, the rate. Pure."""

from collections import deque
from collections.abc import Collection, Sequence

import xxhash

from meshserve.engines.protocol import KVBlock
from meshserve.errors import BlockRefused
from meshserve.wire.handoff import BlockMark, BulkHeader, Claim

BURST_S = 0.002
"""How far a limited link may be ahead of its rate: timers have steps of a millisecond, and the rate must be
reached all the same."""

checksum = xxhash.xxh3_64_digest
"""Of a payload: 64 bits catch every truncation and flip that TCP's checksum lets through, at memory speed."""


def check_blocks(header: BulkHeader, payloads: Sequence[bytes | memoryview]) -> None:
    """Raises BlockRefused unless each payload is what its mark says. The caller checks the tokens."""
    if len(payloads) != len(header.marks):
        raise BlockRefused(f"{len(header.marks)} blocks announced, {len(payloads)} came")
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


class BlockWindow:
    """Blocks of one attempt on their way: computed, sent, acknowledged."""

    def __init__(self, window_bytes: int, max_message_bytes: int, max_blocks_per_message: int) -> None:
        self._window_bytes, self._max_message_bytes, self._max_blocks = window_bytes, max_message_bytes, max_blocks_per_message
        self._ready: deque[KVBlock] = deque()
        self._unacknowledged_bytes = 0

    def add(self, blocks: Sequence[KVBlock]) -> None:
        """The next blocks are computed."""
        self._ready.extend(blocks)

    @property
    def num_ready(self) -> int:
        """Blocks that are not sent yet."""
        return len(self._ready)

    @property
    def ready_bytes(self) -> int:
        """Their bytes."""
        return sum([len(payload) for _, _, payload in self._ready])

    def take_all(self) -> tuple[list[BlockMark], list[bytes]]:
        """All ready blocks, whatever the bounds: they leave with a claim, which is acknowledged as a whole."""
        ready, self._ready = self._ready, deque()
        return _marked(ready)

    @property
    def can_send(self) -> bool:
        """Whether :meth:`take` has something now."""
        sent_bytes = self._unacknowledged_bytes
        return bool(self._ready) and (not sent_bytes or sent_bytes + len(self._ready[0][2]) <= self._window_bytes)

    def take(self) -> tuple[list[BlockMark], list[bytes]]:
        """What may go out now as one message; nothing if the window is full or nothing is ready."""
        taken: list[KVBlock] = []
        num_bytes, ready = 0, self._ready
        while ready and len(taken) < self._max_blocks:
            sent_bytes, size_bytes = self._unacknowledged_bytes, len(ready[0][2])
            # a block that is wider than a bound goes alone: it could never go otherwise
            is_over_window = sent_bytes > 0 and sent_bytes + size_bytes > self._window_bytes
            if is_over_window or (taken and num_bytes + size_bytes > self._max_message_bytes):
                break
            taken.append(ready.popleft())
            num_bytes += size_bytes
            self._unacknowledged_bytes += size_bytes
        return _marked(taken)

    def acknowledged(self, num_bytes: int) -> None:
        """The receiver has taken in so many bytes."""
        self._unacknowledged_bytes = max(0, self._unacknowledged_bytes - num_bytes)


def _marked(blocks: Collection[KVBlock]) -> tuple[list[BlockMark], list[bytes]]:
    marks = [BlockMark(index, num_tokens, checksum(payload)) for index, num_tokens, payload in blocks]
    return marks, [payload for _, _, payload in blocks]


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
