"""One sequence of a request: its worker, the worker's stream, and another worker if that one is lost before the first token.

A sequence goes from top to bottom: `route` asks a router, `_routed` sends the prompt to the best worker, `on_item` takes its tokens,
`on_end` its end. Steps are callbacks: a sequence costs no task, and a token costs no task switch. The sequence is the sink of one stream
at a time, first of a router's and then of a worker's.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from meshserve.errors import GaveUp, InvalidRequest, MeshserveError, NoWorker, Overloaded, PeerLost, PeerSilent, ProtocolError, UnknownField
from meshserve.mesh.calls import IncomingCall, OutgoingCall
from meshserve.observe.receipts import Receipt
from meshserve.roles.processor.choices import Choice, PlainChoice
from meshserve.roles.processor.models import Dispatcher
from meshserve.telemetry import BUCKETS_S, Histograms
from meshserve.wire.completion import CompletionRequest, EndItem
from meshserve.wire.generation import GenerateRequest, GenerationEnd, HandedOver, Sampling, WorkerAccount, handed_over_in
from meshserve.wire.messages import GENERATE, ROUTE
from meshserve.wire.routing import RouteRequest, RoutingDecision

_MAX_ATTEMPTS = 4
_RETRIED_CODES = frozenset(
    ("peer_lost", "peer_silent", "draining", "no_worker", "unknown_method", "unknown_field", "overloaded")
)
"""Errors that say nothing about the request itself: another worker may do."""
_ROUTE_TIMEOUT_S = 0.5
"""A router answers within a millisecond; one that has not answered by now hangs. Higher waits longer for
it, lower asks two where the machine is merely busy."""
_NO_ROUTER = "round-robin (no router)"


@dataclass(slots=True, eq=False)
class Account:
    """Where one sequence's time goes: into its receipt, and into this peer's histograms of its worker.

    Of a call to a worker that ends well the worker says what it did; of any other it is known what the
    worker said with the first tokens.
    """

    receipt: Receipt
    began_s: float
    """When the request came, on the monotonic clock."""
    last_s: float
    """When the last phase ended: phases partition the time."""
    histograms: Histograms | None
    """With a part for each worker; None if nobody wants them."""
    name_of: Callable[[str], str]
    """A peer's name, by incarnation."""
    now_in: str = ""
    """`route`, `call` (to a worker), or nothing."""
    early: Any = None
    """What the worker said with the first token, unread: mostly its end says it all."""
    gaps: dict[int, int] | None = None
    """From the first token on: the worker's counts of times between tokens."""
    _first_ms: float = 0.0
    _first_s: float = 0.0

    def end_phase(self) -> float:
        """All since the last phase was one phase; returns its milliseconds."""
        last_s, self.last_s = self.last_s, monotonic()
        return (self.last_s - last_s) * 1000

    def first_token(self, worker: str) -> float:
        """The first one came, from the worker of this incarnation; returns when, on the monotonic clock."""
        now_s = monotonic()
        self._first_ms, self._first_s = (now_s - self.last_s) * 1000, now_s
        if self.histograms is not None:
            self.histograms = of_worker = self.histograms.parts[worker]
            ttft, took_s = of_worker.named["ttft"], now_s - self.began_s
            ttft.counts[bisect_left(BUCKETS_S, took_s)] += 1  # `observe` in line, as with the gaps
            ttft.sum_s += took_s
            self.gaps = of_worker.named["itl"].counts
        return now_s

    def call_ended(self, account: Any) -> None:
        """The call ended well, with this account by its worker."""
        self.now_in = ""
        # of a worker in this very peer there is nothing to read
        said = account if type(account) is WorkerAccount else WorkerAccount.from_wire(account)
        self._take(said, self.end_phase())
        if said.handed_over is None and self.early is not None:  # said once, it need not be said again
            self._take_handed_over(handed_over_in(self.early))

    def settle(self) -> float:
        """What it was in is over, and nobody else accounts for it; returns its milliseconds. Harmless when it is in nothing."""
        was_in, self.now_in = self.now_in, ""
        if not was_in:
            return 0.0
        took_ms = self.end_phase()
        phases_ms = self.receipt.phases_ms
        if was_in == "route":
            phases_ms.route += took_ms
        elif not self._first_s:
            phases_ms.queue += took_ms
        else:
            early = WorkerAccount.from_wire(self.early) if self.early is not None else WorkerAccount(prefill_ms=self._first_ms)
            self._take(early, self._first_ms)
            phases_ms.decode += took_ms - self._first_ms
        return took_ms

    def close(self, last_s: float) -> None:
        """The sequence is over, whose last token came then."""
        if self.now_in:
            self.settle()
        if self.histograms is not None and self._first_s:
            self.histograms.named["itl"].sum_s += last_s - self._first_s

    def _take(self, said: WorkerAccount, caller_ms: float) -> None:
        """What the worker says of a call, or of its beginning, that took so long here."""
        receipt, phases_ms = self.receipt, self.receipt.phases_ms
        phases_ms.queue += said.queue_ms
        phases_ms.prefill += said.prefill_ms
        phases_ms.kv_transfer += said.kv_transfer_ms
        phases_ms.decode += said.decode_ms
        phases_ms.network += max(0.0, caller_ms - (said.total_ms or caller_ms))
        receipt.num_cached_tokens = said.num_cached_tokens
        receipt.decision = said.decision
        if said.handed_over is not None:
            self._take_handed_over(said.handed_over)

    def _take_handed_over(self, found: HandedOver | None) -> None:
        if found is not None:
            receipt = self.receipt
            receipt.num_blocks, receipt.num_bytes = found.num_blocks, found.num_bytes
            receipt.attempts = [*receipt.attempts, *found.attempts]
            receipt.prefill = self.name_of(found.prefill_peer) if found.prefill_peer is not None else None


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
    """To the router or the worker that has the sequence now, until it ends."""
    _routers: tuple[str, ...] = ()
    """Those that were asked since the last worker was lost."""
    _excluded: tuple[str, ...] = ()
    """Incarnations of workers that were tried."""
    _lost: tuple[str, ...] = ()
    """Names of workers that died with this sequence."""
    _refusal: Overloaded | UnknownField | None = None
    """What a worker said that is full, or older than the request: the reason if there is no other."""
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
            able = dispatcher.take_turns(asked.model, self._excluded)
            if able:
                self._routed(RoutingDecision(None, _NO_ROUTER, able, []))
            else:
                text = f"no decode worker for the model {asked.model!r} can take work now"
                self._not_routed(NoWorker(text))
            return
        self._routers += (router,)
        excluded = self._excluded + dispatcher.out_of_reach()
        question = RouteRequest(receipt.request_id, asked.model, self.tokens, asked.policy, asked.session, excluded)
        try:
            self._stream = dispatcher.mesh.open(router, ROUTE, question, self, _ROUTE_TIMEOUT_S)
        except PeerLost:
            self.route()

    def _not_routed(self, error: MeshserveError) -> None:
        """No worker can take the sequence; why one refused it is the better reason."""
        self._fail(self._refusal if isinstance(error, NoWorker) and self._refusal else error)

    def _routed(self, decision: RoutingDecision) -> None:
        """Send the prompt to the first candidate, with the prefill workers that the router ranked."""
        account, receipt, mesh = self.account, self.receipt, self.dispatcher.mesh
        receipt.router, receipt.policy = decision.router, decision.policy
        receipt.candidates, receipt.prefill_candidates = decision.decode, decision.prefill or ()
        receipt.phases_ms.route += account.end_phase()
        account.now_in = "call"
        chosen = self.dispatcher.first_reachable(decision.decode)
        if chosen is None:  # another router may know better; else the workers that this processor reaches take turns
            self._excluded += tuple(candidate.incarnation for candidate in decision.decode)
            self.route()
            return
        self.worker, self._num_overlap_blocks = chosen.incarnation, chosen.overlap_blocks
        receipt.decode = chosen.peer
        if self._is_followed:
            shown = [candidate.for_receipt() for candidate in decision.decode]
            self._note("routed", decode=chosen.incarnation, router=decision.router, policy=decision.policy, candidates=shown)
        request = GenerateRequest(receipt.request_id, receipt.model, self.tokens, self.sampling)
        request.lost_peers = self._lost
        if prefill := decision.prefill:
            request.prefill_peers = tuple((found.incarnation, found.load, found.overlap_blocks) for found in prefill)
            request.prefill_ms = tuple(found.ready_ms for found in prefill)
        remaining_s = max(0.001, self.call.deadline_s - mesh.now_s())
        try:
            self._stream = mesh.open(chosen.incarnation, GENERATE, request, self, remaining_s)
        except PeerLost as error:
            self._retry_or_fail(error)

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
            self._note("tokens", position=self.num_tokens, count=len(tokens), decode=self.worker)
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
            self._fail(ProtocolError(f"a worker's tokens cannot be read: {error}"))
            return
        if is_stopped:
            self._stop_early()

    def _unusual(self, item: Any) -> tuple[list[int] | None, Any]:
        """Read the rarer items of a worker's stream. Returns tokens after their position, and their log
        probabilities; or nothing, if the item was another one.
        """
        if isinstance(item, str):  # a prefill worker that died with the prompt
            self._lost += (item,)
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
        self._fail(ProtocolError("a worker's tokens do not follow each other"))
        return None, None

    def _score(self, logprobs: list[Any]) -> None:
        try:
            self.on_scored(self, logprobs)
        except (TypeError, ValueError) as error:
            self._fail(ProtocolError(f"a prompt's log probabilities cannot be read: {error}"))

    def on_end(self, value: RoutingDecision | GenerationEnd) -> None:
        """The router's answer, or the end of the worker's tokens."""
        self._stream = None
        if isinstance(value, RoutingDecision):
            self._routed(value)
            return
        self.account.call_ended(value.account)
        if not self.num_tokens and self.on_began is not None:
            self.on_began(self)
        self._end(value.reason)

    def on_error(self, error: MeshserveError) -> None:
        """The router or the worker failed, or was lost."""
        self._stream = None
        if self.worker is not None:
            if error.code == PeerLost.code:
                self._lost += (self.receipt.decode or "a worker",)
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
        if isinstance(error, (Overloaded, UnknownField)):
            self._refusal = error
        is_fresh = self.num_tokens == 0 and len(self.receipt.attempts) < _MAX_ATTEMPTS
        if not is_fresh or error.code not in _RETRIED_CODES or self.worker is None:
            self._fail(error)
        elif len(self._lost) >= self.dispatcher.max_lost_peers:
            names = ", ".join(self._lost)
            text = f"this request took down {names}; it is tried nowhere else"
            self._fail(GaveUp(text, lost_peers=list(self._lost)))
        else:
            self.dispatcher.mesh.counters.add("requests_rerouted")
            self._excluded += (self.worker,)
            self.worker, self._routers = None, ()
            self.route()

    def _note_attempt(self, error: MeshserveError, took_ms: float) -> None:
        peer, ms = self.dispatcher.mesh.name_of(self.worker or ""), round(took_ms, 3)
        attempt = {"peer": peer, "role": "decode", "outcome": error.code, "tokens": self.num_tokens, "ms": ms}
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
        self.account.settle()
        if self.account.early is None:
            num_overlap = self._num_overlap_blocks * self.dispatcher.block_size(self.asked.model)
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
        self.account.close(self._last_s)
        self.is_over = True
        self.receipt.num_completion_tokens = self.choice.num_tokens
        if self.dispatcher.mesh.event_log.is_on:
            self._note(
                "result",
                outcome=outcome,
                num_tokens=self.num_tokens,
                num_prompt_tokens=len(self.tokens),
                num_cached_tokens=self.receipt.num_cached_tokens,
            )
