"""The processor role: owns a request from the frontend's call to its last token.

It keeps what is needed to go on elsewhere (prompt, sampling, seed), asks a router which worker, sends the request there, and turns
tokens into text. A worker that is lost before its first token is replaced by another; nothing was given out, so nothing is lost.
"""

import itertools
import random
from typing import Any

from meshserve.errors import GaveUp, InvalidRequest, MeshserveError, NoWorker, PeerLost, PeerSilent, ProtocolError
from meshserve.mesh.calls import IncomingCall, OutgoingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipts import Receipt
from meshserve.roles.processor.detokenizing import Detokenizer
from meshserve.roles.processor.models import Models
from meshserve.roles.processor.stopping import StopChecker
from meshserve.routing.candidates import Candidate
from meshserve.telemetry import Phases
from meshserve.wire.completion import CompletionRequest
from meshserve.wire.generation import GenerateRequest, pack_tokens

_ROUTE_TIMEOUT_S = 2.0
_MAX_ATTEMPTS = 4
_RETRIED_CODES = frozenset(("peer_lost", "peer_silent", "link_overflow", "draining", "no_worker", "unknown_method"))
"""Errors that say nothing about the request itself: another worker may do."""


class _Request:
    """One request on its way. Steps are callbacks: a request costs no task, and a token costs no task switch."""

    def __init__(self, role: "ProcessorRole", call: IncomingCall, request: CompletionRequest) -> None:
        self._role, self._call, self._request = role, call, request
        self._phases = Phases()
        self.request_id = request.request_id
        self._card = role.models.card(request.model)
        self._tokens = role.models.encode(request, self._card)
        self._sampling = role.models.sampling(request, self._card, len(self._tokens), role.draw_seed())
        self._detokenizer = Detokenizer(role.models.tokenizer(self._card).token_bytes)
        self._stops = StopChecker(request.stop)
        self._receipt = Receipt(self.request_id, request.client_id, request.model, num_prompt_tokens=len(self._tokens))
        self._receipt.peers["processor"] = role.name
        self._excluded: list[str] = []
        self._candidates: list[Candidate] = []
        self._prefill_peers: tuple[tuple[str, int, int], ...] = ()
        self._lost: list[str] = []
        """Names of workers that died with this request."""
        self._opened: OutgoingCall | None = None
        self.worker: str | None = None
        """Incarnation of the decode worker that has the request now."""
        self.num_tokens = 0
        self._receipt.add("process", self._phases.end("process"))
        self._journal = role.mesh.journal
        if self._journal.is_on:
            self._journal.note("submit", self.request_id, num_tokens=len(self._tokens))
        self._is_followed = self._journal.follows(self.request_id)

    # --- which worker

    def route(self) -> None:
        """Ask a router; without one, take the next worker in turn."""
        self.worker = None
        router = self._role.router()
        if router is None:
            self._route_without_router()
            return
        question = {
            "request_id": self.request_id,
            "model": self._request.model,
            "tokens": pack_tokens(self._tokens),
            "policy": self._request.policy,
            "excluded": self._excluded,
        }
        try:
            self._opened = self._role.mesh.open(router, "route", question, _Answer(self.routed, self.route_failed), _ROUTE_TIMEOUT_S)
        except PeerLost:
            self._route_without_router()

    def routed(self, answer: Any) -> None:
        """The router's answer."""
        try:
            candidates = [Candidate.from_wire(item) for item in answer["decode"]]
            prefill = tuple((str(peer), int(queued), int(overlap_blocks)) for peer, queued, overlap_blocks in answer["prefill"])
            router, policy = str(answer["router"]), str(answer["policy"])
        except (ProtocolError, KeyError, TypeError, ValueError):
            self._role.mesh.counters.add("router_answers_malformed")
            self._route_without_router()
            return
        self._receipt.peers["router"], self._receipt.policy = router, policy
        self._prefill_peers = prefill
        self._dispatch(candidates)

    def route_failed(self, error: MeshserveError) -> None:
        """The router has no worker, or is lost itself."""
        if isinstance(error, (NoWorker, InvalidRequest)):
            self._fail(error)
        else:
            self._route_without_router()

    def _route_without_router(self) -> None:
        candidates = self._role.take_turns(self._request.model, self._excluded)
        if not candidates:
            self._fail(NoWorker(f"no decode worker for the model {self._request.model!r} can take work now"))
            return
        self._receipt.policy = "round-robin (no router)"
        self._dispatch(candidates)

    # --- the worker's stream

    def _dispatch(self, candidates: list[Candidate]) -> None:
        self._receipt.add("route", self._phases.end("route"))
        self._candidates = candidates
        self._receipt.candidates = [candidate.for_receipt() for candidate in candidates]
        chosen = candidates[0]
        self.worker = chosen.incarnation
        self._receipt.peers["decode"] = chosen.peer
        if self._is_followed:
            self._note_routed(chosen)
        request = GenerateRequest(
            self.request_id, self._request.model, self._tokens, self._sampling, 0, self._prefill_peers, tuple(self._lost)
        )
        remaining_s = self._role.remaining_s(self._call)
        body = request if chosen.incarnation == self._role.mesh.incarnation else request.to_wire()
        try:
            self._opened = self._role.mesh.open(chosen.incarnation, "generate", body, self, remaining_s)
        except PeerLost as error:
            self._retry_or_fail(error)

    def _note_routed(self, chosen: Candidate) -> None:
        receipt = self._receipt
        router, policy, candidates = receipt.peers["router"], receipt.policy, receipt.candidates
        self._journal.note("routed", self.request_id, decode=chosen.incarnation, router=router, policy=policy, candidates=candidates)

    def on_item(self, item: Any) -> None:
        """Tokens of one step, after their position; or the name of a prefill worker that died with this request."""
        if isinstance(item, str):
            self._lost.append(item)
            return
        if not isinstance(item, list) or len(item) < 2 or item[0] != self.num_tokens:
            self._abort(ProtocolError("a worker's tokens do not follow each other"))
            return
        tokens = item[1:]
        if self._is_followed:
            self._journal.note("tokens", self.request_id, position=self.num_tokens, count=len(tokens), decode=self.worker)
        self.num_tokens += len(tokens)
        text, is_stopped = self._stops.feed(self._detokenizer.feed(tokens))
        self._call.send(text)
        if is_stopped:
            self._stop_early()

    def on_end(self, value: Any) -> None:
        """The worker is done."""
        text, is_stopped = self._stops.feed(self._detokenizer.finish())
        tail = text if is_stopped else text + self._stops.finish()
        if tail:
            self._call.send(tail)
        account = value if isinstance(value, dict) else {}
        self._account(account)
        self._end("stop" if is_stopped or account.get("reason") == "stop" else "length")

    def on_error(self, error: MeshserveError) -> None:
        """The worker failed, or was lost."""
        if error.code == PeerLost.code:
            self._lost.append(self._receipt.peers["decode"] or "a worker")
        self._retry_or_fail(error)

    def _retry_or_fail(self, error: MeshserveError) -> None:
        """Nothing given out yet means that another may start over, unless the request itself seems to be what takes workers down."""
        self._note_attempt(error)
        can_retry = self.num_tokens == 0 and error.code in _RETRIED_CODES and len(self._receipt.attempts) < _MAX_ATTEMPTS
        if can_retry and len(self._lost) >= self._role.max_lost_peers:
            names = ", ".join(self._lost)
            self._fail(GaveUp(f"this request took down {names}; it is tried nowhere else", lost_peers=self._lost))
        elif can_retry and self.worker is not None:
            self._role.mesh.counters.add("requests_rerouted")
            self._excluded.append(self.worker)
            self.route()
        else:
            self._fail(error)

    def worker_suspected(self) -> None:
        """Its worker fell silent. What has not begun there is taken elsewhere; what has may still go on."""
        if self.num_tokens == 0 and self._opened is not None:
            self._opened.cancel()
            self.on_error(PeerSilent("the worker fell silent"))

    def _note_attempt(self, error: MeshserveError) -> None:
        name = self._role.mesh.name_of(self.worker or "")
        self._receipt.attempts.append({"peer": name, "role": "decode", "outcome": error.code, "tokens": self.num_tokens})
        self._receipt.add("other", self._phases.end("lost"))

    # --- the end

    def _account(self, account: dict[str, Any]) -> None:
        receipt = self._receipt
        caller_ms = self._phases.end("decode_call")
        for phase, milliseconds in (account.get("phases_ms") or {}).items():
            receipt.add(str(phase), float(milliseconds))
        receipt.add("network", caller_ms - float(account.get("total_ms") or caller_ms))
        receipt.num_cached_tokens = int(account.get("num_cached_tokens") or 0)
        receipt.num_blocks, receipt.num_bytes = int(account.get("num_blocks") or 0), int(account.get("num_bytes") or 0)
        receipt.attempts += account.get("attempts") or []
        prefill = account.get("prefill_peer")
        receipt.peers["prefill"] = self._role.mesh.name_of(prefill) if isinstance(prefill, str) else None

    def _stop_early(self) -> None:
        """A stop string was found: the worker need not go on."""
        if self._opened is not None:
            self._opened.cancel()
        self._receipt.add("decode", self._phases.end("decode"))
        self._end("stop")

    def _end(self, reason: str) -> None:
        self._ended("ok")
        self._receipt.num_completion_tokens = self.num_tokens
        usage = [len(self._tokens), self.num_tokens, self._receipt.num_cached_tokens]
        receipt = self._receipt.to_wire(self._phases.total_ms()) if self._request.wants_receipt else None
        self._call.end([reason, usage, receipt])

    def _abort(self, error: MeshserveError) -> None:
        if self._opened is not None:
            self._opened.cancel()
        self._fail(error)

    def _fail(self, error: MeshserveError) -> None:
        self._ended(error.code)
        self._call.fail(error)

    def _ended(self, outcome: str) -> None:
        self._role.ended(self)
        if self._journal.is_on:
            prompt = {"num_prompt_tokens": len(self._tokens), "num_cached_tokens": self._receipt.num_cached_tokens}
            self._journal.note("result", self.request_id, outcome=outcome, num_tokens=self.num_tokens, **prompt)

    def cancel(self) -> None:
        """The client is gone."""
        self._ended("cancelled")
        if self._opened is not None:
            self._opened.cancel()


