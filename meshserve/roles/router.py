"""The router role: answers "which worker is best, and why" from what workers report and what it sent out itself."""

import asyncio
import time
from array import array
from collections.abc import Sequence
from typing import Any

from meshserve.errors import InvalidRequest, NoWorker, ProtocolError
from meshserve.kv.hashes import block_hashes
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.watch import Watcher
from meshserve.observe.worker_report import REPORT_METHOD
from meshserve.routing.candidates import Prompt
from meshserve.routing.fleet import Fleet, Question
from meshserve.routing.policies import POLICIES
from meshserve.wire.generation import unpack_tokens
from meshserve.wire.hello import PeerInfo
from meshserve.wire.load import WorkerReport


class RouterRole:
    """Serves `route`. Follows every worker that it can reach."""

    def __init__(self, mesh: Mesh, policy: str) -> None:
        self._mesh, self._policy = mesh, policy
        self._loop = asyncio.get_running_loop()
        self._fleet = Fleet()
        self._watchers: dict[str, Watcher] = {}
        mesh.serve("route", self._on_route)
        mesh.subscribe(self._on_change)
        if {"decode", "prefill"} & set(mesh.own.roles):
            self._follow(mesh.incarnation)

    # --- following workers

    def _on_change(self, change: Change, member: Member) -> None:
        incarnation = member.info.incarnation
        if not {"decode", "prefill"} & set(member.info.roles):
            return
        if change is Change.CALLABLE:
            self._follow(incarnation)
        elif change in (Change.DIED, Change.LEFT):
            self._forget(incarnation)

    def _follow(self, incarnation: str) -> None:
        if incarnation in self._watchers:
            return
        self._fleet.join(incarnation, self._mesh.name_of(incarnation))

        def on_change(item: Any) -> None:
            self._on_report(incarnation, item)

        self._watchers[incarnation] = Watcher(
            self._mesh, incarnation, REPORT_METHOD, lambda: self._fleet.forget_blocks(incarnation), on_change
        )

    def _on_report(self, incarnation: str, item: Any) -> None:
        try:
            report = WorkerReport.from_wire(item)
        except ProtocolError:
            self._mesh.counters.add("reports_malformed")
            return
        self._fleet.report(incarnation, report, time.monotonic())

    def _forget(self, incarnation: str) -> None:
        watcher = self._watchers.pop(incarnation, None)
        if watcher is not None:
            watcher.close()
        self._fleet.leave(incarnation)

    # --- answering

    def _on_route(self, call: IncomingCall) -> None:
        body = call.body
        if not isinstance(body, dict) or not isinstance(body.get("request_id"), str) or not isinstance(body.get("model"), str):
            raise ProtocolError("a question to a router names a request and a model")
        policy = body.get("policy") or self._policy
        if policy not in POLICIES:
            raise InvalidRequest(f"unknown policy {policy!r}; there are: {', '.join(POLICIES)}", param="meshserve.policy")
        excluded = body.get("excluded") or []
        tokens = unpack_tokens(body.get("tokens"))
        call.end(self._answer(body["request_id"], body["model"], tokens, policy, excluded))

    def _answer(self, request_id: str, model: str, tokens: "array[int]", policy: str, excluded: Sequence[str]) -> dict[str, Any]:
        decode = self._able("decode", model, excluded)
        if not decode:
            raise NoWorker(f"no decode worker for the model {model!r} can take work now")
        card = decode[0].card
        assert card is not None
        prefill = [info for info in self._able("prefill", model, excluded) if info.card == card]
        prompt = Prompt(len(tokens), card.block_size, block_hashes(tokens, card.block_size, card.model_hash))
        question = Question(request_id, prompt, self._followed(decode), self._followed(prefill))
        found = self._fleet.choose(policy, question, time.monotonic())
        return {
            "router": self._mesh.own.name,
            "policy": policy,
            "decode": [candidate.to_wire() for candidate in found.decode],
            "prefill": [[candidate.incarnation, candidate.load, candidate.overlap_blocks] for candidate in found.prefill],
        }

    def _able(self, role: str, model: str, excluded: Sequence[str]) -> list[PeerInfo]:
        return [
            info
            for info in self._mesh.peers_with(role)
            if info.card is not None and info.card.model == model and info.incarnation not in excluded
        ]

    def _followed(self, infos: list[PeerInfo]) -> list[str]:
        for info in infos:
            self._follow(info.incarnation)
        return [info.incarnation for info in infos]

    def close(self) -> None:
        """Follow nobody any more."""
        for incarnation in list(self._watchers):
            self._forget(incarnation)
