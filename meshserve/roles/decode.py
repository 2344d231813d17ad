"""The decode role: generates tokens. A prompt is prefilled elsewhere if that pays and a prefill
worker is there, else here: the monolith.
"""

import asyncio
import time
from typing import Any

from meshserve.engines.protocol import Engine, GenerationStats, Reservation
from meshserve.errors import Cancelled, Draining, GaveUp, InvalidRequest, MeshserveError, Overloaded
from meshserve.handoff.intake import HandoffResult
from meshserve.handoff.requester import PrefillRequester
from meshserve.handoff.task import TaskState
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.observe.worker_report import WorkerReporter
from meshserve.wire.generation import GenerateRequest, GenerationEnd, HandedOver, HandoffDecision, TokenLogprobs, WorkerAccount
from meshserve.wire.messages import GENERATE, HAS_SEQUENCE, PROGRESS

_NAME_ARRIVES_S = 0.02
"""Until the names of the prefill workers that a prompt took down have left for the processor."""


class _Sequence:
    """One sequence on this worker, from its call to its end: the engine's sink."""

    __slots__ = (
        "_base",
        "_batch",
        "_began_s",
        "_call",
        "_decision",
        "_first",
        "_handoff",
        "_has_told",
        "_is_untold",
        "_item",
        "_num_handed_over",
        "_role",
        "_waited_ms",
        "_wire",
        "request",
    )

    def __init__(
        self, role: "DecodeRole", call: IncomingCall, request: GenerateRequest, decision: HandoffDecision | None
    ) -> None:
        self._role, self._call, self._wire, self.request = role, call, call.wire, request
        self._decision = decision
        """Where the prompt is prefilled; None if there was nothing to decide."""
        self._handoff: HandoffResult | None = None
        self._num_handed_over = 0
        """Tokens whose KV came from another worker: the engine counts them as cached, the receipt does not."""
        self._began_s = time.monotonic()
        self._waited_ms = 0.0
        """Until the engine got the request."""
        self._first = request.num_generated
        """Position of the first token that is generated here."""
        # of a sequence of one token the end follows at once, with the whole account
        self._is_untold = role.is_observed and request.sampling.max_tokens - self._first > 1
        """Whether the processor is still to be told what was done before the first token."""
        self._has_told = False
        # the last item that was sent is kept: tokens that leave in the same message are added to it
        self._item: list[Any] = []
        self._base = self._first
        """The next token's position, less the length of that item."""
        self._batch = -1
        """The message in which that item leaves."""

    def run(self, reservation: Reservation | None) -> None:
        """Give the request to the engine, with its prompt's KV or without."""
        self._waited_ms = (time.monotonic() - self._began_s) * 1000
        try:
            self._role.engine.generate(self.request, self, reservation)
        except MeshserveError as error:
            if reservation is not None:
                reservation.release()
            self.on_error(error)

    def prefilled(self, result: HandoffResult) -> None:
        """The prefill task has ended, one way or another."""
        self._handoff, self._is_untold = result, self._role.is_observed
        self._num_handed_over = result.num_tokens
        if result.state is TaskState.GAVE_UP:
            lost = ", ".join(result.lost_peers)
            message = f"prefilling this prompt took down {lost}; it is tried nowhere else"
            self.on_error(GaveUp(message, lost_peers=result.lost_peers))
        elif result.state is TaskState.LOCAL and result.lost_peers:
            # The prompt took a prefill worker down, and may do the same here: the processor, which
            # counts the workers that a request took down, must hear of that one before.
            asyncio.get_running_loop().call_later(_NAME_ARRIVES_S, self._run_if_wanted)
        else:
            self.run(result.reservation)

    def _run_if_wanted(self) -> None:
        if self._role.runs(self):
            self.run(None)

    def cancel(self) -> None:
        """Nobody waits for the sequence any more: stop the work on it, wherever that is."""
        self._role.cancel(self)

    def give_way_to(self, call: IncomingCall) -> None:
        """The same request came again. Its processor lost the link to this worker and came back: what it does not wait for any more, this
        worker may not have heard of yet. Raises InvalidRequest if it is no later attempt of the same processor.
        """
        request: GenerateRequest = call.body
        if call.peer != self._call.peer or request.attempt <= self.request.attempt:
            raise InvalidRequest("this request is running here already")
        self.cancel()
        self._call.fail(Cancelled("the request came again"))

    # --- the engine's sink

    def on_prompt_logprobs(self, logprobs: list[TokenLogprobs | None]) -> None:
        """An item of its own, see :mod:`meshserve.wire.generation`."""
        self._call.send(["prompt_logprobs", logprobs])

    def on_tokens(self, tokens: list[int], logprobs: list[TokenLogprobs] | None = None) -> None:
        """Send tokens with the position of the first one, so that no gap or repeat passes unseen."""
        if logprobs is None and self._batch == self._wire.num_batches:
            self._item += tokens  # the last item has not left yet: tokens of one message are one item
            return
        position = self._base + len(self._item)
        item: list[Any] = [position, *tokens] if logprobs is None else [[position, *tokens], logprobs]
        if self._is_untold:
            self._tell(item)
        if logprobs is None:
            self._item, self._batch = item, self._wire.num_batches
        else:
            self._item, self._batch = [], -1
        self._base = position + len(tokens) - len(self._item)
        self._call.send(item)

    def on_finish(self, reason: str, stats: GenerationStats) -> None:
        """Send the end, and the account of the whole sequence."""
        num_cached = max(0, stats.num_cached_tokens - self._num_handed_over)
        account = self._account(stats.queue_ms, stats.prefill_ms, stats.decode_ms, num_cached)
        self._call.end(GenerationEnd(reason, account, self._base + len(self._item)))
        self._role.num_prompt_tokens += stats.num_prompt_tokens
        self._role.num_cached_tokens += num_cached
        self._role.ended(self)

    def on_error(self, error: MeshserveError) -> None:
        """Send the error."""
        self._role.ended(self)
        self._call.fail(error)

    @property
    def num_generated(self) -> int:
        """Tokens that this worker has generated of the sequence so far."""
        return self._base + len(self._item) - self._first

    # --- the account

    def _tell(self, item: list[Any]) -> None:
        """Begin the first item with the account so far: of a sequence that is stopped, cancelled or
        cut off, the processor hears no more.
        """
        self._is_untold = False
        admission = self._role.engine.admission(self.request.request_id)
        since_ms = (time.monotonic() - self._began_s) * 1000 - self._waited_ms
        queue_ms, num_cached = 0.0, 0
        if admission is not None:
            queue_ms = min(admission.queue_ms, since_ms)
            num_cached = max(0, admission.num_cached_tokens - self._num_handed_over)
        item.insert(0, self._account(queue_ms, since_ms - queue_ms, 0.0, num_cached))
        self._has_told = True  # the account of the end leaves out how the KV came

    def _account(self, queue_ms: float, prefill_ms: float, decode_ms: float, num_cached: int) -> WorkerAccount:
        """What this worker knows for the receipt. Of the time until the engine got the request, what
        was not the handoff's work was waiting.
        """
        handoff, total_ms = self._handoff, (time.monotonic() - self._began_s) * 1000
        if handoff is None:
            queue_ms += self._waited_ms
            return WorkerAccount(queue_ms, prefill_ms, 0.0, decode_ms, total_ms, num_cached, None, self._decision)
        queue_ms += max(0.0, self._waited_ms - handoff.prefill_ms - handoff.transfer_ms)
        handed_over = None
        if not self._has_told:
            handed_over = HandedOver(handoff.prefill_peer, handoff.attempts, handoff.num_blocks, handoff.num_bytes)
        prefill_ms += handoff.prefill_ms
        return WorkerAccount(
            queue_ms, prefill_ms, handoff.transfer_ms, decode_ms, total_ms, num_cached, handed_over, self._decision
        )


