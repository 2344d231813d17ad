"""One sequence of a request: its worker, the worker's stream, and another worker if that one is lost before the first token.

A sequence goes from top to bottom: `route` asks a router, `_routed` sends the prompt to the best worker, `on_item` takes its tokens,
`on_end` its end. Steps are callbacks: a sequence costs no task, and a token costs no task switch. The sequence is the sink of one stream
at a time, first of a router's and then of a worker's.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from meshserve.errors import GaveUp, InvalidRequest, MeshserveError, NoWorker, Overloaded, PeerLost, PeerSilent, ProtocolError
from meshserve.mesh.calls import IncomingCall, OutgoingCall
from meshserve.observe.receipts import Receipt
from meshserve.roles.processor.accounting import Account
from meshserve.roles.processor.choices import Choice, PlainChoice
from meshserve.roles.processor.models import Dispatcher
from meshserve.telemetry import BUCKETS_S
from meshserve.wire.completion import CompletionRequest, EndItem
from meshserve.wire.generation import GenerateRequest, GenerationEnd, Sampling
from meshserve.wire.messages import GENERATE, ROUTE
from meshserve.wire.routing import Candidate, RouteRequest, RoutingDecision

_MAX_ATTEMPTS = 4
_RETRIED_CODES = frozenset(
    ("peer_lost", "peer_silent", "link_overflow", "draining", "no_worker", "unknown_method", "overloaded")
)
"""Errors that say nothing about the request itself: another worker may do."""
_ROUTE_TIMEOUT_S = 0.5
"""A router answers within a millisecond; one that has not answered by now hangs. Higher waits longer for
it, lower asks two where the machine is merely busy."""
_NO_ROUTER = "round-robin (no router)"


@dataclass(slots=True, eq=False)
class Sequence:
    """Keeps what is needed to go on elsewhere (prompt, sampling, seed), and how far the sequence is."""

    dispatcher: Dispatcher
    call: IncomingCall
    """The stream to the frontend; here only its deadline counts."""
    asked: CompletionRequest
    receipt: Receipt
    account: Account
    tokens: "array[int]"
    """The prompt's."""
    sampling: Sampling
    choice: Choice | PlainChoice
    """Turns tokens into items of the frontend's stream."""
    on_began: "Callable[[Sequence], None] | None"
    """Called before the first token is given out, or before the end if there is no token."""
    on_scored: "Callable[[Sequence, list[Any]], None]"
    """Called with the prompt's log probabilities."""
    on_over: "Callable[[Sequence, EndItem | MeshserveError], None]"
    """Called once and last, unless the sequence is cancelled."""
    worker: str | None = None
    """Incarnation of the decode worker that has the sequence now; None while a router is asked."""
    num_tokens: int = 0
    is_over: bool = False
    is_scored: bool = False
    waited_ms: float = 0.0
    """For the first answer to the same prompt, if this is a later one."""
    _stream: OutgoingCall | None = None
    """To the router or the worker that has the sequence now."""
    _routers: list[str] = field(default_factory=list)
    """Those that were asked since the last worker was lost."""
    _excluded: list[str] = field(default_factory=list)
    """Incarnations of workers that were tried."""
    _lost: list[str] = field(default_factory=list)
    """Names of workers that died with this sequence."""
    _overloaded: Overloaded | None = None
    """What a worker said that is full: the reason if there is no other."""
    _num_overlap_blocks: int = 0
    _last_s: float = 0.0
    """When the last tokens came, on the monotonic clock."""
    _is_followed: bool = False

    def note_submitted(self) -> None:
        """Write the sequence's beginning to the event log."""
        event_log, request_id = self.dispatcher.mesh.event_log, self.receipt.request_id
        event_log.note("submit", request_id, num_tokens=len(self.tokens))
        self._is_followed = event_log.follows(request_id)

    # --- which worker

    def route(self) -> None:
        """Ask a router that was not asked yet; without one, the workers take turns. A sequence without
        tokens to generate ends at once.
        """
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
            able = dispatcher.take_turns(asked.model, self._excluded)
            if able:
                self._routed(RoutingDecision(None, _NO_ROUTER, able, []))
            else:
                text = f"no decode worker for the model {asked.model!r} can take work now"
                self._not_routed(NoWorker(text))
            return
        self._routers.append(router)
        question = RouteRequest(
            receipt.request_id, asked.model, self.tokens, asked.policy, asked.session, self._excluded
        )
        try:
            self._stream = dispatcher.mesh.open(router, ROUTE, question, self, _ROUTE_TIMEOUT_S)
        except PeerLost:
            self.route()

    def _not_routed(self, error: MeshserveError) -> None:
        """No worker can take the sequence; one that is full is the better reason."""
        self._fail(self._overloaded if isinstance(error, NoWorker) and self._overloaded else error)

    def _routed(self, decision: RoutingDecision) -> None:
        """Send the prompt to the first candidate, with the prefill workers that the router ranked."""
        account, receipt, mesh = self.account, self.receipt, self.dispatcher.mesh
        receipt.router, receipt.policy = decision.router, decision.policy
        receipt.candidates, receipt.prefill_candidates = decision.decode, decision.prefill or ()
        receipt.phases_ms.route += account.phases.end()
        account.now_in = "call"
        chosen = decision.decode[0]
        self.worker, self._num_overlap_blocks = chosen.incarnation, chosen.overlap_blocks
        receipt.decode = chosen.peer
        if self._is_followed:
            self._note_routed(chosen)
        prefill_peers, prefill_ms = [], []
        for found in decision.prefill or ():
            prefill_peers.append((found.incarnation, found.load, found.overlap_blocks))
            prefill_ms.append(found.ready_ms)
        request = GenerateRequest(receipt.request_id, receipt.model, self.tokens, self.sampling)
        request.prefill_peers, request.prefill_ms = tuple(prefill_peers), tuple(prefill_ms)
        request.lost_peers = tuple(self._lost)
        remaining_s = max(0.001, self.call.deadline_s - mesh.now_s())
        try:
            self._stream = mesh.open(chosen.incarnation, GENERATE, request, self, remaining_s)
        except PeerLost as error:
            self._retry_or_fail(error)

    def _note_routed(self, chosen: Candidate) -> None:
        receipt = self.receipt
        self.dispatcher.mesh.event_log.note(
            "routed",
            receipt.request_id,
            decode=chosen.incarnation,
            router=receipt.router,
            policy=receipt.policy,
            candidates=[candidate.for_receipt() for candidate in receipt.candidates],
        )

    # --- the worker's stream

    def on_item(self, item: Any) -> None:
        """Tokens of one step, after their position; or something rarer."""
        logprobs = None
        if type(item) is not list or len(item) < 2 or item[0] != self.num_tokens:
            item, logprobs = self._unusual(item)
            if item is None:
                return
        tokens = item[1:]
        if self._is_followed:
            self._note_tokens(len(tokens))
        if not self.num_tokens:
            self._last_s = self.account.first_token(self.worker or "")
            if self.on_began is not None:
                self.on_began(self)
        elif (gaps := self.account.gaps) is not None:  # in line: it is all that a token pays to be observed (0.2 us)
            now_s = monotonic()
            gaps[bisect_left(BUCKETS_S, now_s - self._last_s)] += 1
            self._last_s = now_s
        self.num_tokens += len(tokens)
        try:
            is_stopped = self.choice.feed(tokens, logprobs)
        except (ProtocolError, TypeError, ValueError) as error:
            self._abort(ProtocolError(f"a worker's tokens cannot be read: {error}"))
            return
        if is_stopped:
            self._stop_early()

    def _note_tokens(self, count: int) -> None:
        log, request_id = self.dispatcher.mesh.event_log, self.receipt.request_id
        log.note("tokens", request_id, position=self.num_tokens, count=count, decode=self.worker)

    def _unusual(self, item: Any) -> tuple[list[int] | None, Any]:
        """Read the rarer items of a worker's stream. Returns tokens after their position, and their log
        probabilities; or nothing, if the item was another one.
        """
        if isinstance(item, str):  # a prefill worker that died with the prompt
            self._lost.append(item)
            return None, None
        is_first = not self.num_tokens
        if is_first and isinstance(item, list) and len(item) > 2 and isinstance(item[0], (list, tuple)):
            self.account.early, item = item[0], item[1:]  # ahead of the first tokens
            if item[0] == 0 and len(item) > 1:
                return item, None
        if isinstance(item, list) and len(item) == 2 and isinstance(item[1], list):
            numbered, logprobs = item
            if numbered == "prompt_logprobs":
                self._score(logprobs)
                return None, None
            if isinstance(numbered, list) and len(numbered) > 1 and numbered[0] == self.num_tokens:
                return numbered, logprobs
        self._abort(ProtocolError("a worker's tokens do not follow each other"))
        return None, None

    def _score(self, logprobs: list[Any]) -> None:
        try:
            self.on_scored(self, logprobs)
        except (TypeError, ValueError) as error:
            self._abort(ProtocolError(f"a prompt's log probabilities cannot be read: {error}"))

    def on_end(self, value: RoutingDecision | GenerationEnd) -> None:
        """The router's answer, or the end of the worker's tokens."""
        if isinstance(value, RoutingDecision):
            self._routed(value)
            return
        self.account.call_ended(value.account)
        if not self.num_tokens and self.on_began is not None:
            self.on_began(self)
        self._end(value.reason)

    def on_error(self, error: MeshserveError) -> None:
        """The router or the worker failed, or was lost."""
        if self.worker is not None:
            if error.code == PeerLost.code:
                self._lost.append(self.receipt.decode or "a worker")
            self._retry_or_fail(error)
        elif isinstance(error, InvalidRequest):
            self._not_routed(error)
        else:
            # a router that knows no worker is sound: one that has just started may not have met them all
            if not isinstance(error, NoWorker):
                self.dispatcher.mesh.counters.add("routers_failed")
            self.route()

    def _retry_or_fail(self, error: MeshserveError) -> None:
        """Nothing given out yet means that another worker may start over, unless the request itself seems
        to be what takes workers down.
        """
        self._note_attempt(error, self.account.settle())
        if isinstance(error, Overloaded):
            self._overloaded = error
        is_fresh = self.num_tokens == 0 and len(self.receipt.attempts) < _MAX_ATTEMPTS
        if not is_fresh or error.code not in _RETRIED_CODES or self.worker is None:
            self._fail(error)
        elif len(self._lost) >= self.dispatcher.max_lost_peers:
            names = ", ".join(self._lost)
            text = f"this request took down {names}; it is tried nowhere else"
            self._fail(GaveUp(text, lost_peers=self._lost))
        else:
            self.dispatcher.mesh.counters.add("requests_rerouted")
            self._excluded.append(self.worker)
            self.worker, self._routers = None, []
            self.route()

    def _note_attempt(self, error: MeshserveError, took_ms: float) -> None:
        attempt = {
            "peer": self.dispatcher.mesh.name_of(self.worker or ""),
            "role": "decode",
            "outcome": error.code,
            "tokens": self.num_tokens,
            "ms": round(took_ms, 3),
        }
        self.receipt.attempts = [*self.receipt.attempts, attempt]

    def worker_suspected(self) -> None:
        """Its worker fell silent. What has not begun there is taken elsewhere; what has may still go on."""
        if self.num_tokens == 0 and self._stream is not None:
            self._stream.cancel()
            self.on_error(PeerSilent("the worker fell silent"))

    # --- the end

    def _stop_early(self) -> None:
        """A stop string was found: the worker need not go on. What it found in its cache is known from its
        word with the first tokens, or else from the router.
        """
        self._cancel_stream()
        self.account.settle()
        if self.account.early is None:
            num_overlap = self._num_overlap_blocks * self.dispatcher.block_size(self.asked.model)
            self.receipt.num_cached_tokens = min(num_overlap, len(self.tokens) - 1)
        self._end("stop")

    def _end(self, reason: str) -> None:
        end = self.choice.finish(reason)
        self._close("ok")
        self.on_over(self, end)

    def _abort(self, error: MeshserveError) -> None:
        self._cancel_stream()
        self._fail(error)

    def _fail(self, error: MeshserveError) -> None:
        self._close(error.code)
        self.on_over(self, error)

    def cancel(self) -> None:
        """Nobody wants the sequence any more. Harmless after its end."""
        if not self.is_over:
            self._close("cancelled")
            self._cancel_stream()

    def _cancel_stream(self) -> None:
        if self._stream is not None:
            self._stream.cancel()

    def _close(self, outcome: str) -> None:
        self.account.close(self._last_s)
        self.is_over = True
        self.receipt.num_completion_tokens = self.choice.num_tokens
        event_log = self.dispatcher.mesh.event_log
        if event_log.is_on:
            event_log.note(
                "result",
                self.receipt.request_id,
                outcome=outcome,
                num_tokens=self.num_tokens,
                num_prompt_tokens=len(self.tokens),
                num_cached_tokens=self.receipt.num_cached_tokens,
            )
