"""The router role: answers "which worker is best, and why" from what workers report and what routers send out."""

import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from meshserve.errors import InvalidRequest, NoWorker, ProtocolError
from meshserve.kv.hashes import block_hashes
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.watch import Watcher, WatchSource
from meshserve.observe.worker_report import REPORT_METHOD
from meshserve.routing.candidates import Prompt
from meshserve.routing.cost import CostSettings
from meshserve.routing.fleet import Fleet, Question
from meshserve.routing.policies import POLICIES
from meshserve.wire.booking import Booking
from meshserve.wire.generation import unpack_tokens
from meshserve.wire.hello import PeerInfo
from meshserve.wire.load import WorkerReport

_BOOKINGS_METHOD = "router.bookings"
_WORKERS = {"decode", "prefill"}


class RouterRole:
    """Serves `route`. Follows every worker that it can reach, and what other routers send them."""

    def __init__(self, mesh: Mesh, policy: str, settings: CostSettings | None = None) -> None:
        self._mesh, self._policy = mesh, policy
        self.fleet = Fleet(settings)
        self._workers: dict[str, Watcher] = {}
        self._routers: dict[str, Watcher] = {}
        self._bookings = WatchSource(mesh, _BOOKINGS_METHOD, lambda: ())  # what was booked before fades within two seconds
        mesh.levels.derive("bookings", lambda: self.fleet.num_bookings(time.monotonic()))
        mesh.levels.derive("booked_tokens", self.fleet.num_booked_tokens)
        mesh.serve("route", self._on_route)
        mesh.subscribe(self._on_change)
        if _WORKERS & set(mesh.own.roles):
            self._follow(mesh.incarnation)

    # --- following workers and other routers

    def _on_change(self, change: Change, member: Member) -> None:
        incarnation, roles = member.info.incarnation, set(member.info.roles)
        if change is Change.CALLABLE:
            if _WORKERS & roles:
                self._follow(incarnation)
            if "router" in roles and incarnation not in self._routers:
                self._routers[incarnation] = self._watch(incarnation, _BOOKINGS_METHOD, self._on_booking)
        elif change in (Change.DIED, Change.LEFT):
            self._forget(incarnation)

    def _follow(self, incarnation: str) -> None:
        if incarnation in self._workers:
            return
        self.fleet.join(incarnation, self._mesh.name_of(incarnation))

        def on_report(item: Any) -> None:
            self.fleet.report(incarnation, WorkerReport.from_wire(item), time.monotonic())

        self._workers[incarnation] = self._watch(incarnation, REPORT_METHOD, on_report, lambda: self.fleet.forget_blocks(incarnation))

    def _watch(self, peer: str, method: str, take: Callable[[Any], None], on_reset: Callable[[], None] = lambda: None) -> Watcher:
        def on_change(item: Any) -> None:
            try:
                take(item)
            except ProtocolError:
                self._mesh.counters.add("reports_malformed")

        return Watcher(self._mesh, peer, method, on_reset, on_change)

    def _on_booking(self, item: Any) -> None:
        self.fleet.hear(Booking.from_wire(item), time.monotonic())

    def _forget(self, incarnation: str) -> None:
        for watchers in (self._workers, self._routers):
            watcher = watchers.pop(incarnation, None)
            if watcher is not None:
                watcher.close()
        self.fleet.leave(incarnation)

    # --- answering

    def _on_route(self, call: IncomingCall) -> None:
        body = call.body
        if not isinstance(body, dict) or not isinstance(body.get("request_id"), str) or not isinstance(body.get("model"), str):
            raise ProtocolError("a question to a router names a request and a model")
        policy, session, excluded = body.get("policy") or self._policy, body.get("session") or "", body.get("excluded") or []
        if not isinstance(policy, str) or not isinstance(session, str):
            raise ProtocolError("a policy and a session are strings")
        if not isinstance(excluded, list) or not all(isinstance(incarnation, str) for incarnation in excluded):
            raise ProtocolError("excluded workers are a list of incarnations")
        if policy not in POLICIES:
            raise InvalidRequest(f"unknown policy {policy!r}; there are: {', '.join(POLICIES)}", param="meshserve.policy")
        for incarnation in excluded:
            self.fleet.unbook(incarnation, body["request_id"])
        is_local = isinstance(body.get("tokens"), array)  # from this very peer: nothing is packed, neither the question nor the answer
        tokens = body["tokens"] if is_local else unpack_tokens(body.get("tokens"))
        found = self._answer(body["request_id"], body["model"], tokens, policy, session, excluded)
        if not is_local:
            found.update({role: [candidate.to_wire() for candidate in found[role]] for role in ("decode", "prefill")})
        call.end(found)

    def _answer(
        self, request_id: str, model: str, tokens: "array[int]", policy: str, session: str, excluded: Sequence[str]
    ) -> dict[str, Any]:
        decode = self._able("decode", model, excluded)
        if not decode:
            raise NoWorker(f"no decode worker for the model {model!r} can take work now")
        card = decode[0].card
        assert card is not None
        prefill = [info for info in self._able("prefill", model, excluded) if info.card == card] if card.can_hand_over else []
        prompt = Prompt(len(tokens), card.block_size, block_hashes(tokens, card.block_size, card.model_hash))
        question = Question(request_id, prompt, self._followed(decode), self._followed(prefill), session)
        found = self.fleet.choose(policy, question, time.monotonic())
        if found.booking is not None and self._bookings.has_watchers:
            self._bookings.publish(found.booking.to_wire())
        return {"router": self._mesh.own.name, "policy": policy, "decode": found.decode, "prefill": found.prefill}

    def _able(self, role: str, model: str, excluded: Sequence[str]) -> list[PeerInfo]:
        serving = self._mesh.peers_serving(role, model)
        return [info for info in serving if info.incarnation not in excluded] if excluded else serving

    def _followed(self, infos: list[PeerInfo]) -> list[str]:
        for info in infos:
            self._follow(info.incarnation)
        return [info.incarnation for info in infos]

    def close(self) -> None:
        """Follow nobody any more."""
        for incarnation in [*self._workers, *self._routers]:
            self._forget(incarnation)
