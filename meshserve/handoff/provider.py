"""The prefill worker's side of the handoff: tickets in, claims out, blocks out."""

import asyncio
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from meshserve.config import HandoffConfig
from meshserve.engines.protocol import Engine, KVBlock
from meshserve.errors import Gone, MeshserveError, PeerLost, ProtocolError
from meshserve.handoff.blocks import BlockWindow, Link
from meshserve.handoff.queue import Job, JobKey, JobState, PrefillQueue
from meshserve.handoff.sending import BlockSender
from meshserve.kv.pool import prefix_hashes
from meshserve.mesh.calls import IgnoredAnswer, IncomingCall, OutgoingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.transport.bulk import MAX_PAYLOAD_BYTES, MAX_PAYLOADS, BulkSender
from meshserve.mesh.transport.tickets import receive_tickets
from meshserve.wire.handoff import MAX_RENEWED, Acknowledgement, Claim, Grant, HeldPart, NamedAttempt, Renewal, Ticket
from meshserve.wire.messages import CLAIM, RENEW, STRIKE
from meshserve.wire.structs import read

_RENEW_TIMEOUT_S = 5.0
_CLAIM_TIMEOUT_S = 86_400.0
"""Only a bound of the stream: leases and missing progress end attempts, however long a slow link takes."""
_CLAIM_AFTER_S = 0.002
"""A prompt that was begun on an offer and takes longer than this is claimed: its decode worker must know
that it is being computed."""


