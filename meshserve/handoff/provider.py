"""The prefill worker's side of the handoff: tickets in, claims out, blocks out."""

import asyncio
import time
from array import array
from collections.abc import Callable
from typing import Any

from meshserve.config import HandoffConfig
from meshserve.engines.protocol import Engine, KVBlock
from meshserve.errors import MeshserveError, PeerLost, ProtocolError
from meshserve.handoff.blocks import checksum
from meshserve.handoff.claimed import ClaimedPrompt, EngineSink
from meshserve.handoff.queue import JobKey, JobState, PrefillQueue
from meshserve.handoff.sending import BlockSender, Transfer
from meshserve.kv.hashes import prefix_hashes
from meshserve.mesh.calls import IgnoredAnswer, IncomingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.pipeline import Bulk, Pipeline
from meshserve.mesh.transport.bulk import MAX_PAYLOADS
from meshserve.wire.handoff import MAX_RENEWED, Acknowledgement, BlockMark, BulkHeader, Claim, Grant, NamedAttempt, Renewal, Ticket
from meshserve.wire.messages import CLAIM, RENEW, STRIKE
from meshserve.wire.structs import read

_RENEW_TIMEOUT_S = 5.0
_CLAIM_AFTER_S = 0.002
"""A prompt that was begun on an offer and takes longer than this is claimed at once: its decode worker must know who has it."""


