"""The decode worker's side of the handoff: tickets out, claims in, blocks in.

Deciding is :class:`~meshserve.handoff.task.PrefillTask`'s; this carries it out on the mesh and the engine.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from meshserve.config import HandoffConfig
from meshserve.engines.protocol import Engine
from meshserve.errors import Gone, MeshserveError, PoolFull
from meshserve.handoff.blocks import began_s
from meshserve.handoff.intake import BlockIntake, RunningTask
from meshserve.handoff.offering import LateAnswers, Offers
from meshserve.handoff.rates import HandoffRates
from meshserve.handoff.result import HandoffResult
from meshserve.handoff.task import Action, Finish, Lose, PrefillTask, Push, Revoke, Strike, TaskState
from meshserve.mesh.calls import CONNECTION_CLOSED, PEER_DIED, IgnoredAnswer, IncomingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.transport.bulk import BulkReceiver
from meshserve.mesh.transport.tickets import TicketSender
from meshserve.wire.generation import GenerateRequest
from meshserve.wire.handoff import Acknowledgement, BulkHeader, Claim, Grant, Renewal, Ticket
from meshserve.wire.hello import PeerInfo
from meshserve.wire.messages import CLAIM, RENEW, STRIKE

_log = logging.getLogger(__name__)

_TICK_S = 0.01
_STRIKE_TIMEOUT_S = 5.0
_STALL_S = 0.1
"""A tick that comes later than this says that this process stood still, and could not hear what others said meanwhile."""


class PrefillRequester:
    """Has prompts prefilled by other peers. Every `start` ends in exactly one call of its `on_done`, unless it is cancelled."""

    def __init__(self, mesh: Mesh, engine: Engine, config: HandoffConfig) -> None:
        self._mesh, self._engine, self._config = mesh, engine, config
        self._tickets = TicketSender(mesh)
        self._loop = asyncio.get_running_loop()
        self.rates = HandoffRates()
        self._running: dict[str, RunningTask] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._ticked_s = 0.0
        self._offers, self._answers = Offers(engine, config), LateAnswers()
        self._intake = BlockIntake(mesh, engine, self)
        mesh.gauges.derive("handoffs", lambda: len(self._running))
        mesh.serve(CLAIM, self._on_claim)
        mesh.serve(RENEW, self._on_renew)
        mesh.subscribe(self._on_change)
        self._bulk = BulkReceiver(mesh, self._on_bulk)

    @property
    def num_outstanding(self) -> int:
        """Tasks that are queued or running elsewhere."""
        return len(self._running)

    def candidates(self, request: GenerateRequest) -> list[str]:
        """Prefill peers that could take this prompt, best first: as the router ranked them, then others. Empty: prefill locally."""
        own, layout = self._mesh.incarnation, self._engine.kv_layout
        able = [info.incarnation for info in self._mesh.peers_with("prefill") if layout.accepts(info.layout) and info.incarnation != own]
        ranked = [peer for peer, _, _ in request.prefill_peers if peer in able]
        return ranked + [peer for peer in able if peer not in ranked]

    def is_queue_full(self, peer: str, request: GenerateRequest) -> bool:
        """Whether so many prompts wait at a prefill peer that a decode worker prefills itself."""
        return self._num_queued(peer, request) >= self._config.max_prefill_queue

    def expected_ms(self, request: GenerateRequest) -> float:
        """Until the best prefill peer that the router named has computed this prompt's KV; 0 if nobody knows."""
        peers, own = request.prefill_peers, self._mesh.incarnation
        for rank, expected_ms in enumerate(request.prefill_ms):
            if peers[rank][0] != own:
                return expected_ms
        return 0.0

    def _num_queued(self, peer: str, request: GenerateRequest) -> int:
        """Prompts ahead of this one, as far as is known here: what the router heard of that peer, and what this one has out itself."""
        return sum(queued for ranked, queued, _ in request.prefill_peers if ranked == peer) + self.num_outstanding

    def _num_preferred(self, candidates: list[str], request: GenerateRequest) -> int:
        """How many are asked at first: the best if a router knows it to be idle; else all that have as much of the prompt.

        The first one free gets it then. (Asking one that was busy after all cost the hedge time in one of ten prompts at 80 % load.)
        """
        overlaps = {peer: overlap_blocks for peer, _, overlap_blocks in request.prefill_peers}
        best = candidates[0]
        if best in overlaps and not self._num_queued(best, request):
            return 1
        have = overlaps.get(best, 0)
        return next((rank for rank, peer in enumerate(candidates) if overlaps.get(peer, 0) != have), len(candidates))

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
        num_preferred = self._num_preferred(candidates, request)
        running = self._running[request.request_id] = RunningTask(task, request, on_done, on_lost)
        running.offered_block = self._offers.first_block(request, len(self._running)) if num_preferred == 1 else None
        self._carry_out(running, task.start(candidates, now_s, num_preferred, running.offered_block is not None))
        if self._timer is None and self._running:
            self._ticked_s = now_s
            self._timer = self._loop.call_later(_TICK_S, self._tick)

    def engine_failed(self) -> None:
        """The blocks that were reserved are gone: these prompts wait for no more, and end as the engine's own requests do."""
        for running in list(self._running.values()):
            if running.reservation is not None:
                self._carry_out(running, running.task.fall_back(time.monotonic(), "the decode engine failed"))

    def cancel(self, request_id: str) -> None:
        """Nobody wants this any more: tickets are struck, a running attempt is revoked, blocks are given back."""
        running = self._running.get(request_id)
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
        request, offer = running.request, self._offers.make(running.request, running.offered_block) if push.is_offer else None
        ticket = Ticket(self._mesh.incarnation, request.request_id, push.attempt, len(request.tokens), offer)
        if offer is not None:
            self._mesh.counters.add("prefills_offered")
            running.names[push.peers[0]] = self._mesh.name_of(push.peers[0])
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
        claim, running.claim = running.claim, None
        if claim is not None:
            claim.on_cancel = None
            claim.fail(Gone("this attempt is over"))

    def _strike(self, running: RunningTask, strike: Strike) -> None:
        for peer in strike.peers:
            if self._mesh.member(peer) is not None and peer in self._mesh.links.channels:
                self._mesh.open(peer, STRIKE, running.task.request_id, IgnoredAnswer(), _STRIKE_TIMEOUT_S)

    def _finish(self, running: RunningTask, finish: Finish) -> None:
        del self._running[running.task.request_id]
        self._mesh.counters.add(f"prefill_tasks_{finish.state}")
        self._mesh.counters.add("tickets_hedged", running.task.num_hedges)
        self._note(running, "handoff_ended", attempt=running.task.attempt, state=finish.state.value)
        self._revoke_quietly(running, finish.state)
        if finish.state is not TaskState.DONE and running.reservation is not None:
            running.reservation.release()
        if finish.state is not TaskState.CANCELLED:
            running.on_done(self._result(running, finish.state))

    def _revoke_quietly(self, running: RunningTask, state: TaskState) -> None:
        claim, running.claim = running.claim, None
        if claim is not None:
            claim.on_cancel = None
            if state is TaskState.DONE and running.has_delivered:
                self._answers.end_soon(claim)
            elif state is TaskState.DONE:
                claim.end()
            else:
                claim.fail(Gone("the task is over"))

    def _result(self, running: RunningTask, state: TaskState) -> HandoffResult:
        task = running.task
        is_done = state is TaskState.DONE
        last = task.attempts[-1] if is_done else None
        took_ms = last.took_s * 1000 if last else 0.0
        result = HandoffResult(
            state=state,
            reservation=running.reservation if is_done else None,
            prefill_peer=task.peer if is_done else None,
            attempts=[attempt.to_wire(lambda peer: running.names[peer]) for attempt in task.attempts],
            lost_peers=[running.names[peer] for peer in task.lost_peers],
            num_blocks=sum(attempt.num_blocks for attempt in task.attempts),
            num_bytes=sum(attempt.num_bytes for attempt in task.attempts),
            num_tokens=running.reservation.num_tokens - running.reservation.num_cached_tokens if is_done and running.reservation else 0,
            queue_ms=((last.claimed_s if last else time.monotonic()) - task.created_s) * 1000,
            prefill_ms=min(running.computed_ms, took_ms),
            transfer_ms=max(0.0, took_ms - running.computed_ms),
        )
        self._observe(result)
        return result

    def _observe(self, result: HandoffResult) -> None:
        histograms = self._mesh.histograms.named
        if result.state is TaskState.DONE:
            self.rates.handed_over(result.num_tokens, result.transfer_ms / 1000)
            histograms["prefill_wait"].observe(result.queue_ms / 1000)
            histograms["prefill_compute"].observe(result.prefill_ms / 1000)
            histograms["kv_transfer"].observe(result.transfer_ms / 1000)

    # --- what comes in

    def _on_claim(self, call: IncomingCall) -> None:
        claim: Claim = call.body
        now_s = time.monotonic()
        running = self._running.get(claim.request_id)
        if running is None or not running.task.claim(call.peer, now_s, began_s(claim, running.task.queued_s, now_s)):
            self._mesh.counters.add("claims_gone")
            raise Gone("claimed by another, or over")
        self._mesh.counters.add("claims_granted")
        running.claim = call
        running.names[call.peer] = self._mesh.name_of(call.peer)
        self._note(running, "claim", attempt=running.task.attempt, peer_claiming=call.peer)
        if running.reservation is None and not self._reserve(running):
            return
        assert running.reservation is not None, "made just now, or for an earlier attempt"
        attempt = running.task.attempt
        call.on_cancel = lambda: self._claim_ended(running, call, attempt)
        if claim.header is not None and running.reservation.missing():
            self._take_brought(running, call.peer, claim.header, claim.payloads)
        self.complete_if_all_came(running)
        missing = running.reservation.missing()
        if missing and running.task.is_current(call.peer, attempt):
            call.send(Grant(running.request.tokens[:-1], attempt, missing[0]))

    def _take_brought(self, running: RunningTask, peer: str, header: BulkHeader, payloads: Sequence[bytes]) -> None:
        """The blocks of a claim that was granted. Those of another attempt are left, and the claim is as good as any."""
        if (header.decode_peer, header.prefill_peer, header.attempt) != (self._mesh.incarnation, peer, running.task.attempt):
            self._mesh.counters.add("kv_blocks_stale", len(payloads))
            return
        running.has_delivered = True
        self._intake.take(running, header, payloads, lambda answer: None)

    def _reserve(self, running: RunningTask) -> bool:
        """All blocks or none. Without room the prompt waits its turn in the engine's own queue, and is prefilled there."""
        try:
            running.reservation = self._engine.reserve(running.request)
        except MeshserveError as error:
            self._mesh.counters.add("reservations_refused" if isinstance(error, PoolFull) else "reservations_failed")
            self._carry_out(running, running.task.fall_back(time.monotonic()))
            return False
        return True

    def _claim_ended(self, running: RunningTask, call: IncomingCall, attempt: int) -> None:
        """By the worker, by its death, or by a link that broke: what the call ended by tells which."""
        is_lost = call.ended_by in (CONNECTION_CLOSED, PEER_DIED)
        self.attempt_failed(running, call.peer, attempt, "peer died" if is_lost else "the worker gave up", is_peer_dead=is_lost)

    def _on_renew(self, call: IncomingCall) -> None:
        renewal: Renewal = call.body
        now_s = time.monotonic()
        for named in renewal.attempts:
            if (running := self._running.get(named.request_id)) is not None:
                running.task.renew(call.peer, named.attempt, now_s - named.overdue_s)
        call.end()

    def _on_bulk(self, data: Any, payloads: list[memoryview], answer: Callable[[Acknowledgement], None]) -> None:
        header = BulkHeader.from_wire(data)
        running = self._running.get(header.request_id)
        if (
            running is None
            or header.decode_peer != self._mesh.incarnation
            or not running.task.is_current(header.prefill_peer, header.attempt)
        ):
            self._mesh.counters.add("kv_blocks_stale", len(payloads))
        else:
            self._intake.take(running, header, payloads, answer)

    def is_running(self, running: RunningTask) -> bool:
        """Whether somebody still waits for this prompt."""
        return self._running.get(running.task.request_id) is running

    def complete_if_all_came(self, running: RunningTask) -> None:
        """The engine has one block more: perhaps that was the last one."""
        if running.reservation is not None and running.reservation.is_complete:
            self._carry_out(running, running.task.complete(time.monotonic()))

    def attempt_failed(self, running: RunningTask, peer: str, attempt: int, reason: str, is_peer_dead: bool = False) -> None:
        """An attempt is over, unless it was already; another one is made elsewhere, or the prompt is computed here."""
        now_s = time.monotonic()
        self._carry_out(running, running.task.attempt_failed(peer, attempt, reason, now_s, is_peer_dead=is_peer_dead))

    def _on_change(self, change: Change, member: Member) -> None:
        if "prefill" not in member.info.roles:
            return
        if change is Change.CALLABLE:
            self._say_if_unlike(member.info)
        peer, now_s = member.info.incarnation, time.monotonic()
        for running in list(self._running.values()):
            task = running.task
            if change in (Change.DIED, Change.LEFT, Change.SUSPECTED):
                is_cut = change is Change.SUSPECTED and peer not in self._mesh.links.channels
                is_dead = change is Change.DIED or (is_cut and task.is_offered_to(peer))  # as for a claim that ends so
                self._carry_out(running, task.peer_gone(peer, now_s, is_dead=is_dead))
            elif change is Change.UPDATED and (member.info.is_draining or not member.info.can_play("prefill")):
                self._carry_out(running, task.peer_draining(peer, now_s))
            elif change in (Change.CALLABLE, Change.RECOVERED) and self._engine.kv_layout.accepts(member.info.layout):
                task.peer_joined(peer, now_s)

    def _say_if_unlike(self, info: PeerInfo) -> None:
        """A prefill worker of the same model that can never help: people see two workers, and no handoff."""
        own, card = self._engine.kv_layout, self._engine.card
        is_same_model = info.card is not None and info.card.model_hash == card.model_hash
        if is_same_model and info.layout is not None and own.can_hand_over and info.layout.can_hand_over and not own.accepts(info.layout):
            _log.warning(
                "%s keeps its KV in another way: no prompt is handed over to it; give both the same --kv-type and version", info.name
            )

    def _tick(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        stall_s = now_s - self._ticked_s - _TICK_S
        self._ticked_s = now_s
        for running in list(self._running.values()):
            if stall_s > _STALL_S:
                running.task.stalled(stall_s)
            self._carry_out(running, running.task.tick(now_s))
        if self._running:
            self._timer = self._loop.call_later(_TICK_S, self._tick)

    def close(self) -> None:
        """Cancel everything."""
        for request_id in list(self._running):
            self.cancel(request_id)
        self._answers.close()
        if self._timer is not None:
            self._timer.cancel()
        self._tickets.close()
        self._bulk.close()
