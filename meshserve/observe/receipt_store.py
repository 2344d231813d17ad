"""Where receipts are kept, by processors and frontends, and how a request's receipt is found, wherever in the mesh it is. Bounded."""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, TypeVar

from meshserve.errors import Cancelled, MeshserveError, ProtocolError, RequestNotFound
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipts import OK, PHASES, FrontendReceipt, Receipt, with_frontend
from meshserve.wire.messages import FRONTEND_RECEIPT, LATEST_RECEIPT, RECEIPT, RECENT_RECEIPTS, Method
from meshserve.wire.observing import ReceiptForm

_TIMEOUT_S = 2.0
_MAX_CANDIDATES = 16
"""Of each role, kept of one request: the best ones say why. A mesh may have hundreds of workers."""
_MAX_UNCOUNTED = 256
_MAX_RECENT = 50
"""Names of requests that one answer lists."""

Kept = TypeVar("Kept", Receipt, FrontendReceipt)


class Receipts:
    """A processor's last receipts, whatever the requests ended in. To keep one costs an append; names are looked for among all, as few
    ask."""

    def __init__(self, mesh: Mesh, num_kept: int, on_kept: Callable[[Receipt], None] | None = None) -> None:
        """`on_kept` is told of each receipt."""
        self._mesh, self._on_kept = mesh, on_kept
        self._kept: deque[Receipt] = deque(maxlen=num_kept)
        self._over: list[Receipt] = []
        """Of this turn."""
        self._done: list[Receipt] = []
        """Their times are still to be counted in histograms."""
        self._num_ended = {"requests_done": 0, "requests_failed": 0, "requests_left": 0}
        for name in self._num_ended:
            mesh.counters.derive(name, partial(self._num_ended.__getitem__, name))
        mesh.histograms.before_reading.append(self._count_times)
        mesh.serve(RECEIPT, lambda call: call.end(_rendered(_find(self._kept, call.body))))
        mesh.serve(LATEST_RECEIPT, lambda call: call.end(_rendered(self._kept[-1] if self._kept else None)))
        mesh.serve(RECENT_RECEIPTS, self._on_recent)

    def keep(self, receipt: Receipt) -> None:
        """One more request is over. Its receipt can be found from the end of this turn on: nobody waits for it before."""
        if not self._over:
            self._mesh.turn.later(self._keep_all)
        self._over.append(receipt)

    def _keep_all(self) -> None:
        over, self._over = self._over, []
        now_s = time.monotonic()
        for receipt in over:
            receipt.ended_s = now_s
            if len(receipt.candidates) > _MAX_CANDIDATES:
                receipt.candidates = receipt.candidates[:_MAX_CANDIDATES]
            if len(receipt.prefill_candidates) > _MAX_CANDIDATES:
                receipt.prefill_candidates = receipt.prefill_candidates[:_MAX_CANDIDATES]
            if receipt.outcome == OK:
                self._num_ended["requests_done"] += 1
                self._done.append(receipt)
            else:
                self._num_ended["requests_left" if receipt.outcome == Cancelled.code else "requests_failed"] += 1
        self._kept.extend(over)
        if len(self._done) >= _MAX_UNCOUNTED:
            self._count_times()
        if self._on_kept is not None:
            for receipt in over:
                self._on_kept(receipt)

    def _count_times(self) -> None:
        """Many at once cost a quarter of one by one, and no request waits for it."""
        done, self._done = self._done, []
        named = self._mesh.histograms.named
        named["e2e"].observe_all([receipt.total_ms / 1000 for receipt in done])
        for phase in ("route", "queue", "prefill"):
            phase_ms = attrgetter(phase)
            named[phase].observe_all([phase_ms(receipt.phases_ms) / 1000 for receipt in done])

    def _on_recent(self, call: IncomingCall) -> None:
        now_s = time.monotonic()
        latest = itertools.islice(reversed(self._kept), _MAX_RECENT)
        call.end([(receipt.request_id, round(now_s - receipt.ended_s, 3)) for receipt in latest])


class FrontendReceipts:
    """A frontend's part of its last requests, those included that got to no processor."""

    def __init__(self, mesh: Mesh, num_kept: int) -> None:
        self._mesh = mesh
        self._kept: deque[FrontendReceipt] = deque(maxlen=num_kept)
        self.keep: Callable[[FrontendReceipt], None] = self._kept.append
        """To be called when a request is over."""
        mesh.serve(FRONTEND_RECEIPT, self._on_find)

    def _on_find(self, call: IncomingCall) -> None:
        found = _find(self._kept, call.body)
        if found is None:
            call.end(None)
        else:
            part, receipt = found.to_wire(self._mesh.own.name), found.receipt()
            name = found.started_over.name if found.started_over is not None else call.body
            call.end({"processor": found.processor, "name": name, "frontend": part, "receipt": _rendered(receipt)})


