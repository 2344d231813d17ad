"""One sequence of a request at a worker: which worker, its stream, and another worker if that one is lost before its first token.

Steps are callbacks: a sequence costs no task, and a token costs no task switch.
"""

from array import array
from bisect import bisect_left
from time import monotonic
from typing import Any, Protocol

from meshserve.errors import GaveUp, MeshserveError, NoWorker, Overloaded, PeerLost, PeerSilent, ProtocolError
from meshserve.mesh.calls import OutgoingCall
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipts import Receipt
from meshserve.roles.processor.accounting import Account
from meshserve.roles.processor.worker_search import WorkerFinder, WorkerSearch
from meshserve.telemetry import BUCKETS_S, Histograms, Phases
from meshserve.wire.completion import EndItem
from meshserve.wire.generation import GenerateRequest, GenerationEnd, Sampling
from meshserve.wire.messages import GENERATE
from meshserve.wire.routing import Candidate, RouteRequest, RoutingDecision

_MAX_ATTEMPTS = 4
_RETRIED_CODES = frozenset(("peer_lost", "peer_silent", "link_overflow", "draining", "no_worker", "unknown_method", "overloaded"))
"""Errors that say nothing about the request itself: another worker may do."""


class Dispatcher(Protocol):
    """What sequences need of the processor."""

    mesh: Mesh
    max_lost_peers: int
    finder: WorkerFinder
    histograms: Histograms | None
    """Of latencies, a part for each worker; None if nobody wants them."""


class Output(Protocol):
    """What becomes of the tokens: a :class:`~meshserve.roles.processor.choices.Choice`, or a plain one."""

    num_tokens: int
    """Up to the one that made a stop string complete, that one included."""

    def echo(self, text: str) -> None:
        """The text begins with this."""

    def echo_logprobs(self, tokens: "array[int]", logprobs: list[Any]) -> None:
        """The text begins with these tokens. Raises ValueError or TypeError for what a worker must not say."""

    def feed(self, tokens: list[int], logprobs: Any = None) -> bool:
        """Tokens of one step; true if a stop string ended the text. Raises ProtocolError if log probabilities are missing."""

    def finish(self, reason: str) -> EndItem:
        """The sequence came to its end, by itself or by a stop string."""


class Owner(Protocol):
    """The request that a sequence is part of. Of `ended` and `failed` one is called, once and last, unless the sequence is cancelled."""

    policy: str | None
    session: str

    @property
    def block_size(self) -> int:
        """Tokens in a KV block of the model's workers."""

    def remaining_s(self) -> float:
        """Until the request's deadline."""

    def scored(self, sequence: "Sequence", logprobs: list[Any]) -> None:
        """The prompt's log probabilities."""

    def began(self, sequence: "Sequence") -> None:
        """Its first token is about to be given out, or its end if there is none."""

    def ended(self, sequence: "Sequence", end: EndItem) -> None:
        """It is complete."""

    def failed(self, sequence: "Sequence", error: MeshserveError) -> None:
        """It ended without its output."""