class _Answer:
    """The sink of a router's answer."""

    __slots__ = ("on_end", "on_error")

    def __init__(self, on_end: Any, on_error: Any) -> None:
        self.on_end, self.on_error = on_end, on_error

    def on_item(self, item: Any) -> None:
        """Routers send none."""


class ProcessorRole:
    """Serves `complete`: items are text, the end is [finish reason, [prompt, completion and cached tokens], receipt or None]."""

    def __init__(self, mesh: Mesh, max_lost_peers: int) -> None:
        self.mesh, self.max_lost_peers = mesh, max_lost_peers
        self.models = Models(mesh)
        self._running: dict[str, _Request] = {}
        self._turn = itertools.count()
        self._rng = random.Random()
        mesh.serve("complete", self._on_complete)
        mesh.subscribe(self._on_change)

    @property
    def name(self) -> str:
        """This peer's."""
        return self.mesh.own.name

    @property
    def is_idle(self) -> bool:
        """No request is under way."""
        return not self._running

    def draw_seed(self) -> int:
        """For a request that names none."""
        return self._rng.getrandbits(62)

    def remaining_s(self, call: IncomingCall) -> float:
        """Until the request's deadline."""
        return max(0.001, call.deadline_s - self.mesh.now_s())

    def router(self) -> str | None:
        """The router to ask: this peer's own, else any."""
        routers = self.mesh.peers_with("router")
        return routers[0].incarnation if routers else None

    def take_turns(self, model: str, excluded: list[str]) -> list[Candidate]:
        """Without a router: live workers of this model, each time another one first."""
        serving = [info for info in self.mesh.peers_with("decode") if info.card is not None and info.card.model == model]
        able = [info for info in serving if info.incarnation not in excluded]
        start = next(self._turn) % len(able) if able else 0
        return [
            Candidate(info.incarnation, self.mesh.name_of(info.incarnation), 0, 0, 0.0, 0.0, "its turn; there is no router")
            for info in able[start:] + able[:start]
        ]

    def _on_complete(self, call: IncomingCall) -> None:
        request = call.body if isinstance(call.body, CompletionRequest) else CompletionRequest.from_wire(call.body)
        if request.request_id in self._running:
            raise InvalidRequest("a request of this id is under way")
        running = _Request(self, call, request)
        self._running[running.request_id] = running
        call.on_cancel = running.cancel
        running.route()

    def ended(self, request: _Request) -> None:
        """No longer under way."""
        self._running.pop(request.request_id, None)

    def _on_change(self, change: Change, member: Member) -> None:
        if change is Change.SUSPECTED and "decode" in member.info.roles:
            for request in [running for running in self._running.values() if running.worker == member.info.incarnation]:
                request.worker_suspected()