def _find(kept: deque[Kept], name: str) -> Kept | None:
    """By the mesh's name or the client's; the latest, if several have the same name."""
    return next((found for found in reversed(kept) if name in found.names), None)


def _rendered(receipt: Receipt | None) -> dict[str, Any] | None:
    if receipt is None:
        return None
    return {**receipt.to_wire(), "ended_ago_s": round(time.monotonic() - receipt.ended_s, 3)}


# --- a receipt, wherever it is


async def find_receipt(mesh: Mesh, name: str) -> dict[str, Any]:
    """Of the request of this name, the mesh's or the client's own. Raises RequestNotFound.

    The mesh's name begins with the frontend that took the request in, and that one knows the processor. Without it, all processors
    are asked. Of what got to none, or to one that is gone, the frontend knows its own part.
    """
    answer = await _frontend_receipt_of(mesh, name)
    known = [answer["processor"]] if answer is not None and answer.get("processor") else _with_role(mesh, "processor")
    name_there = str(answer.get("name") or name) if answer is not None else name
    found = _latest(await _ask_all(mesh, known, RECEIPT, name_there))
    if found is None:
        answers = [answer] if answer is not None else await _ask_all(mesh, _with_role(mesh, "frontend"), FRONTEND_RECEIPT, name)
        found = _latest(each.get("receipt") for each in answers if each is not None)
        if found is None:
            words = "it is still under way, or not among the last that are kept"
            raise RequestNotFound(f"no receipt of a request {name!r}: {words}", param="id")
    return await _completed(mesh, found, answer)


async def latest_receipt(mesh: Mesh) -> dict[str, Any]:
    """Of the request that ended last. Raises RequestNotFound if none did."""
    found = _latest(await _ask_all(mesh, _with_role(mesh, "processor"), LATEST_RECEIPT, None))
    if found is None:
        raise RequestNotFound("no processor of this mesh has a receipt: nothing was asked yet, or they run with --no-observe", param="id")
    return await _completed(mesh, found, None)


async def recent_requests(mesh: Mesh) -> list[str]:
    """Names of those that ended last, the latest first; up to as many as one processor lists."""
    answers = await _ask_all(mesh, _with_role(mesh, "processor"), RECENT_RECEIPTS, None)
    entries = [entry for answer in answers for entry in (answer or ())[:_MAX_RECENT]]
    return [name for name, _ in sorted(entries, key=itemgetter(1))][:_MAX_RECENT]


async def _completed(mesh: Mesh, receipt: dict[str, Any], answer: dict[str, Any] | None) -> dict[str, Any]:
    """With the part of the frontend that took the request in, if there was one and it is still there."""
    if answer is None:
        answer = await _frontend_receipt_of(mesh, receipt["request_id"])
    part = answer.get("frontend") if answer is not None else None
    return with_frontend(receipt, part) if isinstance(part, dict) else receipt


async def _frontend_receipt_of(mesh: Mesh, request_id: str) -> dict[str, Any] | None:
    owner = mesh.info_of(request_id.partition("-")[0])
    if owner is None or "frontend" not in owner.roles:
        return None
    (answer,) = await _ask_all(mesh, [owner.incarnation], FRONTEND_RECEIPT, request_id)
    found: dict[str, Any] | None = answer
    return found


def _with_role(mesh: Mesh, role: str) -> list[str]:
    """Draining peers too: they still have their receipts."""
    infos = [mesh.own, *(member.info for member in mesh.links.membership.listed())]
    return [info.incarnation for info in infos if role in info.roles]


def _latest(answers: Iterable[Any]) -> dict[str, Any] | None:
    """By how long ago each says that it ended, on its own clock."""
    return min(filter(_is_receipt, answers), key=lambda receipt: float(receipt["ended_ago_s"]), default=None)


def _is_receipt(answer: Any) -> bool:
    """What others send is checked here, once, so that what is shown needs no doubts. Fields that a newer peer added are shown too."""
    try:
        return ReceiptForm.from_wire(answer).phases_ms.keys() >= set(PHASES)
    except ProtocolError:
        return False


async def _ask_all(mesh: Mesh, peers: list[str], method: Method, body: Any) -> list[Any]:
    """None from a peer that is lost, does not answer, or keeps nothing."""

    async def ask(peer: str) -> Any:
        try:
            return await mesh.call(peer, method, body, _TIMEOUT_S)
        except MeshserveError:
            return None

    return await asyncio.gather(*map(ask, peers))
