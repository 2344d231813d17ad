"""What peers are doing: rates, shares and percentiles from their counters. Pure."""

from collections import deque
from dataclasses import dataclass
from typing import Any

from meshserve.observe.latencies import WINDOW_S
from meshserve.telemetry import Histogram

_RATE_WINDOW_S, _SHARE_WINDOW_S = 3.0, float(WINDOW_S)
"""Rates are of a few seconds, so that they follow the load; shares and percentiles of more, as they need many requests."""
_MAX_SAMPLES = 120
_MAX_TREND = 400


@dataclass(frozen=True, slots=True)
class Activity:
    """What one peer is doing. None: the peer does not report it."""

    peer: dict[str, Any]
    """As `list_peers` gives it."""
    num_running: int | None = None
    num_waiting: int | None = None
    num_tickets: int | None = None
    used_share: float | None = None
    """Of the KV pool: what running sequences hold."""
    cached_share: float | None = None
    hit_share: float | None = None
    """Of prompt tokens: those whose KV was there."""
    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    ttft_ms: tuple[float, float] | None = None
    """Median and 99th percentile: a worker's are those of what it served, a processor's those of all that came to it."""
    itl_ms: tuple[float, float] | None = None


class Samples:
    """The latest statuses of all peers."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, dict[str, dict[str, Any]]]] = deque(maxlen=_MAX_SAMPLES)
        self.trend: deque[float] = deque(maxlen=_MAX_TREND)
        """Tokens a second of the whole mesh, one value a sample."""

    def add(self, peers: list[dict[str, Any]], now_s: float) -> list[Activity]:
        """Take the latest list of peers; returns what they are doing, in the same order."""
        while self._samples and now_s - self._samples[0][0] > _SHARE_WINDOW_S:
            self._samples.popleft()
        self._samples.append((now_s, {peer["incarnation"]: peer for peer in peers if peer["rtt_ms"] is not None}))
        activities = [self._activity(peer, now_s) for peer in peers]
        self.trend.append(sum(activity.tokens_per_s or 0.0 for activity in activities))
        return activities

    def _activity(self, peer: dict[str, Any], now_s: float) -> Activity:
        if peer["rtt_ms"] is None:
            return Activity(peer)
        ttft, itl = (self._percentiles_ms(peer, name) for name in ("ttft", "itl"))
        load = peer["load"]
        if not load:
            return Activity(peer, ttft_ms=ttft, itl_ms=itl)
        num_blocks = load.get("num_blocks", 0)
        return Activity(
            peer,
            load.get("num_running"),
            load.get("num_waiting"),
            load.get("num_tickets"),
            load.get("used_blocks", 0) / num_blocks if num_blocks else None,
            load.get("cached_blocks", 0) / num_blocks if num_blocks else None,
            self._hit_share(peer),
            self._rate(peer, ("tokens_generated",), now_s),
            self._rate(peer, ("prompt_tokens", "prefill_tokens"), now_s),
            ttft,
            itl,
        )

    def _earlier(self, incarnation: str, since_s: float) -> tuple[float, dict[str, Any]] | None:
        """The oldest sample of a peer since then; None if there is only the last one."""
        for at_s, peers in self._samples:
            if at_s >= since_s and incarnation in peers:
                return (at_s, peers[incarnation]) if at_s < self._samples[-1][0] else None
        return None

    def _rate(self, peer: dict[str, Any], counters: tuple[str, ...], now_s: float) -> float | None:
        earlier = self._earlier(peer["incarnation"], now_s - _RATE_WINDOW_S)
        if earlier is None:
            return None
        at_s, then = earlier
        return max(0, _sum(peer, counters) - _sum(then, counters)) / (now_s - at_s)

    def _hit_share(self, peer: dict[str, Any]) -> float | None:
        """Of the last seconds; of all time if there was no prompt in them."""
        totals, cached = ("prompt_tokens", "prefill_tokens"), ("prompt_tokens_cached", "prefill_tokens_cached")
        earlier = self._earlier(peer["incarnation"], float("-inf"))
        num_tokens, num_cached = _sum(peer, totals), _sum(peer, cached)
        if earlier is not None and num_tokens > _sum(earlier[1], totals):
            num_tokens, num_cached = num_tokens - _sum(earlier[1], totals), num_cached - _sum(earlier[1], cached)
        return min(1.0, max(0.0, num_cached / num_tokens)) if num_tokens > 0 else None

    def _percentiles_ms(self, peer: dict[str, Any], name: str) -> tuple[float, float] | None:
        found = _latencies(peer).get(name)
        if found is None:
            return None
        earlier = self._earlier(peer["incarnation"], float("-inf"))
        before = _latencies(earlier[1]).get(name) if earlier is not None else None
        recent = Histogram.of_row(found).since(Histogram.of_row(before) if before is not None else None)
        return (recent.quantile_ms(0.5), recent.quantile_ms(0.99)) if recent.counts else None


def _latencies(peer: dict[str, Any]) -> dict[str, Any]:
    served: dict[str, Any] | None = peer["latencies"]
    own: dict[str, Any] = peer["histograms"]
    return own if served is None else served


def _sum(peer: dict[str, Any], counters: tuple[str, ...]) -> int:
    return sum(peer["counters"].get(name, 0) for name in counters)


def sparkline(values: list[float], width: int) -> str:
    """The last `width` values as small bars, the highest of them full."""
    bars = "▁▂▃▄▅▆▇█"
    shown = values[-width:] if width > 0 else []
    most = max(shown, default=0.0)
    return "".join(bars[min(len(bars) - 1, int(value / most * len(bars)))] if most > 0 else bars[0] for value in shown)