@dataclass(slots=True, eq=False, kw_only=True)
class PrefillJob(Job):
    """A job with its claim and its run in the engine: the sink of the claim's stream and of the engine."""

    provider: "PrefillProvider"
    call: OutgoingCall | None = None
    """The claim's stream, once it is open."""
    claim_timer: asyncio.TimerHandle | None = None
    """For the claim of a prompt that was begun on an offer, and takes long."""
    engine_id: str = ""
    """Of the run in the engine; "" before it."""
    num_tokens: int = 0
    """Of the prompt, once it is known."""
    began_s: float = 0.0
    waited_ms: float = 0.0
    """As an offer."""
    acknowledged_s: float = 0.0
    """When the decode worker last took in blocks, or the first were computed."""
    num_delivered_bytes: int = 0
    """With the claim."""
    has_failed: bool = False
    """In the engine, before the claim was answered."""

    def take_up(self) -> None:
        """Begin on the offer that came with the ticket, or claim."""
        provider, offer, now_s = self.provider, self.ticket.offer, time.monotonic()
        if offer is None or not provider.queue.may_begin(self.ticket, now_s) or not self._is_within(offer.first_block, offer.tokens):
            self.claim()
            return
        self.waited_ms = (now_s - offer.came_s) * 1000
        provider.mesh.counters.add("prefills_begun_on_offer")
        self._begin(offer.tokens, self.ticket.attempt, offer.first_block)
        if self.call is None and self.state is not JobState.OVER:
            self.claim_timer = provider.loop.call_later(_CLAIM_AFTER_S, self.claim)

    def claim(self) -> None:
        """Ask the decode worker for the task, unless that was done."""
        if self.call is None and self.state is not JobState.OVER:
            self._open_claim(Claim(self.ticket.request_id))

    def _open_claim(self, claim: Claim) -> None:
        mesh = self.provider.mesh
        try:
            self.call = mesh.open(self.ticket.decode_peer, CLAIM, claim, self, _CLAIM_TIMEOUT_S)
        except PeerLost:
            self.end("decode worker lost")
            return
        mesh.counters.add("claims_sent")

    def claim_again(self) -> None:
        """Blocks were lost with their connection: claim an attempt that sends the blocks that the decode worker lacks."""
        call, self.call, self.is_granted = self.call, None, False
        self.window, self.acknowledged_s = None, 0.0
        self._open_claim(Claim(self.ticket.request_id, resumes=self.attempt))
        if call is not None:
            call.cancel()  # after the new claim, which says that this is not the end

    # --- the claim's answers

    def on_item(self, item: Any) -> None:
        """The claim was granted. What was begun on an offer goes on, if the granted task is that one."""
        provider = self.provider
        try:
            grant: Grant = read(CLAIM.item, item)
            if not self._is_within(grant.first_block, grant.tokens):
                raise ProtocolError("a task begins within its prompt")
        except ProtocolError:
            provider.mesh.counters.add("tasks_malformed")
            self.give_up("malformed task")
            return
        self.is_granted = True
        if self.has_failed:
            self.give_up("engine failed")
        elif not self.engine_id:
            self._begin(grant.tokens, grant.attempt, grant.first_block, grant.held)
        elif self._goes_on(grant):
            self.acknowledged_s = time.monotonic()
            provider.sender.line_up(self)
        else:
            provider.engine.cancel(self.engine_id)
            self.note("prefill_ended", outcome="granted otherwise")
            provider.queue.granted_otherwise(self, time.monotonic())
            self._begin(grant.tokens, grant.attempt, grant.first_block, grant.held)

    def on_end(self, value: Any) -> None:
        """The decode worker has all blocks."""
        self.provider.mesh.counters.add("prefills_delivered")
        if self.state is JobState.DELIVERED:
            self.note("ack", num_bytes=self.num_delivered_bytes)
        self.end("delivered")

    def on_error(self, error: MeshserveError) -> None:
        """The claim ended otherwise."""
        is_gone = isinstance(error, Gone) and not self.is_granted
        self.provider.mesh.counters.add("claims_answered_gone" if is_gone else "claims_lost")
        self.end(error.code)

    # --- computing

    def _begin(self, tokens: "array[int]", attempt: int, first_block: int, held: HeldPart | None = None) -> None:
        provider, layout, self.num_tokens = self.provider, self.provider.engine.kv_layout, len(tokens)
        self.began_s = time.monotonic()
        num_tokens = self.num_tokens - first_block * layout.block_size
        if not provider.queue.granted(self, attempt, num_tokens, self.began_s):
            return
        transport = provider.mesh.config.transport
        bounds = transport.bulk_window_bytes, transport.bulk_message_bytes, MAX_PAYLOADS, MAX_PAYLOAD_BYTES
        self.window = BlockWindow(*bounds, provider.links.setdefault(self.ticket.decode_peer, Link()), held)
        self.layout = layout.fingerprint
        self.prefix_hashes = prefix_hashes(tokens, layout.block_size, provider.engine.card.model_hash)
        self.engine_id = f"{self.ticket.decode_peer}/{self.ticket.request_id}@{attempt}"
        self.note("prefill_begun", num_tokens=num_tokens)
        try:
            provider.engine.prefill(self.engine_id, tokens, first_block, self)
        except MeshserveError as error:
            self.on_prefill_failed(error)

    def _goes_on(self, grant: Grant) -> bool:
        """Whether the task that was begun on an offer is the granted one."""
        if grant.attempt != self.attempt or self.ticket.offer is None:
            return False
        # delivered blocks that were answered with a grant were not what the decode worker lacks
        is_here = self.state is not JobState.DELIVERED
        return is_here and grant.first_block >= self.ticket.offer.first_block

    def _is_within(self, first_block: int, tokens: "array[int]") -> bool:
        return 0 <= first_block * self.provider.engine.kv_layout.block_size < len(tokens)

    def on_blocks(self, blocks: list[KVBlock]) -> None:
        """Blocks leave while the engine computes the next step; those of an offer once the claim is granted."""
        now_s = time.monotonic()
        self.acknowledged_s = self.acknowledged_s or now_s
        self.computed_ms = (now_s - self.began_s) * 1000
        self.provider.queue.computed(self, sum([num_tokens for _, num_tokens, _ in blocks]), now_s)
        if self.window is not None:
            self.window.add(blocks)
            if self.is_granted:
                self.provider.sender.line_up(self)
        self.provider.pump()

    def on_prefilled(self, num_cached_tokens: int) -> None:
        """The engine has room again; the blocks may still be on their way."""
        provider = self.provider
        provider.mesh.counters.add("prefill_tokens", self.num_tokens)
        provider.mesh.counters.add("prefill_tokens_cached", num_cached_tokens)
        provider.queue.all_computed(self, num_cached_tokens, time.monotonic())
        if self.call is None and self._can_deliver():
            self._deliver()
        else:
            self.claim()
        provider.pump()

    def on_prefill_failed(self, error: MeshserveError) -> None:
        """This engine failed, but another worker may succeed."""
        self.provider.mesh.counters.add("prefills_failed")
        if self.is_granted:
            self.give_up("engine failed")
        else:  # begun on an offer: the decode worker learns of it by a claim that is given up once it is granted
            self.has_failed = True
            self.claim()

    def _can_deliver(self) -> bool:
        """Whether the blocks are few enough for the connection of the calls, and not subject to a rate limit."""
        if self.window is None or self.provider.mesh.config.transport.bulk_bytes_per_s > 0:
            return False
        return self.window.num_ready <= MAX_PAYLOADS and self.window.ready_bytes <= self.provider.config.offer_kv_bytes

    def _deliver(self) -> None:
        """The whole prompt was computed on the offer before its claim left: the claim brings the blocks."""
        provider, window = self.provider, self.window
        assert window is not None, "it can be delivered"
        self.num_delivered_bytes = window.ready_bytes
        marks, payloads = window.take_all()
        provider.queue.delivered(self)
        claim = Claim(self.ticket.request_id, provider.sender.header(self, marks), payloads, self.waited_ms)
        provider.sender.count(self, marks, self.num_delivered_bytes)
        self._open_claim(claim)
        if len(provider.queue.jobs) == 1:
            provider.mesh.turn.hurry()

    # --- its way out, and its end

    def acknowledged(self, num_bytes: int) -> None:
        """The decode worker has taken in so many bytes."""
        before_s, self.acknowledged_s = self.acknowledged_s, time.monotonic()
        self.note("ack", num_bytes=num_bytes)
        if self.window is not None:
            self.window.acknowledged(num_bytes, self.acknowledged_s - before_s)
            self.provider.sender.line_up(self)

    def overdue_s(self) -> float | None:
        """How long the next sign of progress is overdue; None if the job was given up for that."""
        if self.state is JobState.COMPUTING:
            return self.provider.engine.overdue_s(self.engine_id)
        if self.is_in_line:  # the job waits for its turn within the rate limit
            return 0.0
        progressed_s = self.acknowledged_s
        if self.window is not None and self.window.is_waiting:
            # on a slow link the blocks of other jobs may be sent before these
            progressed_s = max(progressed_s, self.window.link.progressed_s)
        if time.monotonic() - progressed_s <= self.provider.config.progress_timeout_s:
            return 0.0
        self.give_up("blocks not acknowledged")
        return None

    def note(self, event: str, **details: Any) -> None:
        """One event of this job."""
        log = self.provider.mesh.event_log
        if log.is_on and self.engine_id:
            log.note(event, self.ticket.request_id, decode=self.ticket.decode_peer, attempt=self.attempt, **details)

    def give_up(self, outcome: str) -> None:
        """End the claim, which tells the decode worker."""
        if self.call is not None:
            self.call.cancel()
        self.end(outcome)

    def end(self, outcome: str) -> None:
        """Delivered, gone, revoked or lost: free what the job holds. Harmless when the job is over."""
        provider = self.provider
        stood = provider.queue.ended(self, time.monotonic())
        if stood is JobState.OVER:
            return
        if self.claim_timer is not None:
            self.claim_timer.cancel()
        self.note("prefill_ended", outcome=outcome)
        if stood is JobState.COMPUTING:
            provider.engine.cancel(self.engine_id)
        provider.changed()
        provider.pump()