class Sequence:
    """What is needed to go on elsewhere (prompt, sampling, seed), and how far it is."""

    __slots__ = (
        "_dispatcher",
        "_event_log",
        "_excluded",
        "_gaps",
        "_is_followed",
        "_last_s",
        "_lost",
        "_num_overlap_blocks",
        "_opened",
        "_overloaded",
        "_owner",
        "_prefill_ms",
        "_prefill_peers",
        "_search",
        "account",
        "choice",
        "is_over",
        "is_scored",
        "num_tokens",
        "phases",
        "receipt",
        "request_id",
        "sampling",
        "tokens",
        "waited_ms",
        "worker",
    )

    def __init__(
        self,
        dispatcher: Dispatcher,
        owner: Owner,
        receipt: Receipt,
        tokens: "array[int]",
        sampling: Sampling,
        choice: Output,
        phases: Phases,
    ) -> None:
        self._dispatcher, self._owner, self.receipt = dispatcher, owner, receipt
        self.request_id = receipt.request_id
        self.tokens, self.sampling, self.choice, self.phases = tokens, sampling, choice, phases
        self._excluded: list[str] = []
        self._search: WorkerSearch | None = None
        self._prefill_peers: tuple[tuple[str, int, int], ...] = ()
        self._prefill_ms: tuple[float, ...] = ()
        self._lost: list[str] = []
        """Names of workers that died with this sequence."""
        self._overloaded: Overloaded | None = None
        """What a worker said that is full: the reason if there is no other."""
        self._opened: OutgoingCall | None = None
        self._num_overlap_blocks = 0
        self.worker: str | None = None
        """Incarnation of the decode worker that has the sequence now."""
        self.num_tokens = 0
        self.is_over = self.is_scored = False
        self.waited_ms = 0.0
        """For the first answer to the same prompt, if this is a later one."""
        self._gaps: dict[int, int] | None = None
        self._last_s = 0.0
        """When the last tokens came, on the monotonic clock."""
        self.account = Account(receipt, phases, dispatcher.histograms, dispatcher.mesh.name_of)
        self._event_log = dispatcher.mesh.event_log
        self._is_followed = False
        if self._event_log.is_on:
            self._event_log.note("submit", self.request_id, num_tokens=len(tokens))
            self._is_followed = self._event_log.follows(self.request_id)

    # --- which worker

    def route(self) -> None:
        """Look for a worker that was not tried yet."""
        self.worker = None
        self.account.enter("route")
        receipt, owner = self.receipt, self._owner
        question = RouteRequest(self.request_id, receipt.model, self.tokens, owner.policy, owner.session, self._excluded)
        self._search = WorkerSearch(self._dispatcher.finder, question, self)
        self._search.ask()

    def routed(self, decision: RoutingDecision) -> None:
        """The candidates are known."""
        receipt, self._search = self.receipt, None  # it holds this sequence: only the collector could free both
        receipt.router, receipt.policy = decision.router, decision.policy
        receipt.candidates, receipt.prefill_candidates = decision.decode, decision.prefill or ()
        prefill = decision.prefill
        self._prefill_peers = tuple((found.incarnation, found.load, found.overlap_blocks) for found in prefill) if prefill else ()
        self._prefill_ms = tuple([found.ready_ms for found in prefill]) if prefill else ()
        self.account.routed()
        self._dispatch(decision.decode[0])

    def not_routed(self, error: MeshserveError) -> None:
        """No worker can take it; one that is full is the better reason."""
        self._search = None
        self._fail(self._overloaded if isinstance(error, NoWorker) and self._overloaded else error)

    # --- the worker's stream

    def _dispatch(self, chosen: Candidate) -> None:
        self.worker, self._num_overlap_blocks = chosen.incarnation, chosen.overlap_blocks
        self.receipt.decode = chosen.peer
        if self._is_followed:
            self._note_routed(chosen)
        request = GenerateRequest(
            self.request_id, self.receipt.model, self.tokens, self.sampling, 0, self._prefill_peers, self._prefill_ms, tuple(self._lost)
        )
        mesh = self._dispatcher.mesh
        try:
            self._opened = mesh.open(chosen.incarnation, GENERATE, request, self, self._owner.remaining_s())
        except PeerLost as error:
            self._retry_or_fail(error)

    def _note_routed(self, chosen: Candidate) -> None:
        receipt = self.receipt
        router, policy = receipt.router, receipt.policy
        candidates = [candidate.for_receipt() for candidate in receipt.candidates]
        self._event_log.note("routed", self.request_id, decode=chosen.incarnation, router=router, policy=policy, candidates=candidates)

    def on_item(self, item: Any) -> None:
        """Tokens of one step, after their position; or something rarer."""
        logprobs = None
        if type(item) is not list or len(item) < 2 or item[0] != self.num_tokens:
            item, logprobs = self._unusual(item)
            if item is None:
                return
        tokens = item[1:]
        if self._is_followed:
            self._event_log.note("tokens", self.request_id, position=self.num_tokens, count=len(tokens), decode=self.worker)
        if not self.num_tokens:
            self._last_s = self.account.first_token(self.worker or "")
            self._gaps = self.account.gaps
            self._owner.began(self)
        elif self._gaps is not None:  # in line: it is all that a token pays to be observed (0.2 us)
            now_s = monotonic()
            self._gaps[bisect_left(BUCKETS_S, now_s - self._last_s)] += 1
            self._last_s = now_s
        self.num_tokens += len(tokens)
        try:
            is_stopped = self.choice.feed(tokens, logprobs)
        except (ProtocolError, TypeError, ValueError) as error:
            self._abort(ProtocolError(f"a worker's tokens cannot be read: {error}"))
            return
        if is_stopped:
            self._stop_early()

    def _unusual(self, item: Any) -> tuple[list[int] | None, Any]:
        """The first tokens, ahead of which stands what the worker did by then, or tokens with log probabilities; else nothing: the name
        of a prefill worker that died, or the prompt's log probabilities.
        """
        if isinstance(item, str):
            self._lost.append(item)
            return None, None
        if isinstance(item, list) and len(item) > 2 and isinstance(item[0], (list, tuple)) and not self.num_tokens:
            self.account.early, item = item[0], item[1:]
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
            self._owner.scored(self, logprobs)
        except (TypeError, ValueError) as error:
            self._abort(ProtocolError(f"a prompt's log probabilities cannot be read: {error}"))

    def on_end(self, value: GenerationEnd) -> None:
        """The worker is done."""
        self.account.call_ended(value.account)
        if not self.num_tokens:
            self._owner.began(self)
        self._end(value.reason)

    def on_error(self, error: MeshserveError) -> None:
        """The worker failed, or was lost."""
        if error.code == PeerLost.code:
            self._lost.append(self.receipt.decode or "a worker")
        self._retry_or_fail(error)

    def _retry_or_fail(self, error: MeshserveError) -> None:
        """Nothing given out yet means that another may start over, unless the request itself seems to be what takes workers down."""
        self._note_attempt(error, self.account.settle())
        if isinstance(error, Overloaded):
            self._overloaded = error
        can_retry = self.num_tokens == 0 and error.code in _RETRIED_CODES and len(self.receipt.attempts) < _MAX_ATTEMPTS
        if can_retry and len(self._lost) >= self._dispatcher.max_lost_peers:
            names = ", ".join(self._lost)
            self._fail(GaveUp(f"this request took down {names}; it is tried nowhere else", lost_peers=self._lost))
        elif can_retry and self.worker is not None:
            self._dispatcher.mesh.counters.add("requests_rerouted")
            self._excluded.append(self.worker)
            self.route()
        else:
            self._fail(error)

    def worker_suspected(self) -> None:
        """Its worker fell silent. What has not begun there is taken elsewhere; what has may still go on."""
        if self.num_tokens == 0 and self._opened is not None:
            self._opened.cancel()
            self.on_error(PeerSilent("the worker fell silent"))

    def _note_attempt(self, error: MeshserveError, took_ms: float) -> None:
        name = self._dispatcher.mesh.name_of(self.worker or "")
        attempt = {"peer": name, "role": "decode", "outcome": error.code, "tokens": self.num_tokens, "ms": round(took_ms, 3)}
        self.receipt.attempts = [*self.receipt.attempts, attempt]

    # --- the end

    def _stop_early(self) -> None:
        """A stop string was found: the worker need not go on. What it found in its cache is known from its word with the first
        tokens, or else from the router.
        """
        if self._opened is not None:
            self._opened.cancel()
        self.account.settle()
        if self.account.early is None:
            self.receipt.num_cached_tokens = min(self._num_overlap_blocks * self._owner.block_size, len(self.tokens) - 1)
        self._end("stop")

    def end_without_worker(self) -> None:
        """There is nothing to generate."""
        self._owner.began(self)
        self._end("length")

    def _end(self, reason: str) -> None:
        end = self.choice.finish(reason)
        self._over("ok")
        self._owner.ended(self, end)

    def _abort(self, error: MeshserveError) -> None:
        if self._opened is not None:
            self._opened.cancel()
        self._fail(error)

    def _fail(self, error: MeshserveError) -> None:
        self._over(error.code)
        self._owner.failed(self, error)

    def cancel(self) -> None:
        """Nobody wants it any more. Harmless after its end."""
        if not self.is_over:
            self._over("cancelled")
            if self._search is not None:
                self._search.cancel()
                self._search = None
            if self._opened is not None:
                self._opened.cancel()

    def _over(self, outcome: str) -> None:
        self.account.close(self._last_s)
        self.is_over = True
        self.receipt.num_completion_tokens = self.choice.num_tokens
        if self._event_log.is_on:
            self._event_log.note(
                "result",
                self.request_id,
                outcome=outcome,
                num_tokens=self.num_tokens,
                num_prompt_tokens=len(self.tokens),
                num_cached_tokens=self.receipt.num_cached_tokens,
            )
