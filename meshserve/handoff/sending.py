"""Blocks on their way out: attempts take turns on the bulk path, each within its window, all together within the rate limit."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from meshserve.engines.protocol import KVBlock
from meshserve.errors import PeerLost
from meshserve.handoff.blocks import BlockWindow, RateLimit
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.pipeline import Bulk
from meshserve.mesh.transport.bulk import MAX_PAYLOADS
from meshserve.wire.handoff import BulkHeader


@dataclass(slots=True)
class Transfer:
    """The blocks of one attempt."""

    decode_peer: str
    request_id: str
    attempt: int
    window: BlockWindow
    layout: str
    prefix_hashes: list[int]
    computed_ms: float = 0.0
    is_in_line: bool = False
    is_over: bool = False


class BlockSender:
    """Owns the order in which blocks leave this peer. What the engine gives out in one turn leaves in one message."""

    def __init__(self, mesh: Mesh, bulk: Bulk) -> None:
        config = mesh.config.transport
        self._mesh, self._bulk = mesh, bulk
        self._window_bytes, self._message_bytes = config.bulk_window_bytes, config.bulk_message_bytes
        self._limit = RateLimit(config.bulk_bytes_per_s)
        self._loop = asyncio.get_running_loop()
        self._line: deque[Transfer] = deque()
        self._handle: asyncio.Handle | None = None

    def open(self, decode_peer: str, request_id: str, attempt: int, layout: str, prefix_hashes: list[int]) -> Transfer:
        """A transfer to which blocks of this layout, and of a prompt with these hashes, can be added."""
        window = BlockWindow(self._window_bytes, self._message_bytes, MAX_PAYLOADS)
        return Transfer(decode_peer, request_id, attempt, window, layout, prefix_hashes)

    def add(self, transfer: Transfer, blocks: list[KVBlock], computed_ms: float) -> None:
        """The next blocks are computed, `computed_ms` after the attempt began."""
        transfer.window.add(blocks)
        transfer.computed_ms = computed_ms
        self._stand_in_line(transfer)

    def acknowledged(self, transfer: Transfer, num_bytes: int) -> None:
        """The decode worker has taken in so much."""
        transfer.window.acknowledged(num_bytes)
        self._stand_in_line(transfer)

    def close(self, transfer: Transfer) -> None:
        """What is not sent yet is dropped."""
        transfer.is_over = True

    def _stand_in_line(self, transfer: Transfer) -> None:
        if not transfer.is_in_line and not transfer.is_over and transfer.window.can_send:
            transfer.is_in_line = True
            self._line.append(transfer)
            if self._handle is None:
                self._handle = self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._handle = None
        while self._line:
            now_s = time.monotonic()
            wait_s = self._limit.wait_s(now_s)
            if wait_s > 0:
                self._handle = self._loop.call_later(wait_s, self._send)
                return
            transfer = self._line.popleft()
            transfer.is_in_line = False
            if not transfer.is_over:
                self._limit.sent(self._send_one(transfer), now_s)
                self._stand_in_line(transfer)

    def _send_one(self, transfer: Transfer) -> int:
        """One message of this attempt; returns its size in bytes."""
        marks, payloads = transfer.window.take()
        label = transfer.decode_peer, self._mesh.incarnation, transfer.request_id, transfer.attempt
        prefix_hash = transfer.prefix_hashes[marks[-1].index]
        header = BulkHeader(*label, tuple(marks), transfer.computed_ms, transfer.layout, prefix_hash)
        try:
            self._bulk.send(transfer.decode_peer, header, payloads)
        except PeerLost:
            transfer.is_over = True  # the claim's stream to that peer ends too, and with it the attempt
            return 0
        size_bytes = sum(map(len, payloads))
        self._mesh.counters.add("kv_blocks_sent", len(payloads))
        self._mesh.counters.add("kv_bytes_sent", size_bytes)
        if self._mesh.event_log.follows(transfer.request_id):
            self._note(transfer, [mark.index for mark in marks])
        return size_bytes

    def _note(self, transfer: Transfer, indexes: list[int]) -> None:
        details: dict[str, Any] = {"decode": transfer.decode_peer, "attempt": transfer.attempt, "indexes": indexes}
        self._mesh.event_log.note("blocks_sent", transfer.request_id, **details)

    def stop(self) -> None:
        """Send nothing more."""
        self._line.clear()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
