"""Where the time of one sequence goes."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from meshserve.observe.receipts import Receipt
from meshserve.telemetry import BUCKETS_S, Histograms
from meshserve.wire.generation import HandedOver, WorkerAccount, handed_over_in


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
    moved: dict[str, Any] | None = None
    """The continuation that is under way, as the receipt will show it."""
    _of_worker: Histograms | None = None
    """From the first token on: the worker's part of `histograms`."""
    _first_ms: float = 0.0
    _first_s: float = 0.0
    """Of the call to the worker that has the sequence now; 0 before its first token."""
    _is_continued: bool = False
    """A worker was lost after it had generated tokens."""

    def end_phase(self) -> float:
        """All since the last phase was one phase; returns its milliseconds."""
        last_s, self.last_s = self.last_s, monotonic()
        return (self.last_s - last_s) * 1000

    def first_token(self, worker: str) -> float:
        """The first one came, from the worker of this incarnation; returns when, on the monotonic clock."""
        now_s = monotonic()
        self._first_ms, self._first_s = (now_s - self.last_s) * 1000, now_s
        if self.histograms is not None:
            self._of_worker = of_worker = self.histograms.parts[worker]
            if not self._is_continued:
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

    def leave(self, worker: str, outcome: str, num_tokens: int, last_s: float) -> None:
        """The worker of this name has the sequence no more, whose last token came then. What follows is another worker's."""
        took_ms = self.settle()
        attempt = {"peer": worker, "role": "decode", "outcome": outcome, "tokens": num_tokens, "ms": round(took_ms, 3)}
        self.receipt.attempts = [*self.receipt.attempts, attempt]
        self._is_continued = self._is_continued or self._first_s > 0
        self.close(last_s)
        self.early = self.gaps = self._of_worker = None
        self._first_s = 0.0

    def go_on(self, pause_ms: float) -> None:
        """Another worker gave its first token, so long after the last one of the worker that was lost."""
        if self.moved is not None:
            moved = {**self.moved, "to": self.receipt.decode, "pause_ms": round(pause_ms, 3)}
            self.receipt.continuations, self.moved = [*self.receipt.continuations, moved], None

    def close(self, last_s: float) -> None:
        """The sequence is over, or its worker lost, whose last token came then."""
        if self.now_in:
            self.settle()
        if self._of_worker is not None:
            self._of_worker.named["itl"].sum_s += last_s - self._first_s

    def _take(self, said: WorkerAccount, caller_ms: float) -> None:
        """What the worker says of a call, or of its beginning, that took so long here."""
        receipt, phases_ms = self.receipt, self.receipt.phases_ms
        phases_ms.queue += said.queue_ms
        phases_ms.prefill += said.prefill_ms
        phases_ms.kv_transfer += said.kv_transfer_ms
        phases_ms.decode += said.decode_ms
        phases_ms.network += max(0.0, caller_ms - (said.total_ms or caller_ms))
        if not self._is_continued:  # later workers find output in their caches too
            receipt.num_cached_tokens = said.num_cached_tokens
        receipt.decision = said.decision
        if said.handed_over is not None:
            self._take_handed_over(said.handed_over)

    def _take_handed_over(self, found: HandedOver | None) -> None:
        if found is not None:
            receipt = self.receipt
            receipt.num_blocks += found.num_blocks
            receipt.num_bytes += found.num_bytes
            receipt.attempts = [*receipt.attempts, *found.attempts]
            receipt.prefill = self.name_of(found.prefill_peer) if found.prefill_peer is not None else None
