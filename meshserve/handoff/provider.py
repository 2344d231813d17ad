"""The prefill worker's side of the handoff: tickets in, claims out, blocks out."""

import asyncio
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshserve.config import HandoffConfig
from meshserve.engines.protocol import Engine
from meshserve.errors import Gone, MeshserveError, PeerLost, ProtocolError
from meshserve.handoff.queue import JobKey, JobState, PrefillQueue
from meshserve.handoff.requester import IgnoredAnswer
from meshserve.handoff.sending import BlockSender, Transfer
from meshserve.handoff.tickets import Ticket
from meshserve.mesh.calls import IncomingCall, OutgoingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.pipeline import Bulk, Pipeline
from meshserve.wire.generation import unpack_tokens

_RENEW_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Job:
    """One claimed prompt, as the sink of both its claim and its engine run."""

    provider: "PrefillProvider"
    ticket: Ticket
    call: OutgoingCall | None = None
    transfer: Transfer | None = None
    engine_id: str = ""
    began_s: float = 0.0
    num_tokens: int = 0
    """Of the prompt, once it is known."""
    acknowledged_s: float = 0.0
    """When the decode worker last took in a block, or the first was computed."""

    @property
    def key(self) -> JobKey:
        return (self.ticket.decode_peer, self.ticket.request_id)

    # the claim's answers

    def on_item(self, item: Any) -> None:
        self.provider.granted(self, item)

    def on_end(self, value: Any) -> None:
        self.provider.counters.add("prefills_delivered")
        self.provider.ended(self, "delivered")

    def on_error(self, error: MeshserveError) -> None:
        self.provider.counters.add("claims_answered_gone" if isinstance(error, Gone) and not self.engine_id else "claims_lost")
        self.provider.ended(self, error.code)


class _EngineSink:
    """The engine's view of a job: an engine's failure ends the claim, which tells the decode worker."""

    __slots__ = ("_job",)

    def __init__(self, job: _Job) -> None:
        self._job = job

    def on_block(self, index: int, num_tokens: int, payload: bytes) -> None:
        self._job.provider.computed(self._job, index, num_tokens, payload)

    def on_finish(self, num_cached_tokens: int) -> None:
        self._job.provider.all_computed(self._job, num_cached_tokens)

    def on_error(self, error: MeshserveError) -> None:
        self._job.provider.engine_failed(self._job)


