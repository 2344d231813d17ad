"""The router role: answers "which worker is best, and why" from what workers report and what it sent out itself."""

import asyncio
import random
import time
from array import array
from collections.abc import Sequence
from typing import Any

from meshserve.errors import InvalidRequest, NoWorker, ProtocolError
from meshserve.kv.hashes import block_hashes
from meshserve.kv.index import PrefixIndex
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.watch import Watcher
from meshserve.observe.worker_report import REPORT_METHOD
from meshserve.routing.bookings import Bookings
from meshserve.routing.candidates import Candidate, Worker
from meshserve.routing.policies import POLICIES, Prompt, rank, rank_prefill
from meshserve.wire.card import ModelCard
from meshserve.wire.generation import unpack_tokens
from meshserve.wire.hello import PeerInfo
from meshserve.wire.load import WorkerReport

MAX_CANDIDATES = 8
"""Named in an answer: enough to go on to when the first is lost."""


class RouterRole:
    """Serves `route`. Follows every worker that it can reach."""

    def __init__(self, mesh: Mesh, policy: str) -> None:
        self._mesh, self._policy = mesh, policy
        self._loop = asyncio.get_running_loop()
        self._index = PrefixIndex()
        self._workers: dict[str, Worker] = {}
        self._watchers: dict[str, Watcher] = {}
        self._bookings = Bookings()
        self._rng = random.Random()
        self._num_choices = 0
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
        self._workers[incarnation] = Worker(incarnation, self._mesh.name_of(incarnation))

        def on_change(item: Any) -> None:
            self._on_report(incarnation, item)

        self._watchers[incarnation] = Watcher(self._mesh, incarnation, REPORT_METHOD, lambda: self._index.forget(incarnation), on_change)

    def _on_report(self, incarnation: str, item: Any) -> None:
        try:
            report = WorkerReport.from_wire(item)
        except ProtocolError:
            self._mesh.counters.add("reports_malformed")
            return
        self._workers[incarnation].load = report.load
        self._index.evicted(incarnation, report.evicted)
        self._index.stored(incarnation, report.stored)
        for request_id in report.admitted:
            self._bookings.end(incarnation, request_id)

    def _forget(self, incarnation: str) -> None:
        watcher = self._watchers.pop(incarnation, None)
        if watcher is not None:
            watcher.close()
        self._workers.pop(incarnation, None)
        self._index.forget(incarnation)

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
        now_s = time.monotonic()
        self._bookings.expire(now_s)
        decode = self._able("decode", model, excluded)
        if not decode:
            raise NoWorker(f"no decode worker for the model {model!r} can take work now")
        card = decode[0].card
        assert card is not None
        prompt = Prompt(len(tokens), card.block_size)
        hashes = block_hashes(tokens, card.block_size, card.model_hash)
        ranked = self._rank(policy, prompt, hashes, decode)
        prefill = self._rank_prefill(prompt, hashes, card, model, excluded)
        self._book(ranked[0], request_id, prompt)
        return {
            "router": self._mesh.own.name,
            "policy": policy,
            "decode": [candidate.to_wire() for candidate in ranked[:MAX_CANDIDATES]],
            "prefill": [[candidate.incarnation, candidate.load, candidate.overlap_blocks] for candidate in prefill[:MAX_CANDIDATES]],
        }

    def _able(self, role: str, model: str, excluded: Sequence[str]) -> list[PeerInfo]:
        return [
            info
            for info in self._mesh.peers_with(role)
            if info.card is not None and info.card.model == model and info.incarnation not in excluded
        ]

    def _rank(self, policy: str, prompt: Prompt, hashes: list[int], infos: list[PeerInfo]) -> list[Candidate]:
        workers = [self._worker(info.incarnation) for info in infos]
        return rank(policy, prompt, workers, self._index.overlaps(hashes, [info.incarnation for info in infos]), self._rng)

    def _rank_prefill(self, prompt: Prompt, hashes: list[int], card: ModelCard, model: str, excluded: Sequence[str]) -> list[Candidate]:
        infos = [info for info in self._able("prefill", model, excluded) if info.card == card]
        workers = [self._worker(info.incarnation) for info in infos]
        return rank_prefill(prompt, workers, self._index.overlaps(hashes, [info.incarnation for info in infos]))

    def _worker(self, incarnation: str) -> Worker:
        if incarnation not in self._workers:
            self._follow(incarnation)
        return self._workers[incarnation]

    def _book(self, chosen: Candidate, request_id: str, prompt: Prompt) -> None:
        self._num_choices += 1
        worker = self._workers[chosen.incarnation]
        worker.last_chosen = self._num_choices
        uncached = max(1, prompt.num_tokens - chosen.overlap_blocks * prompt.block_size)
        self._bookings.book(worker, request_id, uncached, time.monotonic())

    def close(self) -> None:
        """Follow nobody any more."""
        for incarnation in list(self._watchers):
            self._forget(incarnation)
