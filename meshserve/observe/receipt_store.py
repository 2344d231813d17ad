"""Where receipts are kept: a processor's own, and a frontend's part of each. Bounded; rendered when somebody asks."""

import itertools
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import Any

from meshserve.errors import Cancelled
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipts import OK, Front, Receipt
from meshserve.telemetry import BUCKETS_S
from meshserve.wire.messages import FRONT_OF_RECEIPT, LATEST_RECEIPT, RECEIPT, RECENT_RECEIPTS

_MAX_CANDIDATES = 16
"""Of each role, kept of one request: the best are what "why" is about."""
MAX_RECENT = 50
"""Names of requests that one answer lists."""


class Receipts:
    """A processor's last ones, whatever they ended in. Keeping one costs an append; names are looked for among all, as few ask."""

    def __init__(self, mesh: Mesh, num_kept: int) -> None:
        self._mesh = mesh
        self._kept: deque[Receipt] = deque(maxlen=num_kept)
        self._over: list[Receipt] = []
        """Of this turn."""
        self._observed = tuple(mesh.histograms.named[name] for name in ("e2e", "route", "queue", "prefill"))
        """Of whole requests, and of phases."""
        self.on_kept: Callable[[Receipt], None] | None = None
        """Told of each one."""
        mesh.serve(RECEIPT, self._on_find)
        mesh.serve(LATEST_RECEIPT, self._on_latest)
        mesh.serve(RECENT_RECEIPTS, self._on_recent)

    def keep(self, receipt: Receipt) -> None:
        """One more request is over. It can be found from the end of this turn on: nobody waits for it before."""
        if not self._over:
            self._mesh.later(self._keep_all)
        self._over.append(receipt)

    def _keep_all(self) -> None:
        over, self._over = self._over, []
        now_s = time.monotonic()
        for receipt in over:
            receipt.keep_best(_MAX_CANDIDATES)
            receipt.ended_s = now_s
            self._kept.append(receipt)
            if receipt.outcome != OK:
                self._mesh.counters.add("requests_left" if receipt.outcome == Cancelled.code else "requests_failed")
                continue
            self._mesh.counters.add("requests_done")
            times = receipt.phases_ms
            for histogram, took_ms in zip(self._observed, (receipt.total_ms, times.route, times.queue, times.prefill), strict=True):
                # in line, as the loop runs four times for each request
                histogram.counts[bisect_left(BUCKETS_S, took_ms / 1000)] += 1
                histogram.sum_s += took_ms / 1000
        if self.on_kept is not None:
            for receipt in over:
                self.on_kept(receipt)

    def _on_find(self, call: IncomingCall) -> None:
        """By the mesh's name or the client's; the latest, if several are called the same. The end is None if there is none."""
        name: str = call.body
        kept = self._kept
        for receipt in reversed(kept):
            if receipt.request_id == name or receipt.client_id == name:
                call.end(self._render(receipt))
                return
        call.end(None)

    def _on_latest(self, call: IncomingCall) -> None:
        call.end(self._render(self._kept[-1]) if self._kept else None)

    def _on_recent(self, call: IncomingCall) -> None:
        """The mesh's names of the last ones, and how many seconds ago each ended; the latest first."""
        now_s = time.monotonic()
        latest = itertools.islice(reversed(self._kept), MAX_RECENT)
        call.end([(receipt.request_id, round(now_s - receipt.ended_s, 3)) for receipt in latest])

    def _render(self, receipt: Receipt) -> dict[str, Any]:
        return {**receipt.to_wire(), "ended_ago_s": round(time.monotonic() - receipt.ended_s, 3)}


class Fronts:
    """A frontend's part of its last requests, those included that got to no processor."""

    def __init__(self, mesh: Mesh, num_kept: int) -> None:
        self._mesh = mesh
        self._kept: deque[Front] = deque(maxlen=num_kept)
        mesh.serve(FRONT_OF_RECEIPT, self._on_find)

    def keep(self, front: Front) -> None:
        """One more request is over."""
        self._kept.append(front)

    def _on_find(self, call: IncomingCall) -> None:
        """The end is None, or `processor`, `front` (for `with_front`), and `receipt`: what a frontend alone knows."""
        name: str = call.body
        for front in reversed(self._kept):
            if front.request_id == name or front.client_id == name:
                call.end(self._render(front))
                return
        call.end(None)

    def _render(self, front: Front) -> dict[str, Any]:
        receipt = {**front.receipt().to_wire(), "ended_ago_s": round(time.monotonic() - front.ended_s, 3)}
        return {"processor": front.processor, "front": front.to_wire(self._mesh.own.name), "receipt": receipt}
