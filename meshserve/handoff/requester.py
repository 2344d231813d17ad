"""The decode worker's side of the handoff: tickets out, claims in, blocks in.

:class:`~meshserve.handoff.task.PrefillTask` decides; this module does the I/O.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from meshserve.config import HandoffConfig
from meshserve.engines.protocol import Engine, Frame, KVPayload, Reservation, size_of
from meshserve.errors import BlockRefused, Gone, MeshserveError, PoolFull
from meshserve.handoff.blocks import began_s
from meshserve.handoff.choice import HandoffChoice
from meshserve.handoff.intake import HandoffResult, RunningTask, held_of, missing_blocks
from meshserve.handoff.task import LINK_BROKE, Action, Finish, Lose, PrefillTask, Push, Revoke, Strike, TaskState
from meshserve.mesh.calls import CONNECTION_CLOSED, PEER_DIED, PEER_LEFT, IgnoredAnswer, IncomingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.transport.bulk import BulkReceiver
from meshserve.mesh.transport.tickets import TicketSender
from meshserve.wire.generation import GenerateRequest
from meshserve.wire.handoff import Acknowledgement, BulkHeader, Claim, Grant, Offer, Renewal, Ticket
from meshserve.wire.messages import CLAIM, RENEW, STRIKE

_Answer = Callable[[Acknowledgement], None]

_TICK_S = 0.01
_STRIKE_TIMEOUT_S = 5.0
_MAX_OFFERED_TOKENS = 2048
"""In one offer: tickets are small notes."""
_ROUNDS = 2
"""Prompts are offered while so many times the slots of a worker are outstanding: short prompts wait for one
round at most."""
_ANSWER_S = 0.004
"""Until a claim that brought its blocks is answered. Nothing waits for the answer, and one message holds many:
a message for each prompt woke two threads on both sides."""
_STALL_S = 0.1
"""A tick that is later than this says that this process stood still, and could not hear other peers."""


class PrefillRequester:
    """Has prompts prefilled by other peers. Every `start` ends in exactly one call of its `on_done`, unless it is cancelled."""

    def __init__(self, mesh: Mesh, engine: Engine, config: HandoffConfig) -> None:
        self._mesh, self._engine, self._config = mesh, engine, config
        self._tickets = TicketSender(mesh)
        self._loop = asyncio.get_running_loop()
        self.running: dict[str, RunningTask] = {}
        self.choice = HandoffChoice(mesh, engine, config, self.running)
        self._timer: asyncio.TimerHandle | None = None
        self._ticked_s = 0.0
        self._num_offers = 0
        self._complete_claims: list[IncomingCall] = []
        """Claims that brought all blocks, and are answered together."""
        self._answer_timer: asyncio.TimerHandle | None = None
        mesh.gauges.derive("handoffs", lambda: len(self.running))
        mesh.serve(CLAIM, self._on_claim)
        mesh.serve(RENEW, self._on_renew)
        mesh.subscribe(self._on_change)
        self._bulk = BulkReceiver(mesh, self._on_bulk)

    def start(
        self,
        request: GenerateRequest,
        candidates: list[str],
        deadline_s: float,
        on_done: Callable[[HandoffResult], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Put out tickets for this prompt. `on_lost` gets the name of each prefill worker that dies with it."""
        now_s = time.monotonic()
        lease_s = self._mesh.config.failure_timeout_s
        task = PrefillTask(request.request_id, self._config, lease_s, now_s, deadline_s, num_lost_before=len(request.lost_peers))
        num_preferred = self.choice.num_preferred(candidates, request)
        running = self.running[request.request_id] = RunningTask(task, request, on_done, on_lost)
        running.offered_block = self._offered_block(request) if num_preferred == 1 else None
        self._carry_out(running, task.start(candidates, now_s, num_preferred, running.offered_block is not None))
        if self._timer is None and self.running:
            self._ticked_s = now_s
            self._timer = self._loop.call_later(_TICK_S, self._tick)

    def _offered_block(self, request: GenerateRequest) -> int | None:
        """Of a prompt that may go with its ticket, the first block that is missing here; else None."""
        # with many prompts outstanding, the offer is too old before the prefill worker can begin
        num_tokens, layout = len(request.tokens) - 1, self._engine.kv_layout
        if num_tokens > _MAX_OFFERED_TOKENS or len(self.running) >= _ROUNDS * self._config.prefill_slots:
            return None
        num_cached = self._engine.num_cached_tokens(request)
        is_short = 0 < (num_tokens - num_cached) * layout.bytes_per_token <= self._config.offer_kv_bytes
        return num_cached // layout.block_size if is_short else None

    def engine_failed(self) -> None:
        """The reserved blocks are gone: their prompts end as the engine's own requests do."""
        for running in list(self.running.values()):
            if running.reservation is not None:
                self._carry_out(running, running.task.fall_back(time.monotonic(), "the decode engine failed"))

    def cancel(self, request_id: str) -> None:
        """The request was cancelled: strike tickets, revoke a running attempt, release the blocks."""
        running = self.running.get(request_id)
        if running is not None:
            self._carry_out(running, running.task.cancel(time.monotonic()))

    # --- carrying out

    def _carry_out(self, running: RunningTask, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Push):
                self._push(running, action)
            elif isinstance(action, Revoke):
                self._revoke(running, action)
            elif isinstance(action, Lose):
                running.on_lost(running.names[action.peer])
            elif isinstance(action, Strike):
                self._strike(running, action)
            else:
                self._finish(running, action)

    def _push(self, running: RunningTask, push: Push) -> None:
        request, offer = running.request, None
        if push.is_offer:
            assert running.offered_block is not None, "only a prompt that may be offered is"
            self._num_offers += 1
            offer = Offer(self._num_offers, running.offered_block, request.tokens[:-1])
            self._mesh.counters.add("prefills_offered")
            running.names[push.peers[0]] = self._mesh.name_of(push.peers[0])
        ticket = Ticket(self._mesh.incarnation, request.request_id, push.attempt, len(request.tokens), offer)
        self._mesh.counters.add("tickets_pushed", len(push.peers))
        self._note(running, "ticket", attempt=push.attempt, peers=list(push.peers))
        for peer in push.peers:
            self._tickets.push_soon(peer, ticket, partial(self._not_sent, running, peer, push.is_offer))

    def _not_sent(self, running: RunningTask, peer: str, is_offer: bool) -> None:
        self._mesh.counters.add("tickets_not_sent")
        self._carry_out(running, running.task.push_failed(peer, time.monotonic(), is_offer))

    def _note(self, running: RunningTask, event: str, **details: Any) -> None:
        if self._mesh.event_log.follows(running.task.request_id):
            self._mesh.event_log.note(event, running.task.request_id, **details)

    def _revoke(self, running: RunningTask, revoke: Revoke) -> None:
        self._mesh.counters.add("prefill_attempts_revoked")
        outcome = running.task.attempts[-1].outcome
        if outcome != "cancelled":
            self._mesh.counters.add("prefill_attempts_failed")
        self._note(running, "attempt_failed", attempt=revoke.attempt, peer_failing=revoke.peer, outcome=outcome)
        self._end_claim(running, "this attempt is over")

    def _end_claim(self, running: RunningTask, reason: str) -> None:
        """Tell the prefill worker that its attempt is done (no `reason`), or over for this reason."""
        claim, running.claim = running.claim, None
        if claim is None:
            return
        claim.on_cancel = None
        if reason:
            claim.fail(Gone(reason))
        elif not running.has_delivered:
            claim.end()
        else:
            self._complete_claims.append(claim)
            if self._answer_timer is None:
                self._answer_timer = self._loop.call_later(_ANSWER_S, self._answer_all)

    def _answer_all(self) -> None:
        self._answer_timer = None
        claims, self._complete_claims = self._complete_claims, []
        for claim in claims:
            claim.end()

    def _strike(self, running: RunningTask, strike: Strike) -> None:
        for peer in strike.peers:
            if self._mesh.member(peer) is not None and peer in self._mesh.links.channels:
                self._mesh.open(peer, STRIKE, running.task.request_id, IgnoredAnswer(), _STRIKE_TIMEOUT_S)

    def _finish(self, running: RunningTask, finish: Finish) -> None:
        del self.running[running.task.request_id]
        self._mesh.counters.add(f"prefill_tasks_{finish.state}")
        self._mesh.counters.add("tickets_hedged", running.task.num_hedges)
        self._note(running, "handoff_ended", attempt=running.task.attempt, state=finish.state.value)
        self._end_claim(running, "" if finish.state is TaskState.DONE else "the task is over")
        # the sequence gets the blocks of a task that is done; other blocks go back to the pool, where whole ones are prefix hits
        if finish.state is not TaskState.DONE and running.reservation is not None:
            running.reservation.release()
        if finish.state is not TaskState.CANCELLED:
            running.on_done(self._result(running, finish.state))

    def _result(self, running: RunningTask, state: TaskState) -> HandoffResult:
        task, names, reservation, took_ms = running.task, running.names, None, 0.0
        if state is TaskState.DONE:
            reservation, took_ms = running.reservation, task.attempts[-1].took_s * 1000
        result = HandoffResult(
            state=state,
            reservation=reservation,
            prefill_peer=task.peer if reservation is not None else None,
            attempts=[attempt.to_wire(names.__getitem__) for attempt in task.attempts],
            lost_peers=[names[peer] for peer in task.lost_peers],
            num_blocks=sum(attempt.num_blocks for attempt in task.attempts),
            num_bytes=sum(attempt.num_bytes for attempt in task.attempts),
            num_tokens=self._num_handed_over(running),
            prefill_ms=min(running.computed_ms, took_ms),
            transfer_ms=max(0.0, took_ms - running.computed_ms),
        )
        if state is TaskState.DONE:
            self.choice.rates.handed_over(result.num_tokens, result.transfer_ms / 1000)
            histograms = self._mesh.histograms.named
            histograms["prefill_wait"].observe(task.attempts[-1].claimed_s - task.created_s)
            histograms["prefill_compute"].observe(result.prefill_ms / 1000)
            histograms["kv_transfer"].observe(result.transfer_ms / 1000)
        return result

    def _num_handed_over(self, running: RunningTask) -> int:
        reservation = running.reservation
        if reservation is None:
            return 0
        is_whole = running.task.state is TaskState.DONE
        num_here = reservation.num_tokens if is_whole else self._engine.num_cached_tokens(running.request)
        return max(0, num_here - reservation.num_cached_tokens)

    # --- claims and blocks in

    def _on_claim(self, call: IncomingCall) -> None:
        claim: Claim = call.body
        now_s = time.monotonic()
        running = self.running.get(claim.request_id)
        if running is not None and claim.resumes:
            self._carry_out(running, running.task.resume(call.peer, claim.resumes, now_s))
        if running is None or not running.task.claim(call.peer, now_s, began_s(claim, running.task.queued_s, now_s)):
            self._mesh.counters.add("claims_gone")
            raise Gone("claimed by another, or over")
        self._mesh.counters.add("claims_granted")
        attempt, running.claim = running.task.attempt, call
        running.names[call.peer] = self._mesh.name_of(call.peer)
        self._note(running, "claim", attempt=attempt, peer_claiming=call.peer)
        reservation = running.reservation if running.reservation is not None else self._reserve(running)
        if reservation is None:
            return
        # from here on the end of the claim's stream ends the attempt
        call.on_cancel = lambda: self._claim_ended(running, call, attempt)
        if claim.header is not None and reservation.missing():
            self._take_brought(running, call.peer, claim.header, claim.payloads)
        self._complete_if_all_came(running)
        # what a refused or stale message did not bring is granted, unless the refusal has ended the attempt
        missing = reservation.missing()
        if missing and running.task.is_current(call.peer, attempt):
            held = held_of(running, call.peer, missing[0])
            call.send(Grant(running.request.tokens[:-1], attempt, missing[0], held))

    def _take_brought(self, running: RunningTask, peer: str, header: BulkHeader, payloads: Sequence[bytes]) -> None:
        """Take the blocks of a claim that was granted; those of another attempt are dropped, and only they."""
        if (header.decode_peer, header.prefill_peer, header.attempt) != (self._mesh.incarnation, peer, running.task.attempt):
            self._mesh.counters.add("kv_blocks_stale", header.num_blocks)
            return
        running.has_delivered = True
        self._take(running, header, payloads, lambda acknowledgement: None)

    def _reserve(self, running: RunningTask) -> Reservation | None:
        """All blocks or none. Without room the prompt waits in the engine's own queue, and is prefilled here."""
        try:
            running.reservation = self._engine.reserve(running.request)
        except MeshserveError as error:
            self._mesh.counters.add("reservations_refused" if isinstance(error, PoolFull) else "reservations_failed")
            self._carry_out(running, running.task.fall_back(time.monotonic()))
        return running.reservation

    def _claim_ended(self, running: RunningTask, call: IncomingCall, attempt: int) -> None:
        """The worker gave up, died, or its link broke: `ended_by` tells which."""
        is_lost = call.ended_by in (CONNECTION_CLOSED, PEER_DIED)
        gave_up = call.ended_by in ("cancel", PEER_LEFT)
        reason = "peer died" if is_lost else "the worker gave up" if gave_up else LINK_BROKE
        self._attempt_failed(running, call.peer, attempt, reason, is_peer_dead=is_lost)

    def _on_renew(self, call: IncomingCall) -> None:
        renewal: Renewal = call.body
        now_s = time.monotonic()
        for named in renewal.attempts:
            if (running := self.running.get(named.request_id)) is not None:
                running.task.renew(call.peer, named.attempt, now_s - named.overdue_s)
        call.end()

    def _on_bulk(self, data: Any, payloads: list[memoryview], answer: _Answer) -> None:
        header = BulkHeader.from_wire(data)
        running = self.running.get(header.request_id)
        if (
            running is None
            or header.decode_peer != self._mesh.incarnation
            or not running.task.is_current(header.prefill_peer, header.attempt)
        ):
            num_bytes = sum(map(len, payloads))
            self._mesh.counters.add("kv_blocks_stale", header.num_blocks)
            if running is not None:
                running.task.came_late(header.prefill_peer, header.attempt, header.num_ended, num_bytes)
            # refused, but not unread: blocks that wait behind these on a slow link must not count as stuck
            answer(Acknowledgement(header.request_id, header.attempt, num_bytes))
        else:
            self._take(running, header, payloads, answer)

    def _take(self, running: RunningTask, header: BulkHeader, payloads: Sequence[Frame], answer: _Answer) -> None:
        """Give blocks of the running attempt to the engine; acknowledge the message once the engine has those that end in
        it. A wrong block fails the attempt."""
        size_bytes, layout = sum(map(len, payloads)), self._engine.kv_layout
        running.task.received(header.num_ended, size_bytes)  # counted now: the attempt may be over when the engine has them
        try:
            blocks = missing_blocks(running, header, payloads, layout, self._engine.card.model_hash)
            running.task.renew(header.prefill_peer, header.attempt, time.monotonic())
            running.computed_ms = header.computed_ms
            if len(blocks) < header.num_ended:
                self._mesh.counters.add("kv_blocks_double", header.num_ended - len(blocks))
            acknowledge = partial(answer, Acknowledgement(header.request_id, header.attempt, size_bytes))
            if blocks:
                assert running.reservation is not None, "its blocks are missing"
                running.reservation.write(blocks, partial(self._written, running, header, blocks, acknowledge))
            else:
                acknowledge()
        except BlockRefused as error:
            self._refuse(running, header, error, header.num_blocks)

    def _written(
        self,
        running: RunningTask,
        header: BulkHeader,
        blocks: list[tuple[int, KVPayload]],
        acknowledge: Callable[[], None],
        error: MeshserveError | None,
    ) -> None:
        """The engine has written the blocks, or refused them; the attempt may be over by now."""
        if self.running.get(header.request_id) is not running:
            return  # the task has ended
        if error is not None:
            # the engine stops at the first wrong block: one was refused, the others of the message were not kept
            self._refuse(running, header, error, 1)
            return
        self._mesh.counters.add("kv_blocks_received", len(blocks))
        self._mesh.counters.add("kv_bytes_received", sum([size_of(payload) for _, payload in blocks]))
        if self._mesh.event_log.follows(header.request_id):
            for index, _ in blocks:
                self._note(running, "block", attempt=header.attempt, peer_sending=header.prefill_peer, index=index)
        acknowledge()
        self._complete_if_all_came(running)

    def _refuse(self, running: RunningTask, header: BulkHeader, error: MeshserveError, num_blocks: int) -> None:
        self._mesh.counters.add("kv_blocks_refused", num_blocks)
        if isinstance(error, BlockRefused) and error.is_checksum:
            self._mesh.counters.add("kv_checksum_failures")
        self._attempt_failed(running, header.prefill_peer, header.attempt, f"block refused: {error.message}")

    def _complete_if_all_came(self, running: RunningTask) -> None:
        if running.reservation is not None and running.reservation.is_complete:
            self._carry_out(running, running.task.complete(time.monotonic()))

    def _attempt_failed(self, running: RunningTask, peer: str, attempt: int, reason: str, is_peer_dead: bool = False) -> None:
        """An attempt failed, unless it was over already; the task tries elsewhere, or the prompt is computed here."""
        now_s = time.monotonic()
        self._carry_out(running, running.task.attempt_failed(peer, attempt, reason, now_s, is_peer_dead=is_peer_dead))

    def _on_change(self, change: Change, member: Member) -> None:
        if "prefill" not in member.info.roles:
            return
        if change is Change.CALLABLE:
            self.choice.say_if_unlike(member.info)
        peer, now_s = member.info.incarnation, time.monotonic()
        for running in list(self.running.values()):
            task = running.task
            if change in (Change.DIED, Change.LEFT, Change.SUSPECTED):
                # a connection that closed counts as a death where the peer may have begun on an offer, as it does for a claim
                is_cut = change is Change.SUSPECTED and peer not in self._mesh.links.channels
                is_dead = change is Change.DIED or (is_cut and task.is_offered_to(peer))
                self._carry_out(running, task.peer_gone(peer, now_s, is_dead=is_dead))
            elif change is Change.UPDATED and (member.info.is_draining or not member.info.can_play("prefill")):
                self._carry_out(running, task.peer_draining(peer, now_s))
            elif change in (Change.CALLABLE, Change.RECOVERED) and self._engine.kv_layout.accepts(member.info.layout):
                task.peer_joined(peer, now_s)

    def _tick(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        stall_s = now_s - self._ticked_s - _TICK_S
        self._ticked_s = now_s
        for running in list(self.running.values()):
            if stall_s > _STALL_S:  # renewals wait unread in the sockets: leases must not run out by our own delay
                running.task.stalled(stall_s)
            self._carry_out(running, running.task.tick(now_s))
        if self.running:
            self._timer = self._loop.call_later(_TICK_S, self._tick)

    def close(self) -> None:
        """Cancel everything."""
        for request_id in list(self.running):
            self.cancel(request_id)
        for timer in (self._timer, self._answer_timer):
            if timer is not None:
                timer.cancel()
        self._answer_all()
        self._tickets.close()
        self._bulk.close()
