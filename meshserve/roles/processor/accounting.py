"""Where one sequence's time goes: into its receipt, and into this peer's histograms of its worker."""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from meshserve.observe.receipts import Receipt
from meshserve.telemetry import Histograms, Phases
from meshserve.wire.generation import HandedOver, WorkerAccount, handed_over_in


@dataclass(slots=True, eq=False)
class Account:
    """Of a call to a worker that ends well the worker says what it did; of any other it is known what the
    worker said with the first tokens.
    """

    receipt: Receipt
    phases: Phases
    histograms: Histograms | None
    """With a part for each worker; None if nobody wants them."""
    name_of: Callable[[str], str]
    """A peer's name, by incarnation."""
    now_in: str = ""
    """`route`, `call` (to a worker), or nothing."""
    early: Any = None
    """What the worker said with the first token, unread: mostly its end says it all."""
    gaps: dict[int, int] | None = None
    """From the first token on: the worker's counts of times between tokens, to which each later one adds
    itself."""
    _first_ms: float = 0.0
    _first_s: float = 0.0

    def first_token(self, worker: str) -> float:
        """The first one came, from the worker of this incarnation; returns when, on the monotonic clock."""
        phases, now_s = self.phases, monotonic()
        self._first_ms, self._first_s = (now_s - phases.last_s) * 1000, now_s
        if self.histograms is not None:
            self.histograms = of_worker = self.histograms.parts[worker]
            of_worker.named["ttft"].observe(now_s - phases.began_s)
            self.gaps = of_worker.named["itl"].counts
        return now_s

    def call_ended(self, account: Any) -> None:
        """The call ended well, with this account by its worker."""
        self.now_in = ""
        said = WorkerAccount.from_wire(account)
        self._take(said, self.phases.end())
        if said.handed_over is None and self.early is not None:  # said once, it need not be said again
            self._take_handed_over(handed_over_in(self.early))

    def settle(self) -> float:
        """What it was in is over, and nobody else accounts for it; returns its milliseconds. Harmless when it is in nothing."""
        was_in, self.now_in = self.now_in, ""
        if not was_in:
            return 0.0
        took_ms = self.phases.end()
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
