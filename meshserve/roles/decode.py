"""The decode role: generates tokens. Prompts are prefilled elsewhere if that pays and somebody is there, else here: the monolith."""

import asyncio
import time
from typing import Any

from meshserve.config import HandoffConfig
from meshserve.engines.protocol import Admission, Engine, GenerationStats, Reservation
from meshserve.errors import Draining, GaveUp, InvalidRequest, MeshserveError, Overloaded
from meshserve.handoff.choice import HandoffChoice
from meshserve.handoff.requester import PrefillRequester
from meshserve.handoff.result import HandoffResult
from meshserve.handoff.task import TaskState
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.observe.worker_report import WorkerReporter
from meshserve.wire.generation import GenerateRequest, GenerationEnd, HandedOver, HandoffDecision, TokenLogprobs, WorkerAccount
from meshserve.wire.messages import GENERATE

_WORD_GETS_OUT_S = 0.02


class _Generation:
    """One request on this worker: the sink of its engine run, and the end of its stream."""

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
        "_role",
        "_waited_ms",
        "_wire",
        "request",
    )

    def __init__(self, role: "DecodeRole", call: IncomingCall, request: GenerateRequest) -> None:
        self._role, self._call, self.request = role, call, request
        self._wire = call.wire
        self._first = request.num_generated
        self._began_s = time.monotonic()
        self._handoff: HandoffResult | None = None
        self._decision: HandoffDecision | None = None
        self._waited_ms = 0.0
        """Until the engine got it."""
        self._is_untold, self._has_told = role.is_observed, False
        """Whether the processor is still to hear what was done before the first token, and whether it heard it."""
        self._item: list[Any] = []
        """The last one, as it leaves: tokens of the same message are added to it."""
        self._base = self._first
        """The next token's position, less the length of that item."""
        self._batch = -1
        """The message that it leaves with."""

    def on_prompt_logprobs(self, logprobs: list[TokenLogprobs | None]) -> None:
        """An item of its own, see :mod:`meshserve.wire.generation`."""
        self._call.send(["prompt_logprobs", logprobs])

    def on_tokens(self, tokens: list[int], logprobs: list[TokenLogprobs] | None = None) -> None:
        """Tokens carry their position, so that a gap or a repeat cannot pass unseen. Those that leave in one message are one item."""
        if logprobs is None and self._batch == self._wire.num_batches:
            self._item += tokens
        else:
            self._begin_item(tokens, logprobs)

    def _begin_item(self, tokens: list[int], logprobs: list[TokenLogprobs] | None) -> None:
        position = self._position
        item: list[Any] = [position, *tokens] if logprobs is None else [[position, *tokens], logprobs]
        if self._is_untold:
            self._tell(item)
        if logprobs is None:
            self._item, self._batch = item, self._wire.num_batches
        else:
            self._item, self._batch = [], -1
        self._base = position + len(tokens) - len(self._item)
        self._call.send(item)

    @property
    def _position(self) -> int:
        return self._base + len(self._item)

    @property
    def num_generated(self) -> int:
        """Tokens that this worker made of it so far."""
        return self._position - self._first

    def on_finish(self, reason: str, stats: GenerationStats) -> None:
        num_cached = self._role.count_prompt(self, stats)
        account = self._account(stats.queue_ms, stats.prefill_ms, stats.decode_ms, num_cached)
        self._call.end(GenerationEnd(reason, account))
        self._role.ended(self)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._role.cancel(self)

    def decided(self, decision: HandoffDecision | None) -> None:
        """Where its prompt is prefilled; None if there was nothing to decide."""
        self._decision = decision

    def begins(self) -> None:
        """The engine gets it now."""
        self._waited_ms = (time.monotonic() - self._began_s) * 1000

    def _tell(self, item: list[Any]) -> None:
        """The first item begins with what was done by then: of a request that is stopped, cancelled or cut off, no more is ever heard."""
        self._is_untold = False
        if self.request.sampling.max_tokens - self._first <= 1 and self._handoff is None:
            return  # its end follows at once
        admission = self._role.admission(self.request)
        since_ms = (time.monotonic() - self._began_s) * 1000 - self._waited_ms
        queue_ms, num_cached = 0.0, 0
        if admission is not None:
            queue_ms, num_cached = min(admission.queue_ms, since_ms), self._role.num_found(self, admission.num_cached_tokens)
        item.insert(0, self._account(queue_ms, since_ms - queue_ms, 0.0, num_cached))
        self._has_told = True

    def on_error(self, error: MeshserveError) -> None:
        self._role.ended(self)
        self._call.fail(error)

    def prefilled(self, result: HandoffResult) -> None:
        """The prefill task came to its end, one way or another."""
        self._handoff = result
        if result.state is TaskState.GAVE_UP:
            lost = ", ".join(result.lost_peers)
            self.on_error(GaveUp(f"prefilling this prompt took down {lost}; it is tried nowhere else", lost_peers=result.lost_peers))
        elif result.state is TaskState.LOCAL and result.lost_peers:
            self._role.run_warily(self)
        else:
            self._role.run(self, result.reservation)

    def _account(self, queue_ms: float, prefill_ms: float, decode_ms: float, num_cached: int) -> WorkerAccount:
        """What this worker knows for the receipt. Until the engine got it, whatever was not the handoff's work was waiting."""
        handoff, total_ms = self._handoff, (time.monotonic() - self._began_s) * 1000
        if handoff is None:
            return WorkerAccount(queue_ms + self._waited_ms, prefill_ms, 0.0, decode_ms, total_ms, num_cached, None, self._decision)
        queue_ms += max(0.0, self._waited_ms - handoff.prefill_ms - handoff.transfer_ms)
        handed_over = None
        if not self._has_told:
            handed_over = HandedOver(handoff.prefill_peer, handoff.attempts, handoff.num_blocks, handoff.num_bytes)
        prefill_ms += handoff.prefill_ms
        return WorkerAccount(queue_ms, prefill_ms, handoff.transfer_ms, decode_ms, total_ms, num_cached, handed_over, self._decision)

    @property
    def num_handed_over(self) -> int:
        """Tokens whose KV came from elsewhere: the engine counts them as cached, the receipt does not."""
        return self._handoff.num_tokens if self._handoff is not None and self._handoff.state is TaskState.DONE else 0