class PrefillProvider:
    """Pulls tickets, claims prompts as the engine comes free, computes them and sends their blocks.

    Deciding is :class:`~meshserve.handoff.queue.PrefillQueue`'s; this carries it out on the mesh and the engine.
    """

    def __init__(self, mesh: Mesh, pipeline: Pipeline, engine: Engine, config: HandoffConfig) -> None:
        self._mesh, self._engine, self._config = mesh, engine, config
        self.counters = mesh.counters
        self._queue = PrefillQueue(config)
        self._jobs: dict[JobKey, _Job] = {}
        self._is_closing = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._sender: BlockSender | None = None
        self.on_queue_changed: Callable[[], None] = lambda: None
        """Called when prompts come or go."""
        self.on_queued: Callable[[str], None] = lambda request_id: None
        """Called with each request of which a ticket is counted in `num_queued` from now on."""
        mesh.levels.derive("tickets", lambda: self._queue.num_waiting)
        mesh.levels.derive("attempts", lambda: len(self._jobs))
        pipeline.receive(self._on_ticket)
        mesh.serve("prefill.strike", self._on_strike)
        mesh.subscribe(self._on_change)
        mesh.tasks.spawn(self._renew_forever())

    def use(self, bulk: Bulk) -> None:
        """Where blocks go out; its answers come to :meth:`acknowledged`, its losses to :meth:`bulk_lost`."""
        self._sender = BlockSender(self._mesh, bulk)

    @property
    def num_queued(self) -> int:
        """Prompts that wait here, claimed or not."""
        return self._queue.num_waiting + self._queue.num_claimed

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
        if self._mesh.member(ticket.decode_peer) is None or not self._queue.ticket(ticket):
            self.counters.add("tickets_refused")
            return
        self.counters.add("tickets_received")
        self.on_queued(ticket.request_id)
        self.pump()

    def _on_strike(self, call: IncomingCall) -> None:
        if isinstance(call.body, str) and self._queue.strike((call.peer, call.body)):
            self.counters.add("tickets_struck")
            self.on_queue_changed()
            if self._mesh.journal.is_on:
                self._mesh.journal.note("struck", call.body, decode=call.peer)
        call.end()

    def pump(self) -> None:
        """Claim as long as the engine has room."""
        while not self._is_closing and (ticket := self._queue.next_claim(time.monotonic())) is not None:
            self._claim(ticket)
        if self._timer is None and (wait_s := self._queue.claim_in_s(time.monotonic())) is not None:
            self._timer = self._loop.call_later(wait_s, self._pump_later)

    def _pump_later(self) -> None:
        self._timer = None
        self.pump()

    def _claim(self, ticket: Ticket) -> None:
        job = _Job(self, ticket)
        try:
            job.call = self._mesh.open(ticket.decode_peer, "prefill.claim", ticket.request_id, job, self._config.attempt_timeout_s)
        except PeerLost:
            self._queue.ended(job.key, time.monotonic())
            return
        self._jobs[job.key] = job
        self.counters.add("claims_sent")

    # --- one job

    def granted(self, job: _Job, item: Any) -> None:
        """The claim was the first: the task is ours."""
        assert self._sender is not None
        try:
            tokens, attempt, first_block = self._task_from(item)
        except ProtocolError:
            self.counters.add("tasks_malformed")
            self._give_up(job, "malformed task")
            return
        job.num_tokens = len(tokens)
        num_tokens = job.num_tokens - first_block * self._engine.card.block_size
        job.began_s = time.monotonic()
        if not self._queue.granted(job.key, attempt, num_tokens, job.began_s):
            return
        job.transfer = self._sender.open(*job.key, attempt)
        job.engine_id = f"{job.ticket.decode_peer}/{job.ticket.request_id}@{attempt}"
        self._note(job, "prefill_begun", num_tokens=num_tokens)
        try:
            self._engine.prefill(job.engine_id, tokens, first_block, _EngineSink(job))
        except MeshserveError:
            self.engine_failed(job)

    def _task_from(self, item: Any) -> tuple["array[int]", int, int]:
        if not isinstance(item, dict) or type(item.get("attempt")) is not int or type(item.get("first_block")) is not int:
            raise ProtocolError("a task is tokens, an attempt and a first block")
        tokens, attempt, first_block = unpack_tokens(item.get("tokens")), item["attempt"], item["first_block"]
        if attempt < 1 or not 0 <= first_block * self._engine.card.block_size < len(tokens):
            raise ProtocolError("a task begins within its prompt")
        return tokens, attempt, first_block

    def _note(self, job: _Job, event: str, **details: Any) -> None:
        if self._mesh.journal.is_on and job.transfer is not None:
            decode, attempt = job.ticket.decode_peer, job.transfer.attempt
            self._mesh.journal.note(event, job.ticket.request_id, decode=decode, attempt=attempt, **details)

    def computed(self, job: _Job, index: int, num_tokens: int, payload: bytes) -> None:
        """The engine gives out a block: it leaves while the next one is computed."""
        assert self._sender is not None and job.transfer is not None
        now_s = time.monotonic()
        job.acknowledged_s = job.acknowledged_s or now_s
        self._queue.computed(job.key, num_tokens, now_s)
        self._sender.add(job.transfer, index, num_tokens, payload, (now_s - job.began_s) * 1000)
        self.pump()

    def all_computed(self, job: _Job, num_cached_tokens: int) -> None:
        """The engine has room again; the blocks may still be on their way."""
        self.counters.add("prefill_tokens", job.num_tokens)
        self.counters.add("prefill_tokens_cached", num_cached_tokens)
        self._queue.all_computed(job.key, num_cached_tokens, time.monotonic())
        self.pump()

    def engine_failed(self, job: _Job) -> None:
        """The engine cannot: another worker may."""
        self.counters.add("prefills_failed")
        self._give_up(job, "engine failed")

    def _give_up(self, job: _Job, outcome: str) -> None:
        if job.call is not None:
            job.call.cancel()
        self.ended(job, outcome)

    def ended(self, job: _Job, outcome: str) -> None:
        """Delivered, gone, revoked or lost: whatever it was, free what it holds."""
        state = self._queue.ended(job.key, time.monotonic())
        if state is None:
            return
        del self._jobs[job.key]
        self._note(job, "prefill_ended", outcome=outcome)
        if job.transfer is not None:
            assert self._sender is not None
            self._sender.close(job.transfer)
        if state is JobState.COMPUTING:
            self._engine.cancel(job.engine_id)
        self.on_queue_changed()
        self.pump()

    # --- blocks

    def acknowledged(self, decode_peer: str, answer: Any) -> None:
        """The decode worker has taken in so many bytes."""
        if not isinstance(answer, list) or [type(part) for part in answer] != [str, int, int]:
            self.counters.add("bulk_malformed")
            return
        request_id, attempt, num_bytes = answer
        job = self._jobs.get((decode_peer, request_id))
        if job is not None and self._queue.is_running(job.key, attempt):
            assert self._sender is not None and job.transfer is not None
            job.acknowledged_s = time.monotonic()
            self._sender.acknowledged(job.transfer, num_bytes)
            self._note(job, "ack", num_bytes=num_bytes)

    def bulk_lost(self, decode_peer: str, reason: str) -> None:
        """Blocks may be lost with the connection: these attempts are over, and their decode worker decides what next."""
        for job in [job for job in self._jobs.values() if job.ticket.decode_peer == decode_peer]:
            self._give_up(job, "bulk lost")

    # --- others

    def _on_change(self, change: Change, member: Member) -> None:
        if change in (Change.DIED, Change.LEFT):
            self._queue.peer_gone(member.info.incarnation)

    async def _renew_forever(self) -> None:
        """Name the attempts that make progress, with how long it is overdue: what a hung engine runs is tried elsewhere."""
        while True:
            await asyncio.sleep(self._mesh.config.heartbeat_interval_s)
            self.pump()  # claims that are not answered no longer keep others waiting
            named: dict[str, list[list[Any]]] = {}
            for job in list(self._jobs.values()):
                if job.transfer is not None and (overdue_s := self._overdue_s(job)) is not None:
                    named.setdefault(job.ticket.decode_peer, []).append([job.ticket.request_id, job.transfer.attempt, overdue_s])
            for decode_peer, attempts in named.items():
                if self._mesh.links.channel_to(decode_peer) is not None:
                    self._mesh.open(decode_peer, "prefill.renew", attempts, IgnoredAnswer(), _RENEW_TIMEOUT_S)

    def _overdue_s(self, job: _Job) -> float | None:
        """Of its computing; of its blocks' way, once all are computed: slow is not lost, until `block_timeout_s`."""
        if self._queue.state(job.key) is JobState.COMPUTING:
            return self._engine.overdue_s(job.engine_id)
        if time.monotonic() - job.acknowledged_s <= self._config.block_timeout_s:
            return 0.0
        self._give_up(job, "blocks not acknowledged")
        return None

    def close(self) -> None:
        """Give up all jobs; their decode workers try elsewhere."""
        self._is_closing = True
        for job in list(self._jobs.values()):
            self._give_up(job, "stopped")
        if self._timer is not None:
            self._timer.cancel()
        if self._sender is not None:
            self._sender.stop()

    def stop_claiming(self) -> None:
        """Draining: what is claimed is finished, what waits is left to others."""
        self._is_closing = True
