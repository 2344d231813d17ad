"""The generator looks at itself: what it took of a core, how late it was, how long its event loop hung."""

import asyncio
import time
from typing import Any

from meshserve.cli.bench.tally import Tally, fine_histogram
from meshserve.telemetry import Histogram

_PROBE_S = 0.02
_MAX_CPU_SHARE = 0.8
_MIN_LATE_MS, _MIN_LAG_MS = 1.0, 5.0
_MAX_SHARE_OF_LATENCY = 0.1
_MAX_SHARE_OFF_TRACE = 0.02
"""Texts are cut by characters, and a token has some of them on average."""


class SelfCheck:
    """Measures while a run goes on."""

    def __init__(self) -> None:
        self.late, self.lag = fine_histogram(), fine_histogram()
        """Of requests that were due: until the generator turned to them; of the event loop: beyond the time it was to come round."""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._cpu_s = self._began_s = self._expected_s = 0.0
        self.cpu_share = 0.0

    def start(self) -> None:
        """The window opens."""
        self._cpu_s, self._began_s = time.process_time(), time.monotonic()
        self._arm()

    def _arm(self) -> None:
        self._expected_s = time.monotonic() + _PROBE_S
        self._timer = self._loop.call_later(_PROBE_S, self._probe)

    def _probe(self) -> None:
        self.lag.observe(time.monotonic() - self._expected_s)
        self._arm()

    def stop(self) -> None:
        """The run is over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.cpu_share = (time.process_time() - self._cpu_s) / max(1e-9, time.monotonic() - self._began_s)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"cpu_share": round(self.cpu_share, 4), "late_ms": self.late.to_dict(), "loop_lag_ms": self.lag.to_dict()}


def _not_as_stated(tally: Tally) -> list[str]:
    """Where the lengths of a trace were not kept to."""
    found = []
    reasons = {"prompt": "--chars-per-token corrects it", "output": "the target ended answers early, as without --ignore-eos"}
    for what, advice in reasons.items():
        stated, seen = tally.stated_tokens[what], tally.stated_tokens[f"{what}_seen"]
        if abs(seen - stated) > _MAX_SHARE_OFF_TRACE * stated:
            found.append(f"{what} lengths are not those of the trace: {seen} tokens in all instead of {stated}; {advice}")
    return found


def findings(cpu_share: float, late: Histogram, lag: Histogram, tally: Tally) -> list[str]:
    """What a reader must know before they trust the figures; empty if there is nothing. Pure."""
    found = []
    if cpu_share > _MAX_CPU_SHARE:
        found.append(
            f"the generator was a bottleneck: it took {cpu_share:.0%} of a core, so rates are too low and latencies too high; "
            "lower the load, or start several and add them up"
        )
    latency_ms = tally.times["ttft"].quantile_ms(0.5)
    limit_ms = max(_MIN_LATE_MS, latency_ms * _MAX_SHARE_OF_LATENCY)
    if late.count and late.quantile_ms(0.99) > limit_ms:
        found.append(
            f"the generator sent late: 1 % of requests {late.quantile_ms(0.99):.1f} ms or more after they were due, "
            "as this machine was busy; it counts as latency and is not the target's"
        )
    limit_ms = max(_MIN_LAG_MS, latency_ms * _MAX_SHARE_OF_LATENCY)
    if lag.count and lag.quantile_ms(0.99) > limit_ms:
        found.append(f"the generator's event loop hung: 1 % of its turns came {lag.quantile_ms(0.99):.1f} ms or more too late")
    if tally.num_delayed:
        found.append(
            f"{tally.num_delayed} requests waited for others to end, as --max-open was reached; the wait is part of their latency (queue)"
        )
    if tally.num_unsent:
        found.append(
            f"{tally.num_unsent} requests were due and never sent, as --max-open was reached: latencies lack them, and are too low"
        )
    if tally.num_uncounted:
        found.append(
            f"the target did not say how many tokens {tally.num_uncounted} answers have (usage): their events are counted, "
            "and an event may have several tokens"
        )
    found += _not_as_stated(tally)
    if tally.num_errors:
        kinds = ", ".join(f"{count} {kind}" for kind, count in tally.errors.most_common(4))
        found.append(f"{tally.num_errors} requests failed ({kinds}); latencies are those of the others")
    return found
