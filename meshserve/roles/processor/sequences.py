"""One sequence of a request: its worker, the worker's stream, and another worker if that one is lost.

A sequence goes from top to bottom: `route` asks a router, `_routed` sends the prompt to the best worker, `on_item` takes its tokens,
`on_end` its end. Steps are callbacks: a sequence costs no task, and a token costs no task switch. The sequence is the sink of one stream
at a time, first of a router's and then of a worker's.

A sequence whose worker is lost goes on at another one: from the prompt and the tokens so far. Sampling is a function of seed and position,
so the tokens that follow are those that the lost worker would have generated. What is made of them is made here, so a client sees a pause
and nothing else. No token of a lost worker is taken any more, as its stream ends before the next one begins.
"""

from array import array
from asyncio import TimerHandle, get_running_loop
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from meshserve.errors import GaveUp, InvalidRequest, MeshserveError, NoProgress, NoWorker, Overloaded, PeerLost, PeerSilent, ProtocolError
from meshserve.mesh.calls import OutgoingCall
from meshserve.mesh.faults import FAULTS
from meshserve.observe.receipts import Receipt
from meshserve.roles.processor.accounts import Account
from meshserve.roles.processor.choices import Choice, PlainChoice
from meshserve.roles.processor.doubts import is_end, tokens_in
from meshserve.roles.processor.models import Dispatcher
from meshserve.telemetry import BUCKETS_S
from meshserve.wire.card import ModelCard
from meshserve.wire.completion import CompletionRequest, EndItem
from meshserve.wire.generation import GenerateRequest, GenerationEnd, Sampling
from meshserve.wire.messages import GENERATE, ROUTE
from meshserve.wire.routing import RouteRequest, RoutingDecision

