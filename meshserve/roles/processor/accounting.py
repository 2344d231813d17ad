"""Where one sequence's time goes: into its receipt, and into this peer's histograms of its worker."""

from collections.abc import Callable
from time import monotonic
from typing import Any

from meshserve.observe.receipts import Receipt, milliseconds
from meshserve.telemetry import Histograms, Phases

_NOTHING: dict[str, Any] = {}
_TTFT = ("ttft",)
_OF_HANDOFF = frozenset(("num_blocks", "num_bytes", "attempts", "prefill_peer"))
"""Said only of prompts that were computed elsewhere."""


class Account:
    """What a sequence is in is `route`, a `call` to a worker, or nothing. Of a call that ends well the worker says what it did; of any
    other it is known what the worker said before the first token.
    """

    __slots__ = ("_first_ms", "_first_s", "_histograms", "_name_of", "_now_in", "early", "gaps", "phases", "receipt")

    def __init__(self, receipt: Receipt, phases: Phases, histograms: Histograms | None, name_of: Callable[[str], str]) -> None:
        """`histograms` is None if nobody wants them, and has a part for each worker; `name_of` knows peers by their incarnation."""
        self.receipt, self.phases, self._histograms, self._name_of = receipt, phases, histograms, name_of
        self._now_in = ""
        self._first_ms = self._first_s = 0.0
        self.early = _NOTHING
        """What the worker said before the first token."""
        self.gaps: list[int] | None = None
        """From the first token on: the worker's counts of times between tokens, to which each later one adds itself."""

    def placed(self) -> None:
        """Its worker is found, and called now."""
        self.receipt.add("route", self.phases.end())
        self.enter("call")

    def enter(self, now_in: str) -> None:
        """From now on it is in this."""
        self._now_in = now_in
        self.early, self._first_s = _NOTHING, 0.0

    def first_token(self, worker: str) -> float:
        """The first one came, from the worker of this incarnation; returns when, on the monotonic clock."""
        phases, now_s = self.phases, monotonic()
        self._first_ms, self._first_s = (now_s - phases.last_s) * 1000, now_s
        if self._histograms is not None:
            self._histograms = of_worker = self._histograms.part(worker)
            of_worker.observe_all(_TTFT, (now_s - phases.began_s,))
            self.gaps = of_worker.counts_of("itl")
        return now_s

    def call_ended(self, account: dict[str, Any]) -> None:
        """The call ended well, with this account by its worker."""
        self._now_in = ""
        if self.early:
            early_phases, phases = self.early.get("phases_ms"), account.get("phases_ms")
            if isinstance(early_phases, dict) and isinstance(phases, dict):  # what was said once need not be said again
                account = {**self.early, **account, "phases_ms": {**early_phases, **phases}}
        self._take(account, self.phases.end())

    def settle(self) -> float:
        """What it was in is over, and nobody else accounts for it; returns its milliseconds. Harmless when it is in nothing."""
        was_in, self._now_in = self._now_in, ""
        if not was_in:
            return 0.0
        took_ms = self.phases.end()
        if was_in == "route":
            self.receipt.add("route", took_ms)
        elif not self._first_s:
            self.receipt.add("queue", took_ms)
        else:
            self._take(self.early or {"phases_ms": {"prefill": self._first_ms}}, self._first_ms)
            self.receipt.add("decode", took_ms - self._first_ms)
        return took_ms

    def close(self, last_s: float) -> None:
        """The sequence is over, whose last token came then."""
        if self._now_in:
            self.settle()
        if self._histograms is not None and self._first_s:
            self._histograms.add_to_sum("itl", last_s - self._first_s)

    def _take(self, account: dict[str, Any], caller_ms: float) -> None:
        """What the worker says of a call, or of its beginning, that took so long here."""
        receipt, phases = self.receipt, account.get("phases_ms")
        if isinstance(phases, dict):
            known_ms = receipt.phases_ms
            for phase, took_ms in phases.items():
                known_ms[phase] = known_ms.get(phase, 0.0) + milliseconds(took_ms)
        receipt.add("network", caller_ms - (milliseconds(account.get("total_ms")) or caller_ms))
        receipt.num_cached_tokens = int(milliseconds(account.get("num_cached_tokens")))
        if not _OF_HANDOFF.isdisjoint(account):
            self._take_handoff(account)

    def _take_handoff(self, account: dict[str, Any]) -> None:
        receipt, attempts, prefill = self.receipt, account.get("attempts"), account.get("prefill_peer")
        receipt.num_blocks, receipt.num_bytes = (int(milliseconds(account.get(name))) for name in ("num_blocks", "num_bytes"))
        receipt.attempts += [attempt for attempt in attempts if isinstance(attempt, dict)] if isinstance(attempts, list) else []
        receipt.peers["prefill"] = self._name_of(prefill) if isinstance(prefill, str) else None