class PrefillProvider:
    """Pulls tickets, claims prompts as the engine comes free, computes them and sends their blocks.

    Deciding is :class:`~meshserve.handoff.queue.PrefillQueue`'s; this carries it out on the mesh and the engine.
    """

    def __init__(self, mesh: Mesh, pipeline: Pipeline, engine: Engine, config: HandoffConfig) -> None:
        self._mesh, self._engine, self._config = mesh, engine, config
        self.counters = mesh.counters
        self._queue = PrefillQueue(config)
        self._jobs: dict[JobKey, ClaimedPrompt] = {}
        self._is_closing = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._sender: BlockSender | None = None
        self.on_queue_changed: Callable[[], None] = lambda: None
        """Called when prompts come or go."""
        self.on_queued: Callable[[str], None] = lambda request_id: None
        """Called with each request of which a ticket is counted in `num_queued` from now on."""
        mesh.gauges.derive("tickets", lambda: self._queue.num_waiting)
        mesh.gauges.derive("attempts", lambda: len(self._jobs))
        pipeline.receive(self._on_ticket)
        mesh.serve(STRIKE, self._on_strike)
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
        if self._mesh.member(ticket.decode_peer) is None or not self._queue.ticket(ticket, time.monotonic()):
            self.counters.add("tickets_refused")
            return
        self.counters.add("tickets_received")
        self.on_queued(ticket.request_id)
        self.pump()

    def _on_strike(self, call: IncomingCall) -> None:
        self._strike((call.peer, call.body))
        call.end()

    def _strike(self, key: JobKey) -> None:
        job = self._jobs.get(key)
        if self._queue.strike(key):
            self.counters.add("tickets_struck")
            self.on_queue_changed()
            if self._mesh.event_log.is_on:
                self._mesh.event_log.note("struck", key[1], decode=key[0])
        elif job is not None and job.call is None:
            self.ended(job, "struck")

    def pump(self) -> None:
        """Claim as long as the engine has room."""
        if not self._queue.num_waiting:
            return
        while not self._is_closing and (ticket := self._queue.next_claim(time.monotonic())) is not None:
            self._take_up(ticket)
        if self._timer is None and (wait_s := self._queue.claim_in_s(time.monotonic())) is not None:
            self._timer = self._loop.call_later(wait_s, self._pump_later)

    def _pump_later(self) -> None:
        self._timer = None
        self.pump()

    def _take_up(self, ticket: Ticket) -> None:
        job = ClaimedPrompt(self, ticket)
        self._jobs[job.key] = job
        offer, now_s = ticket.offer, time.monotonic()
        if offer is None or not self._queue.may_begin(ticket, now_s) or not self._is_within(offer.first_block, offer.tokens):
            self._claim(job)
            return
        job.waited_ms = (now_s - offer.came_s) * 1000
        self.counters.add("prefills_begun_on_offer")
        self._begin(job, offer.tokens, ticket.attempt, offer.first_block)
        if job.call is None and job.key in self._jobs:
            job.claim_timer = self._loop.call_later(_CLAIM_AFTER_S, self._claim, job)

    def _claim(self, job: ClaimedPrompt) -> None:
        """Ask for the task; of what was begun already, the same."""
        if job.call is None and job.key in self._jobs:
            self._open_claim(job, Claim(job.ticket.request_id), self._config.attempt_timeout_s)

    def _deliver(self, job: ClaimedPrompt) -> None:
        """All was computed on the offer before anybody was asked: the claim brings it."""
        marks = tuple(BlockMark(index, num_tokens, checksum(payload)) for index, num_tokens, payload in job.kept)
        payloads = [payload for _, _, payload in job.kept]
        decode_peer, request_id = job.key
        label = decode_peer, self._mesh.incarnation, request_id, job.attempt
        layout, prefix_hash = self._engine.kv_layout.fingerprint, job.prefix_hashes[marks[-1].index] if marks else 0
        header = BulkHeader(*label, marks, job.computed_ms, layout, prefix_hash)
        self._queue.delivered(job.key)
        job.kept, job.num_delivered_bytes = [], sum(map(len, payloads))
        self._note(job, "blocks_sent", indexes=[mark.index for mark in marks])
        self._open_claim(job, Claim(request_id, header, payloads, job.waited_ms), self._config.block_timeout_s)
        if len(self._jobs) == 1:
            self._mesh.hurry()
        self.counters.add("kv_blocks_sent", len(payloads))
        self.counters.add("kv_bytes_sent", job.num_delivered_bytes)

    def _open_claim(self, job: ClaimedPrompt, claim: Claim, timeout_s: float) -> None:
        try:
            job.call = self._mesh.open(job.ticket.decode_peer, CLAIM, claim, job, timeout_s)
        except PeerLost:
            self.ended(job, "decode worker lost")
            return
        self.counters.add("claims_sent")

    # --- one job

    def granted(self, job: ClaimedPrompt, item: Any) -> None:
        """The claim was the first: the task is ours."""
        try:
            grant: Grant = read(CLAIM.item, item)
            if not self._is_within(grant.first_block, grant.tokens):
                raise ProtocolError("a task begins within its prompt")
        except ProtocolError:
            self.counters.add("tasks_malformed")
            self._give_up(job, "malformed task")
            return
        tokens, attempt, first_block = grant.tokens, grant.attempt, grant.first_block
        job.is_granted = True
        if job.has_failed:
            self._give_up(job, "engine failed")
        elif not job.engine_id:
            self._begin(job, tokens, attempt, first_block)
        elif self._goes_on(job, attempt, first_block):
            self._send_kept(job)
        else:
            self._begin_again(job, tokens, attempt, first_block)

    def _goes_on(self, job: ClaimedPrompt, attempt: int, first_block: int) -> bool:
        """Whether what was begun on an offer is what was granted. What was delivered and not enough is not."""
        assert job.ticket.offer is not None
        is_kept = self._queue.state(job.key) is not JobState.DELIVERED
        return is_kept and attempt == job.attempt and first_block >= job.ticket.offer.first_block

    def _send_kept(self, job: ClaimedPrompt) -> None:
        assert self._sender is not None
        kept, job.kept = job.kept, []
        job.transfer, job.acknowledged_s = self._open_transfer(job), time.monotonic()
        self._sender.add(job.transfer, kept, job.computed_ms)

    def _begin_again(self, job: ClaimedPrompt, tokens: "array[int]", attempt: int, first_block: int) -> None:
        self._engine.cancel(job.engine_id)
        self._note(job, "prefill_ended", outcome="granted otherwise")
        job.kept = []
        self._queue.granted_otherwise(job.key, time.monotonic())
        self._begin(job, tokens, attempt, first_block)

    def _begin(self, job: ClaimedPrompt, tokens: "array[int]", attempt: int, first_block: int) -> None:
        assert self._sender is not None
        layout, job.num_tokens = self._engine.kv_layout, len(tokens)
        job.prefix_hashes = prefix_hashes(tokens, layout.block_size, self._engine.card.model_hash)
        num_tokens = job.num_tokens - first_block * self._engine.kv_layout.block_size
        job.began_s = time.monotonic()
        if not self._queue.granted(job.key, attempt, num_tokens, job.began_s):
            return
        job.attempt = attempt
        if job.is_granted:
            job.transfer = self._open_transfer(job)
        job.engine_id = f"{job.ticket.decode_peer}/{job.ticket.request_id}@{attempt}"
        self._note(job, "prefill_begun", num_tokens=num_tokens)
        try:
            self._engine.prefill(job.engine_id, tokens, first_block, EngineSink(job))
        except MeshserveError:
            self.engine_failed(job)

    def _open_transfer(self, job: ClaimedPrompt) -> Transfer:
        assert self._sender is not None
        return self._sender.open(*job.key, job.attempt, self._engine.kv_layout.fingerprint, job.prefix_hashes)

    def _is_within(self, first_block: int, tokens: "array[int]") -> bool:
        return 0 <= first_block * self._engine.kv_layout.block_size < len(tokens)

    def _note(self, job: ClaimedPrompt, event: str, **details: Any) -> None:
        if self._mesh.event_log.is_on and job.attempt:
            self._mesh.event_log.note(event, job.ticket.request_id, decode=job.ticket.decode_peer, attempt=job.attempt, **details)

    def computed(self, job: ClaimedPrompt, blocks: list[KVBlock]) -> None:
        """The engine gives out the blocks of a step: they leave while the next step is computed."""
        now_s = time.monotonic()
        job.acknowledged_s = job.acknowledged_s or now_s
        job.computed_ms = (now_s - job.began_s) * 1000
        self._queue.computed(job.key, sum([num_tokens for _, num_tokens, _ in blocks]), now_s)
        if job.transfer is not None and self._sender is not None:
            self._sender.add(job.transfer, blocks, job.computed_ms)
        else:
            job.kept += blocks
        self.pump()

    def all_computed(self, job: ClaimedPrompt, num_cached_tokens: int) -> None:
        """The engine has room again; the blocks may still be on their way."""
        self.counters.add("prefill_tokens", job.num_tokens)
        self.counters.add("prefill_tokens_cached", num_cached_tokens)
        self._queue.all_computed(job.key, num_cached_tokens, time.monotonic())
        if job.call is None and self._can_deliver(job):
            self._deliver(job)
        else:
            self._claim(job)
        self.pump()

    def _can_deliver(self, job: ClaimedPrompt) -> bool:
        """Little enough for the connection of the calls, and nothing that a limit of the bulk path would hold back."""
        num_bytes = sum(len(payload) for _, _, payload in job.kept)
        is_limited = self._mesh.config.transport.bulk_bytes_per_s > 0
        return not is_limited and len(job.kept) <= MAX_PAYLOADS and num_bytes <= self._config.offer_kv_bytes

    def delivered(self, job: ClaimedPrompt) -> None:
        """The decode worker has all blocks."""
        self.counters.add("prefills_delivered")
        if self._queue.state(job.key) is JobState.DELIVERED:
            self._note(job, "ack", num_bytes=job.num_delivered_bytes)
        self.ended(job, "delivered")

    def engine_failed(self, job: ClaimedPrompt) -> None:
        """The engine cannot: another worker may. Who is to be told so is not yet, where it was begun on an offer."""
        self.counters.add("prefills_failed")
        if job.is_granted:
            self._give_up(job, "engine failed")
        else:
            job.has_failed = True
            self._claim(job)

    def _give_up(self, job: ClaimedPrompt, outcome: str) -> None:
        if job.call is not None:
            job.call.cancel()
        self.ended(job, outcome)

    def ended(self, job: ClaimedPrompt, outcome: str) -> None:
        """Delivered, gone, revoked or lost: whatever it was, free what it holds."""
        state = self._queue.ended(job.key, time.monotonic())
        if state is None:
            return
        del self._jobs[job.key]
        if job.claim_timer is not None:
            job.claim_timer.cancel()
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
        try:
            done = Acknowledgement.from_wire(answer)
        except ProtocolError:
            self.counters.add("bulk_malformed")
            return
        job = self._jobs.get((decode_peer, done.request_id))
        if job is not None and self._queue.is_running(job.key, done.attempt):
            assert self._sender is not None and job.transfer is not None
            job.acknowledged_s = time.monotonic()
            self._sender.acknowledged(job.transfer, done.num_bytes)
            self._note(job, "ack", num_bytes=done.num_bytes)

    def bulk_lost(self, decode_peer: str, reason: str) -> None:
        """Blocks may be lost with the connection: these attempts are over, and their decode worker decides what next."""
        for job in [job for job in self._jobs.values() if job.is_granted and job.ticket.decode_peer == decode_peer]:
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
            named: dict[str, list[NamedAttempt]] = {}
            for job in list(self._jobs.values()):
                if job.transfer is not None and (overdue_s := self._overdue_s(job)) is not None:
                    attempt = NamedAttempt(job.ticket.request_id, job.transfer.attempt, overdue_s)
                    named.setdefault(job.ticket.decode_peer, []).append(attempt)
            for decode_peer, attempts in named.items():
                if self._mesh.links.channel_to(decode_peer) is not None:
                    renewal = Renewal(attempts[:MAX_RENEWED])
                    self._mesh.open(decode_peer, RENEW, renewal, IgnoredAnswer(), _RENEW_TIMEOUT_S)

    def _overdue_s(self, job: ClaimedPrompt) -> float | None:
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