_MAX_ATTEMPTS = 4
_LOSSES = frozenset(("peer_lost", "protocol_error", "no_progress"))
"""Codes of errors after which the request itself may be what ended the worker."""
_RETRIED_CODES = _LOSSES | {"peer_silent", "draining", "no_worker", "unknown_method", "unknown_field", "overloaded", "pool_full"}
"""Codes of errors that say nothing about the request itself: another worker may serve it."""
_MAX_NAME = 255
_ROUTE_TIMEOUT_S = 0.5
"""A router without an answer after this time hangs. Higher waits longer for it, lower asks a second router on a busy machine."""
_LOOK_AGAIN_S, _FULL_S = 0.1, 0.5
"""Time until a sequence that has begun, and finds no worker, asks again; the second if the workers that are there refused it. Lower finds
a new worker sooner, and costs a question each time, or one for each worker."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Keeps prompt, sampling, seed and tokens so far, so that another worker can continue."""

    dispatcher: Dispatcher
    deadline_s: float
    """Deadline of the stream to the frontend."""
    asked: CompletionRequest
    card: ModelCard
    """The card of the model for which the prompt was made, and which generates the output."""
    receipt: Receipt
    account: Account
    tokens: "array[int]"
    """The prompt's."""
    sampling: Sampling
    choice: Choice | PlainChoice
    """Turns tokens into items of the frontend's stream."""
    on_began: "Callable[[Sequence], None] | None"
    """Called once, before the first token is delivered, or before an end without tokens; then None."""
    on_scored: "Callable[[Sequence, list[Any]], None]"
    """Called with the prompt's log probabilities."""
    on_over: "Callable[[Sequence, EndItem | MeshserveError], None]"
    """Called once and last, unless the sequence is cancelled."""
    worker: str | None = None
    """Incarnation of the decode worker that has the sequence now; None while a router is asked."""
    output: "array[int]" = field(default_factory=lambda: array("I"))
    """The tokens so far."""
    is_over: bool = False
    is_scored: bool = False
    waited_ms: float = 0.0
    """For the first answer to the same prompt, if this is a later one."""
    _stream: OutgoingCall | None = None
    """To the router or the worker that has the sequence now, until it ends."""
    _routers: tuple[str, ...] = ()
    """Those that were asked since the last worker was lost."""
    _excluded: tuple[str, ...] = ()
    """Incarnations of workers that were tried since the last token."""
    _lost: tuple[str, ...] = ()
    """Names of workers that died with this sequence since the last token: one that made tokens of it did not die of it."""
    attempt: int = 0
    """How many workers were tried before this one."""
    _num_fruitless: int = 0
    """Of them, those since the last token."""
    _num_migrations: int = 0
    """Of them, those that were lost after they had given tokens."""
    _waits_until_s: float = 0.0
    """While no worker can go on with the sequence: when it fails, on the monotonic clock."""
    _timer: TimerHandle | None = None
    """While it waits so."""
    _has_worker_begun: bool = False
    """The worker that has the sequence now has given tokens."""
    _refusal: Overloaded | ProtocolError | None = None
    """Error of a worker that is full, older than the request, or faulty: the reason if there is no other error."""
    _num_overlap_blocks: int = 0
    _last_s: float = 0.0
    """When the last tokens came, on the monotonic clock."""
    _is_followed: bool = False

    def note_submitted(self) -> None:
        """Write the sequence's beginning to the event log."""
        self._note("submit", num_tokens=len(self.tokens))
        self._is_followed = self.dispatcher.mesh.event_log.follows(self.receipt.request_id)

    def _note(self, event: str, **details: Any) -> None:
        self.dispatcher.mesh.event_log.note(event, self.receipt.request_id, **details)

    # --- which worker

    def route(self) -> None:
        """Ask a router that was not asked yet; without one, workers take turns."""
        dispatcher, asked, receipt = self.dispatcher, self.asked, self.receipt
        if self.is_over:
            return
        if asked.max_tokens == 0 and asked.logprobs < 0:  # nothing but the prompt, to be echoed
            if self.on_began is not None:
                self.on_began(self)
            self._end("length")
            return
        self.account.now_in = "route"
        router = dispatcher.next_router(self._routers)
        if router is None:
            try:
                self._routed(dispatcher.take_turns(asked.model, self.card, self._excluded, len(self.tokens) + self.sampling.max_tokens))
            except NoWorker as error:
                self._not_routed(error)
            return
        self._routers += (router,)
        tokens = self.tokens + self.output if self.output else self.tokens
        where = asked.policy, asked.session, self._excluded + dispatcher.out_of_reach(), self.card.model_hash
        question = RouteRequest(receipt.request_id, asked.model, tokens, *where, len(self.tokens) + self.sampling.max_tokens)
        try:
            self._stream = dispatcher.mesh.open(router, ROUTE, question, self, _ROUTE_TIMEOUT_S)
        except PeerLost:
            self.route()

    def _not_routed(self, error: MeshserveError) -> None:
        """No worker can take the sequence; the reason of a worker that refused it is the better error. A sequence waits for silent workers
        for a while, and a sequence that has begun waits for any worker: silent workers return or die, and killed ones are started again.
        """
        if not isinstance(error, NoWorker):
            self._fail(error)
            return
        if not self.output and (card := self.dispatcher.successor(self.asked.model, self.card)) is not None:
            self.card, self._routers, self._excluded = card, (), ()
            self.route()
            return
        now_s, config = monotonic(), self.dispatcher.mesh.config
        longest_s = config.failure_timeout_s + (config.death_timeout_s if self.output else 0.0)
        self._waits_until_s = self._waits_until_s or now_s + longest_s
        is_waiting = bool(self.output) or (self._refusal is None and self.dispatcher.is_waited_for(self.asked.model, self.card))
        if not is_waiting or now_s >= self._waits_until_s:
            self._fail(self._refusal or error)
            return
        self._routers, self._excluded = (), ()  # the one that was lost may be the one that comes back
        pause_s, self._refusal = _FULL_S if self._refusal is not None else _LOOK_AGAIN_S, None
        self._timer = get_running_loop().call_later(pause_s, self.route)

    def _routed(self, decision: RoutingDecision) -> None:
        """Send the prompt and the tokens so far to the first candidate, with the prefill workers that the router ranked."""
        account, receipt, mesh = self.account, self.receipt, self.dispatcher.mesh
        receipt.router, receipt.policy = decision.router, decision.policy
        receipt.candidates, receipt.prefill_candidates = decision.decode, decision.prefill or ()
        receipt.phases_ms.route += account.end_phase()
        account.now_in = "call"
        able = self.dispatcher.of_model(decision.decode, self.card) if self.output else decision.decode
        chosen = self.dispatcher.first_reachable(able) if able else None
        if chosen is None:  # another router may know better; else the workers that this processor reaches take turns
            self._excluded += tuple(candidate.incarnation for candidate in decision.decode)
            self.route()
            return
        self.worker, self._num_overlap_blocks = chosen.incarnation, chosen.overlap_blocks
        receipt.decode = chosen.peer
        if self._is_followed:
            shown = [candidate.for_receipt() for candidate in decision.decode]
            self._note("routed", decode=chosen.incarnation, router=decision.router, policy=decision.policy, candidates=shown)
        tokens = self.tokens + self.output if self.output else self.tokens
        request = GenerateRequest(receipt.request_id, receipt.model, tokens, self.sampling, len(self.output))
        request.attempt = self.attempt
        request.lost_peers = self._lost
        if prefill := decision.prefill:
            request.prefill_peers = tuple([(found.incarnation, found.load, found.overlap_blocks) for found in prefill])
            request.prefill_ms = tuple([found.ready_ms for found in prefill])
        remaining_s = max(0.001, self.deadline_s - mesh.now_s())
        try:
            self._stream = mesh.open(chosen.incarnation, GENERATE, request, self, remaining_s)
        except PeerLost as error:
            self._retry_or_fail(error)

    # --- the worker's stream

    def on_item(self, item: Any) -> None:
        """Tokens of one step, after their position; or something rarer."""
        logprobs, output = None, self.output
        position, most_tokens = len(output), self.sampling.max_tokens
        if type(item) is not list or len(item) < 2 or item[0] != position or position + len(item) - 1 > most_tokens:
            item, logprobs = self._unusual(item)
            if item is None:
                return
        tokens = item[1:]
        if self.on_began is not None:
            self._tell_began()
        try:
            output.extend(tokens)
            is_stopped = self.choice.feed(tokens, logprobs)
        except (ProtocolError, TypeError, ValueError, OverflowError) as error:
            del output[position:]
            self._faulty("token", str(error))
            return
        if self._is_followed:
            self._note("tokens", position=position, count=len(tokens), decode=self.worker)
        if not self._has_worker_begun:
            now_s = self.account.first_token(self.worker or "")
            self._worker_began(now_s)
            self._last_s = now_s
        elif (gaps := self.account.gaps) is not None:  # in line: it is all that a token pays to be observed (0.2 us)
            now_s = monotonic()
            gaps[bisect_left(BUCKETS_S, now_s - self._last_s)] += 1
            self._last_s = now_s
        if is_stopped:
            self._stop_early()

    def _tell_began(self) -> None:
        """Once, whatever becomes of the worker whose token is about to be given out."""
        assert self.on_began is not None, "its caller looked"
        on_began, self.on_began = self.on_began, None
        on_began(self)

    def _worker_began(self, now_s: float) -> None:
        """The worker's first token arrived, or its end without tokens: earlier failures no longer count."""
        self._has_worker_begun = True
        if self.account.moved is not None:
            self.account.go_on((now_s - self._last_s) * 1000)
            self.dispatcher.mesh.counters.add("requests_migrated")
        self._lost, self._excluded, self._num_fruitless, self._waits_until_s = (), (), 0, 0.0

    def _unusual(self, item: Any) -> tuple[list[int] | None, Any]:
        """Read the rarer items. Returns tokens after their position, and their log probabilities; None for an item without tokens."""
        if isinstance(item, str):  # a prefill worker that died with the prompt
            self._lost = (*self._lost, item[:_MAX_NAME])[-self.dispatcher.max_lost_peers :]
            return None, None
        if isinstance(item, list) and len(item) == 2 and item[0] == "prompt_logprobs":
            try:
                self.on_scored(self, item[1])
            except (TypeError, ValueError) as error:
                self._faulty("token", str(error))
            return None, None
        found = tokens_in(item, len(self.output), self.sampling.max_tokens, is_first=not self._has_worker_begun)
        if isinstance(found, str):
            self._faulty(found, repr(item[0]) if found == "order" else "")
            return None, None
        if found.account is not None:
            self.account.early = found.account
        return found.item, found.logprobs

    def on_end(self, value: RoutingDecision | GenerationEnd) -> None:
        """The router's answer, or the end of the worker's tokens."""
        self._stream = None
        if isinstance(value, RoutingDecision):
            self._routed(value)
            return
        num_tokens = len(self.output)
        is_usual = value.reason == "stop" and value.num_tokens == num_tokens
        if not is_usual and not is_end(value, num_tokens, self.sampling.max_tokens):
            self._faulty("end", f"{value.reason} after {num_tokens} tokens")
            return
        if self.on_began is not None:
            self._tell_began()
        self.account.call_ended(value.account)
        if not self._has_worker_begun:
            self._worker_began(monotonic())
        self._end(value.reason)

    def on_error(self, error: MeshserveError) -> None:
        """The router or the worker failed, or was lost."""
        self._stream = None
        if self.worker is not None:
            if error.code == ProtocolError.code:
                self._note_fault("error", error.message)
            self._lose(error)
        elif isinstance(error, InvalidRequest):
            self._not_routed(error)
        else:
            # a router that knows no worker is sound: one that has just started may not have met them all
            if not isinstance(error, NoWorker):
                self.dispatcher.mesh.counters.add("routers_failed")
            self.route()

    def _faulty(self, kind: str, detail: str = "", error_class: type[MeshserveError] = ProtocolError) -> None:
        """The worker sent what no correct worker sends: from now on the worker counts as lost."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None
        self._note_fault(kind, detail)
        self._lose(error_class(f"{self.receipt.decode} {FAULTS[kind]}"))

    def _note_fault(self, kind: str, detail: str) -> None:
        self.dispatcher.mesh.faults.note(kind, self.receipt.decode or "a worker", detail)

    def _lose(self, error: MeshserveError) -> None:
        """The worker no longer has the sequence."""
        if error.code in _LOSSES and not self._has_worker_begun:
            self._lost += (self.receipt.decode or "a worker",)
        self._retry_or_fail(error)

    def _retry_or_fail(self, error: MeshserveError) -> None:
        """Another worker takes the sequence over, with the tokens so far, unless the request itself seems to be what takes workers down."""
        dispatcher = self.dispatcher
        self._note_attempt(error)
        if isinstance(error, (Overloaded, ProtocolError)):
            self._refusal = error
        is_enough = self._num_fruitless >= _MAX_ATTEMPTS or self._num_migrations > dispatcher.max_migrations
        if error.code not in _RETRIED_CODES or self.worker is None:
            self._fail(error)
        elif len(self.output) >= self.sampling.max_tokens:  # nothing but the end was lost
            self._end("length")
        elif is_enough:
            self._fail(error)
        elif len(self._lost) >= dispatcher.max_lost_peers:
            names = ", ".join(self._lost)
            text = f"this request took down {names}; it is tried nowhere else"
            self._fail(GaveUp(text, lost_peers=list(self._lost)))
        else:
            dispatcher.mesh.counters.add("requests_rerouted")
            self._excluded += (self.worker,)
            self.worker, self._routers, self._has_worker_begun = None, (), False
            self.route()

    def _note_attempt(self, error: MeshserveError) -> None:
        """A worker had the sequence and has it no more."""
        peer, num_tokens = self.dispatcher.mesh.name_of(self.worker or ""), len(self.output)
        self.account.leave(peer, error.code, num_tokens, self._last_s)
        self.attempt += 1
        if not self._has_worker_begun:
            # full workers cost a sequence that has begun time and no attempt: its waiting is bounded
            self._num_fruitless += not (self.output and isinstance(error, Overloaded))
            return
        self._num_migrations += 1
        self.card = self.dispatcher.card_of(self.worker or "") or self.card  # older routers do not keep to the hash
        self.account.moved = {"from": self.receipt.decode, "outcome": error.code, "position": num_tokens}
        if self.account.histograms is None:  # nobody wrote down when each token came
            self._last_s = monotonic()

    def worker_suspected(self) -> None:
        """Another worker takes over if there is one; otherwise the sequence waits for the silent worker."""
        if (stream := self._stream) is not None and self._has_others():
            stream.cancel()
            self.on_error(PeerSilent("the worker fell silent"))

    def worker_stalled(self) -> None:
        """The same for a worker that lives and makes no progress. It counts as lost; the last worker that may be lost ends the sequence."""
        is_last = not self._has_worker_begun and len(self._lost) + 1 >= self.dispatcher.max_lost_peers
        if self._stream is not None and (is_last or self._has_others()):
            self._faulty("stall", error_class=NoProgress)

    def _has_others(self) -> bool:
        return self.dispatcher.has_others(self.asked.model, self.card, (*self._excluded, self.worker))

    # --- the end

    def _stop_early(self) -> None:
        """A stop string was found. The cached tokens come from the worker's first tokens, or else from the router."""
        self.account.settle()
        if self.account.early is None and not self.receipt.continuations:
            num_overlap = self._num_overlap_blocks * self.dispatcher.block_size(self.asked.model, self.card)
            self.receipt.num_cached_tokens = min(num_overlap, len(self.tokens) - 1)
        self._end("stop")

    def _end(self, reason: str) -> None:
        end = self.choice.finish(reason)
        self._close("ok")
        self.on_over(self, end)

    def _fail(self, error: MeshserveError) -> None:
        self._close(error.code)
        self.on_over(self, error)

    def cancel(self) -> None:
        """Nobody wants the sequence any more. Harmless after its end."""
        if not self.is_over:
            self._close("cancelled")

    def _close(self, outcome: str) -> None:
        if self._stream is not None:  # what nobody waits for any more: the worker goes on to others
            self._stream.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self.account.close(self._last_s)
        self.is_over = True
        self.receipt.num_completion_tokens = self.choice.num_tokens
        if self.dispatcher.mesh.event_log.is_on:
            num_tokens, num_cached = len(self.output), self.receipt.num_cached_tokens
            counts = {"num_tokens": num_tokens, "num_prompt_tokens": len(self.tokens), "num_cached_tokens": num_cached}
            self._note("result", outcome=outcome, **counts)
