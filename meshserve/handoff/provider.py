"""The prefill worker's side of the handoff: tickets in, claims out, blocks out."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from meshserve.config import HandoffConfig
from meshserve.engines.protocol import Engine
from meshserve.errors import Gone, MeshserveError, PeerLost, ProtocolError
from meshserve.handoff.blocks import BlockWindow, BulkHeader
from meshserve.handoff.requester import IgnoredAnswer
from meshserve.handoff.tickets import Ticket, TicketList
from meshserve.mesh.calls import IncomingCall, OutgoingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.pipeline import Bulk, Pipeline
from meshserve.mesh.transport.bulk import MAX_PAYLOADS
from meshserve.wire.generation import unpack_tokens

_RENEW_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Job:
    """One claimed attempt, as the sink of both its claim and its engine run."""

    provider: "PrefillProvider"
    ticket: Ticket
    window: BlockWindow
    call: OutgoingCall | None = None
    engine_id: str = ""
    attempt: int = 0
    began_s: float = 0.0
    computed_ms: float = 0.0
    is_computing: bool = False
    is_computed: bool = False
    is_over: bool = False
    is_send_due: bool = field(default=False)

    # the claim's answers

    def on_item(self, item: Any) -> None:
        self.provider.granted(self, item)

    def on_end(self, value: Any) -> None:
        self.provider.counters.add("prefills_delivered")
        self.provider.ended(self)

    def on_error(self, error: MeshserveError) -> None:
        self.provider.counters.add("claims_answered_gone" if isinstance(error, Gone) and not self.engine_id else "claims_lost")
        self.provider.ended(self)

    # what the engine gives out (as on_error above, which ends the job either way)

    def on_block(self, index: int, num_tokens: int, payload: bytes) -> None:
        self.window.add(index, num_tokens, payload)
        self.computed_ms = (time.monotonic() - self.began_s) * 1000
        self.provider.send_soon(self)

    def on_finish(self, num_cached_tokens: int) -> None:
        self.is_computing, self.is_computed = False, True
        self.provider.pump()


class _EngineSink:
    """The engine's view of a job: an engine's failure ends the claim, which tells the decode worker."""

    __slots__ = ("_job",)

    def __init__(self, job: _Job) -> None:
        self._job = job

    def on_block(self, index: int, num_tokens: int, payload: bytes) -> None:
        self._job.on_block(index, num_tokens, payload)

    def on_finish(self, num_cached_tokens: int) -> None:
        self._job.on_finish(num_cached_tokens)

    def on_error(self, error: MeshserveError) -> None:
        self._job.provider.engine_failed(self._job)


class PrefillProvider:
    """Pulls tickets, claims prompts as slots come free, computes them and sends their blocks."""

    def __init__(self, mesh: Mesh, pipeline: Pipeline, engine: Engine, config: HandoffConfig) -> None:
        self._mesh, self._engine, self._config = mesh, engine, config
        self.counters = mesh.counters
        self._loop = asyncio.get_running_loop()
        self._tickets = TicketList(config.max_tickets)
        self._jobs: dict[tuple[str, str], _Job] = {}
        self._is_closing = False
        self._bulk: Bulk | None = None
        self.on_queue_changed: Callable[[], None] = lambda: None
        """Called when prompts come or go."""
        pipeline.receive(self._on_ticket)
        mesh.serve("prefill.strike", self._on_strike)
        mesh.subscribe(self._on_change)
        mesh.tasks.spawn(self._renew_forever())

    def use(self, bulk: Bulk) -> None:
        """Where blocks go out; its answers come to :meth:`acknowledged`, its losses to :meth:`bulk_lost`."""
        self._bulk = bulk

    @property
    def num_queued(self) -> int:
        """Prompts that wait here, claimed or not."""
        return len(self._tickets) + len(self._jobs)

    @property
    def is_idle(self) -> bool:
        """Nothing claimed is unfinished."""
        return not self._jobs

    # --- tickets

    def _on_ticket(self, data: Any) -> None:
        try:
            ticket = Ticket.from_wire(data)
        except ProtocolError:
            self.counters.add("tickets_malformed")
            return
        if self._mesh.member(ticket.decode_peer) is None or not self._tickets.add(ticket):
            self.counters.add("tickets_refused")
            return
        self.counters.add("tickets_received")
        self.on_queue_changed()
        self.pump()

    def _on_strike(self, call: IncomingCall) -> None:
        if isinstance(call.body, str) and self._tickets.strike(call.peer, call.body):
            self.counters.add("tickets_struck")
        call.end()

    def pump(self) -> None:
        """Claim as long as slots are free."""
        while not self._is_closing and self._num_busy() < self._config.prefill_slots:
            ticket = self._tickets.take()
            if ticket is None:
                return
            self._claim(ticket)

    def _num_busy(self) -> int:
        return sum(not job.is_computed for job in self._jobs.values())

    def _claim(self, ticket: Ticket) -> None:
        key = (ticket.decode_peer, ticket.request_id)
        if key in self._jobs:
            return
        job = _Job(self, ticket, BlockWindow(self._mesh.config.transport.bulk_window_bytes, MAX_PAYLOADS))
        try:
            job.call = self._mesh.open(ticket.decode_peer, "prefill.claim", ticket.request_id, job, self._config.attempt_timeout_s)
        except PeerLost:
            return
        self._jobs[key] = job
        self.counters.add("claims_sent")

    # --- one job

    def granted(self, job: _Job, item: Any) -> None:
        """The claim was the first: the task is ours."""
        try:
            tokens, job.attempt, first_block = unpack_tokens(item["tokens"]), int(item["attempt"]), int(item["first_block"])
        except (KeyError, TypeError, ValueError, ProtocolError):
            self.counters.add("tasks_malformed")
            self._give_up(job)
            return
        job.engine_id, job.began_s, job.is_computing = f"{job.ticket.request_id}@{job.attempt}", time.monotonic(), True
        try:
            self._engine.prefill(job.engine_id, tokens, first_block, _EngineSink(job))
        except MeshserveError:
            self.engine_failed(job)

    def engine_failed(self, job: _Job) -> None:
        """The engine cannot: another worker may."""
        self.counters.add("prefills_failed")
        self._give_up(job)

    def _give_up(self, job: _Job) -> None:
        if job.call is not None:
            job.call.cancel()
        self.ended(job)

    def ended(self, job: _Job) -> None:
        """Delivered, gone, revoked or lost: whatever it was, free what it holds."""
        if job.is_over:
            return
        job.is_over = True
        self._jobs.pop((job.ticket.decode_peer, job.ticket.request_id), None)
        if job.engine_id and not job.is_computed:
            self._engine.cancel(job.engine_id)
        self.on_queue_changed()
        self.pump()

    # --- blocks

    def send_soon(self, job: _Job) -> None:
        """What the engine gives out in one turn leaves in one message."""
        if not job.is_send_due:
            job.is_send_due = True
            self._loop.call_soon(self._send, job)

    def _send(self, job: _Job) -> None:
        job.is_send_due = False
        while not job.is_over and (taken := job.window.take()):
            assert self._bulk is not None
            marks = tuple(mark for mark, _ in taken)
            header = BulkHeader(job.ticket.decode_peer, job.ticket.request_id, job.attempt, marks, job.computed_ms)
            try:
                self._bulk.send(job.ticket.decode_peer, header.to_wire(), [payload for _, payload in taken])
            except PeerLost:
                self._give_up(job)
                return
            self.counters.add("blocks_sent", len(taken))

    def acknowledged(self, decode_peer: str, answer: Any) -> None:
        """The decode worker has taken in so many bytes."""
        if not isinstance(answer, list) or [type(part) for part in answer] != [str, int, int]:
            self.counters.add("bulk_malformed")
            return
        job = self._jobs.get((decode_peer, answer[0]))
        if job is not None and job.attempt == answer[1]:
            job.window.acknowledged(answer[2])
            self._send(job)

    def bulk_lost(self, decode_peer: str, reason: str) -> None:
        """Blocks may be lost with the connection: these attempts are over, and their decode worker decides what next."""
        for job in [job for job in self._jobs.values() if job.ticket.decode_peer == decode_peer]:
            self._give_up(job)

    # --- others

    def _on_change(self, change: Change, member: Member) -> None:
        if change in (Change.DIED, Change.LEFT):
            self._tickets.strike_all_of(member.info.incarnation)

    async def _renew_forever(self) -> None:
        """Name the attempts that make progress; a hung engine's are not named, and are tried elsewhere."""
        while True:
            await asyncio.sleep(self._mesh.config.heartbeat_interval_s)
            named: dict[str, list[list[Any]]] = {}
            for (decode_peer, request_id), job in self._jobs.items():
                if job.is_computed or (job.engine_id and self._engine.is_working_on(job.engine_id)):
                    named.setdefault(decode_peer, []).append([request_id, job.attempt])
            for decode_peer, attempts in named.items():
                if self._mesh.links.channel_to(decode_peer) is not None:
                    self._mesh.open(decode_peer, "prefill.renew", attempts, IgnoredAnswer(), _RENEW_TIMEOUT_S)

    def close(self) -> None:
        """Give up all jobs; their decode workers try elsewhere."""
        self._is_closing = True
        for job in list(self._jobs.values()):
            self._give_up(job)

    def stop_claiming(self) -> None:
        """Draining: what is claimed is finished, what waits is left to others."""
        self._is_closing = True