class DecodeRole:
    """Serves `generate`."""

    def __init__(
        self,
        mesh: Mesh,
        engine: Engine,
        requester: PrefillRequester,
        reporter: WorkerReporter,
        config: HandoffConfig,
        max_queue: int,
        is_observed: bool = True,
    ) -> None:
        self._mesh, self._engine, self._requester, self._reporter = mesh, engine, requester, reporter
        self._choice = HandoffChoice(engine, requester, config)
        self._max_queue, self.is_observed = max_queue, is_observed
        self._mean_gap_s = 0.0
        """Between the ends of two requests, while others wait: how fast a queue moves."""
        self._last_end_s = time.monotonic()
        self._running: dict[str, _Generation] = {}
        self._num_tokens = 0
        """Generated by requests that ended: a token costs no counting."""
        mesh.counters.derive("tokens_generated", lambda: self._num_tokens + sum(found.num_generated for found in self._running.values()))
        mesh.gauges.derive("sequences", lambda: len(self._running))
        mesh.serve(GENERATE, self._on_generate)

    @property
    def is_idle(self) -> bool:
        """Nothing accepted is unfinished."""
        return not self._running

    def _on_generate(self, call: IncomingCall) -> None:
        if self._mesh.own.is_draining:
            raise Draining("this worker is shutting down")
        request: GenerateRequest = call.body
        if request.request_id in self._running:
            raise InvalidRequest("this request is running here already")
        self._check_queue()
        decision, candidates = self._choice.choose(request)
        if candidates:  # else the engine checks it when it gets it, which is now
            self._engine.check(request)
        generation = _Generation(self, call, request)
        self._running[request.request_id] = generation
        if self._mesh.event_log.is_on:
            self._mesh.event_log.note("accepted", request.request_id)
        call.on_cancel = generation.cancel
        generation.decided(decision)
        if candidates:
            self._requester.start(request, candidates, call.deadline_s, generation.prefilled, call.send)
        else:
            self.run(generation, None)
        self._reporter.admitted(request.request_id, is_kept=bool(request.prefill_peers) and not candidates)

    def _check_queue(self) -> None:
        """Raises Overloaded when more wait than may, wherever they wait: for their prompt's KV, or for a place in the batch."""
        if len(self._running) < self._max_queue:
            return
        load = self._engine.load()
        num_waiting = len(self._running) - max(load.num_running, load.max_running)
        if num_waiting >= self._max_queue:
            retry_after_s = num_waiting * self._mean_gap_s
            raise Overloaded(f"{self._mesh.own.name} has {num_waiting} requests waiting; try again", retry_after_s=max(1.0, retry_after_s))

    def run(self, generation: _Generation, reservation: Reservation | None) -> None:
        """Hand the request to the engine, with its prompt's KV or without."""
        generation.begins()
        try:
            self._engine.generate(generation.request, generation, reservation)
        except MeshserveError as error:
            if reservation is not None:
                reservation.release()
            generation.on_error(error)

    def run_warily(self, generation: _Generation) -> None:
        """This prompt took a prefill worker down, and may do so here: the word of it must be on its way to the processor before."""
        asyncio.get_running_loop().call_later(_WORD_GETS_OUT_S, self._run_if_wanted, generation)

    def _run_if_wanted(self, generation: _Generation) -> None:
        if self._running.get(generation.request.request_id) is generation:
            self.run(generation, None)

    def count_prompt(self, generation: _Generation, stats: GenerationStats) -> int:
        """Prompt tokens whose KV was on this worker when the request came; they, and all of the prompt, are counted."""
        num_cached = self.num_found(generation, stats.num_cached_tokens)
        self._mesh.counters.add("prompt_tokens", stats.num_prompt_tokens)
        self._mesh.counters.add("prompt_tokens_cached", num_cached)
        return num_cached

    def num_found(self, generation: _Generation, num_cached_tokens: int) -> int:
        """Of what the engine counts as cached, what was not handed over."""
        return max(0, num_cached_tokens - generation.num_handed_over)

    def admission(self, request: GenerateRequest) -> Admission | None:
        """How the engine took it up, if it says."""
        return self._engine.admission(request.request_id)

    def ended(self, generation: _Generation) -> None:
        """No longer running here."""
        if self._running.get(generation.request.request_id) is generation:
            del self._running[generation.request.request_id]
            if not self._running:
                self._mesh.turn.hurry()
            self._note_gap()
            self._num_tokens += generation.num_generated
            self._reporter.changed()
            if self._mesh.event_log.follows(generation.request.request_id):
                self._mesh.event_log.note("left", generation.request.request_id)

    def _note_gap(self) -> None:
        now_s = time.monotonic()
        gap_s, self._last_end_s = now_s - self._last_end_s, now_s
        if self._engine.load().num_waiting:
            self._mean_gap_s += (gap_s - self._mean_gap_s) * 0.05

    def cancel(self, generation: _Generation) -> None:
        """Stop working on it, wherever that is."""
        self._requester.cancel(generation.request.request_id)
        self._engine.cancel(generation.request.request_id)
        self.ended(generation)