class DecodeRole:
    """Serves `generate`."""

    def __init__(
        self,
        mesh: Mesh,
        engine: Engine,
        requester: PrefillRequester,
        reporter: WorkerReporter,
        max_queue: int,
        is_observed: bool = True,
    ) -> None:
        self._mesh, self.engine, self._requester, self._reporter = mesh, engine, requester, reporter
        self._max_queue, self.is_observed = max_queue, is_observed
        self._mean_gap_s = 0.0
        """Between the ends of two requests, while others wait: how fast a queue moves."""
        self._last_end_s = time.monotonic()
        self._running: dict[str, _Sequence] = {}
        self.num_prompt_tokens = self.num_cached_tokens = self._num_tokens = 0
        """Of sequences that ended: a token costs no counting."""
        derive = mesh.counters.derive
        derive("tokens_generated", lambda: self._num_tokens + sum(found.num_generated for found in self._running.values()))
        derive("prompt_tokens", lambda: self.num_prompt_tokens)
        derive("prompt_tokens_cached", lambda: self.num_cached_tokens)
        mesh.gauges.derive("sequences", lambda: len(self._running))
        mesh.serve(GENERATE, self._on_generate)
        mesh.serve(PROGRESS, lambda call: call.end([self._overdue_s(request_id) for request_id in call.body]))
        mesh.serve(HAS_SEQUENCE, lambda call: call.end(call.body in self._running))

    @property
    def num_under_way(self) -> int:
        """Requests that were accepted and are not finished."""
        return len(self._running)

    def _on_generate(self, call: IncomingCall) -> None:
        if self._mesh.own.is_draining:
            raise Draining("this worker is shutting down")
        request: GenerateRequest = call.body
        request_id = request.request_id
        if (earlier := self._running.get(request_id)) is not None:
            earlier.give_way_to(call)
        if len(self._running) >= self._max_queue:
            self._check_queue()
        decision, candidates = self._requester.choice.choose(request)
        if candidates:  # else the engine checks the request when it gets it, which is now
            self.engine.check(request)
        sequence = self._running[request_id] = _Sequence(self, call, request, decision)
        if self._mesh.event_log.is_on:
            self._mesh.event_log.note("accepted", request_id)
        call.on_cancel = sequence.cancel
        if candidates:
            self._requester.start(request, candidates, call.deadline_s, sequence.prefilled, call.send)
        else:
            sequence.run(None)
        self._reporter.changed(request_id, is_kept=bool(request.prefill_peers) and not candidates)

    def _overdue_s(self, request_id: str) -> float | None:
        """How long the progress of this request is overdue; None if it is not here."""
        if request_id not in self._running:
            return None
        is_handed_over = request_id in self._requester.running  # handoffs have deadlines of their own
        return 0.0 if is_handed_over else self.engine.overdue_s(request_id)

    def _check_queue(self) -> None:
        """Raises Overloaded when more requests wait than may: for their prompt's KV, or for the batch."""
        load = self.engine.load()
        num_waiting = len(self._running) - max(load.num_running, load.max_running)
        if num_waiting >= self._max_queue:
            retry_after_s = max(1.0, num_waiting * self._mean_gap_s)
            message = f"{self._mesh.own.name} has {num_waiting} requests waiting; try again"
            raise Overloaded(message, retry_after_s=retry_after_s)

    def runs(self, sequence: _Sequence) -> bool:
        """Whether the sequence is still wanted here."""
        return self._running.get(sequence.request.request_id) is sequence

    def ended(self, sequence: _Sequence) -> None:
        """The sequence no longer runs here. Harmless when that is known."""
        request_id = sequence.request.request_id
        if self._running.get(request_id) is not sequence:
            return
        del self._running[request_id]
        self._num_tokens += sequence.num_generated
        now_s = time.monotonic()
        gap_s, self._last_end_s = now_s - self._last_end_s, now_s
        if not self._running:
            self._mesh.turn.hurry()
        elif self.engine.load().num_waiting:
            self._mean_gap_s += (gap_s - self._mean_gap_s) * 0.05
        self._reporter.changed()
        event_log = self._mesh.event_log
        if event_log.is_on and event_log.follows(request_id):
            event_log.note("left", request_id)

    def cancel(self, sequence: _Sequence) -> None:
        """Stop the work on a sequence, wherever that is."""
        self._requester.cancel(sequence.request.request_id)
        self.engine.cancel(sequence.request.request_id)
        self.ended(sequence)
