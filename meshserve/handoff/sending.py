"""Blocks on their way out: jobs take turns on the bulk path, each within its window, all together within the rate limit."""

import asyncio
import time
from collections import deque

from meshserve.errors import PeerLost
from meshserve.handoff.blocks import RateLimit
from meshserve.handoff.queue import Job, JobState
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.transport.bulk import BulkSender
from meshserve.wire.handoff import BlockMark, BulkHeader, num_ended


class BlockSender:
    """Owns the order in which blocks leave this peer. What the engine gives out in one turn leaves in one message."""

    def __init__(self, mesh: Mesh, bulk: BulkSender) -> None:
        self._mesh, self._bulk = mesh, bulk
        self._limit = RateLimit(mesh.config.transport.bulk_bytes_per_s)
        self._loop = asyncio.get_running_loop()
        self._line: deque[Job] = deque()
        self._handle: asyncio.Handle | None = None

    def line_up(self, job: Job) -> None:
        """Send the ready blocks of a job, in its turn. Called when blocks are computed or acknowledged."""
        if not job.is_in_line and _can_send(job):
            job.is_in_line = True
            self._line.append(job)
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
            job = self._line.popleft()
            job.is_in_line = False
            if _can_send(job):
                self._limit.sent(self._send_one(job), now_s)
                self.line_up(job)  # behind the others: each sends one message at a time

    def _send_one(self, job: Job) -> int:
        """One message of this job; returns its size in bytes."""
        assert job.window is not None, "it can send"
        marks, payloads = job.window.take()
        try:
            self._bulk.send(job.ticket.decode_peer, self.header(job, marks), payloads)
        except PeerLost:
            job.window = None  # the claim's stream to that peer ends too, and with it the job
            return 0
        size_bytes = sum(map(len, payloads))
        self.count(job, marks, size_bytes)
        return size_bytes

    def header(self, job: Job, marks: list[BlockMark]) -> BulkHeader:
        """The header for these blocks of this job."""
        label = job.ticket.decode_peer, self._mesh.incarnation, job.ticket.request_id, job.attempt
        prefix_hash = job.prefix_hashes[marks[-1].index] if marks else 0
        return BulkHeader(*label, tuple(marks), job.computed_ms, job.layout, prefix_hash)

    def count(self, job: Job, marks: list[BlockMark], size_bytes: int) -> None:
        """Blocks of this job left, by the bulk path or with its claim."""
        self._mesh.counters.add("kv_blocks_sent", num_ended(marks))
        self._mesh.counters.add("kv_bytes_sent", size_bytes)
        ticket, log = job.ticket, self._mesh.event_log
        if log.follows(ticket.request_id):
            indexes = [mark.index for mark in marks]
            log.note("blocks_sent", ticket.request_id, decode=ticket.decode_peer, attempt=job.attempt, indexes=indexes)

    def stop(self) -> None:
        """Send nothing more."""
        self._line.clear()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def _can_send(job: Job) -> bool:
    return job.state is not JobState.OVER and job.window is not None and job.window.can_send