class PrefillProvider:
    """Pulls tickets, and claims prompts as the engine comes free; each job computes one and sends its blocks.

    :class:`~meshserve.handoff.queue.PrefillQueue` decides; this class does the I/O.
    """

    def __init__(self, mesh: Mesh, engine: Engine, config: HandoffConfig) -> None:
        self.mesh, self.engine, self.config = mesh, engine, config
        self.loop = asyncio.get_running_loop()
        self.queue = PrefillQueue(config, partial(PrefillJob, provider=self))
        self._bulk = BulkSender(mesh, self._on_acknowledgement, self._on_bulk_lost)
        self.sender = BlockSender(mesh, self._bulk)
        self.links: dict[str, Link] = {}
        """Links to the decode workers for which blocks were computed."""
        self._is_closing = False
        self._timer: asyncio.TimerHandle | None = None
        self._listeners: list[Callable[[str], None]] = []
        mesh.gauges.derive("tickets", lambda: self.queue.num_waiting)
        mesh.gauges.derive("attempts", lambda: len(self.queue.jobs))
        mesh.serve(STRIKE, self._on_strike)
        mesh.subscribe(self._on_change)
        mesh.tasks.spawn(self._renew_forever())
        self._tickets = receive_tickets(mesh, self._on_ticket)

    def subscribe(self, listener: Callable[[str], None]) -> None:
        """Call `listener` when prompts come or go: with the request that `queue.num_queued` counts from
        now on, else with ""."""
        self._listeners.append(listener)

    def changed(self, request_id: str = "") -> None:
        """A prompt came, or some went."""
        for listener in self._listeners:
            listener(request_id)

    @property
    def is_idle(self) -> bool:
        """Nothing claimed is unfinished."""
        return not self.queue.jobs

    def _on_ticket(self, data: Any) -> None:
        counters = self.mesh.counters
        try:
            ticket = Ticket.from_wire(data)
        except ProtocolError:
            counters.add("tickets_malformed")
            return
        if self.mesh.member(ticket.decode_peer) is None or not self.queue.ticket(ticket, time.monotonic()):
            counters.add("tickets_refused")
            return
        counters.add("tickets_received")
        self.changed(ticket.request_id)
        self.pump()

    def _on_strike(self, call: IncomingCall) -> None:
        key: JobKey = (call.peer, call.body)
        job = self.queue.jobs.get(key)
        if self.queue.strike(key):
            self.mesh.counters.add("tickets_struck")
            self.changed()
            if self.mesh.event_log.is_on:
                self.mesh.event_log.note("struck", key[1], decode=key[0])
        elif job is not None and job.call is None:
            job.end("struck")
        call.end()

    def pump(self) -> None:
        """Claim as long as the engine has room."""
        if not self.queue.num_waiting:
            return
        while not self._is_closing and (job := self.queue.next_claim(time.monotonic())) is not None:
            job.take_up()
        if self._timer is None and (wait_s := self.queue.claim_in_s(time.monotonic())) is not None:
            self._timer = self.loop.call_later(wait_s, self._pump_later)

    def _pump_later(self) -> None:
        self._timer = None
        self.pump()

    def _on_acknowledgement(self, decode_peer: str, answer: Any) -> None:
        try:
            done = Acknowledgement.from_wire(answer)
        except ProtocolError:
            self.mesh.counters.add("bulk_malformed")
            return
        if (link := self.links.get(decode_peer)) is not None:
            link.progressed_s = time.monotonic()
        job = self.queue.jobs.get((decode_peer, done.request_id))
        if job is not None and job.is_granted and job.is_running(done.attempt):
            job.acknowledged(done.num_bytes)

    def _on_bulk_lost(self, decode_peer: str, reason: str) -> None:
        """Unacknowledged blocks may be lost with the connection: their jobs ask the decode worker which blocks it has."""
        for job in list(self.queue.jobs.values()):
            is_on_its_way = job.is_granted and job.window is not None and job.window.is_waiting
            if is_on_its_way and job.ticket.decode_peer == decode_peer:
                job.claim_again()

    def _on_change(self, change: Change, member: Member) -> None:
        if change in (Change.DIED, Change.LEFT):
            self.queue.peer_gone(member.info.incarnation)
            self.links.pop(member.info.incarnation, None)

    async def _renew_forever(self) -> None:
        """Name the running attempts, with how long their progress is overdue: the decode worker tries
        elsewhere what a hung engine runs."""
        while True:
            await asyncio.sleep(self.mesh.config.heartbeat_interval_s)
            self.pump()  # claims that are not answered no longer keep others waiting
            named: dict[str, list[NamedAttempt]] = {}
            for job in list(self.queue.jobs.values()):
                is_running = job.is_granted and job.is_running(job.attempt)
                if is_running and (overdue_s := job.overdue_s()) is not None:
                    attempt = NamedAttempt(job.ticket.request_id, job.attempt, overdue_s)
                    named.setdefault(job.ticket.decode_peer, []).append(attempt)
            for decode_peer, attempts in named.items():
                if decode_peer in self.mesh.links.channels:
                    renewal = Renewal(attempts[:MAX_RENEWED])
                    self.mesh.open(decode_peer, RENEW, renewal, IgnoredAnswer(), _RENEW_TIMEOUT_S)

    def close(self) -> None:
        """Give up all jobs; their decode workers try elsewhere."""
        self._is_closing = True
        for job in list(self.queue.jobs.values()):
            job.give_up("stopped")
        if self._timer is not None:
            self._timer.cancel()
        self.sender.stop()
        self._bulk.close()
        self._tickets.close()

    def stop_claiming(self) -> None:
        """Draining: finish the claimed prompts, leave waiting tickets to other workers."""
        self._is_closing = True
