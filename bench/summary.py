"""What a simulated run showed, in the figures that references give: reuse, times to the first token, latencies, shares."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bench.simulator import Served


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution of times in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quantiles":
        """Nearest-rank quantiles; all 0 where there are no values."""
        ranked = sorted(values) or [0.0]
        p50, p90, p99 = (ranked[min(len(ranked) - 1, int(len(ranked) * share))] for share in (0.5, 0.9, 0.99))
        return cls(*(round(value, 3) for value in (sum(ranked) / len(ranked), p50, p90, p99)))


@dataclass(frozen=True, slots=True)
class Summary:
    """One policy's figures: what `--json` prints of it."""

    policy: str
    workers: int
    requests: int
    prefix_reuse: float
    """Share of all prompt tokens that were found in a cache."""
    ttft_ms: Quantiles
    latency_ms: Quantiles
    share: dict[str, float]
    """Of the requests, per worker that tokens came from."""

    def to_dict(self) -> dict[str, object]:
        """For `--json`."""
        return asdict(self)


def summarize(policy: str, workers: Sequence[str], served: Sequence[Served]) -> Summary:
    """The figures of one run."""
    num_tokens = sum(one.request.num_tokens for one in served)
    counts = Counter(one.worker for one in served)
    return Summary(
        policy,
        len(workers),
        len(served),
        round(sum(one.num_cached_tokens for one in served) / max(1, num_tokens), 4),
        Quantiles.of([one.ttft_ms for one in served]),
        Quantiles.of([one.latency_ms for one in served]),
        {worker: round(counts[worker] / max(1, len(served)), 4) for worker in workers},
    )
