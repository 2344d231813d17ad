"""`python -m bench.robustness [--json]`: `kv` against `least-loaded` where nobody tuned it.

All workloads of `bench.workloads`, with a seed that nothing else here uses, on few and many workers with small and large caches at
light and heavy load. What is asked of `kv`: where there is nothing to share it must not be worse, where there is it must win.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import click
from rich.console import Console
from rich.table import Table

from bench.replay import replay, summary_of
from bench.simulator import Cluster
from bench.workloads import WORKLOADS, make_workload
from meshserve.engines.dummy.options import PROFILES

_SEED = 20_24
_WORKLOAD_WORKERS = 4
"""The workloads' own pace gives about so many workers something to do."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One cell of the matrix."""

    workload: str
    workers: int
    blocks: int
    load: float
    """Times the workload's own pace, per worker."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it: `kv` over `least-loaded`."""

    setting: Setting
    ttft_ratio: float
    latency_ratio: float
    p99_ratio: float
    reuse: float
    least_loaded_reuse: float
    least_loaded_ttft_ms: float
    max_share: float
    """Requests of the busiest worker, against the mean."""


def compare(setting: Setting, num_requests: int) -> Comparison:
    """Both policies on the same requests."""
    requests = make_workload(setting.workload, _SEED, num_requests, setting.load * setting.workers / _WORKLOAD_WORKERS)
    cluster = Cluster(setting.workers, setting.blocks, 512, PROFILES["reference"])
    ours, theirs = (summary_of(replay(requests, cluster, policy)) for policy in ("kv", "least-loaded"))
    return Comparison(
        setting,
        round(ours.ttft_ms.mean / theirs.ttft_ms.mean, 4),
        round(ours.latency_ms.mean / theirs.latency_ms.mean, 4),
        round(ours.ttft_ms.p99 / theirs.ttft_ms.p99, 4),
        ours.prefix_reuse,
        theirs.prefix_reuse,
        theirs.ttft_ms.mean,
        round(max(ours.share.values()) * setting.workers, 3),
    )


def settings(workers: list[int], blocks: list[int], loads: list[float]) -> Iterator[Setting]:
    """The matrix, workload by workload."""
    return itertools.starmap(Setting, itertools.product(WORKLOADS, workers, blocks, loads))


@click.command()
@click.option("--workers", default="2,8,32", show_default=True)
@click.option("--blocks", default="1024,4096", show_default=True, help="KV blocks of 512 tokens, of each worker.")
@click.option("--loads", default="0.5,1,1.5", show_default=True, help="Times the workloads' own pace.")
@click.option("--requests", default=1500, show_default=True, help="For each worker count; more workers get no more.")
@click.option("--json", "as_json", is_flag=True)
def main(workers: str, blocks: str, loads: str, requests: int, as_json: bool) -> None:
    """Compare both policies in every cell of the matrix."""
    cells = list(settings([int(n) for n in workers.split(",")], [int(n) for n in blocks.split(",")], [float(n) for n in loads.split(",")]))
    with click.progressbar(cells, file=sys.stderr, hidden=not sys.stderr.isatty()) as shown:
        found = [compare(cell, requests) for cell in shown]
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=1))
        return
    table = Table("workload", "workers", "blocks", "load", "TTFT", "latency", "p99", "reuse", "(least-loaded)", "TTFT ms", "busiest")
    for one in found:
        cell = one.setting
        table.add_row(
            cell.workload,
            str(cell.workers),
            str(cell.blocks),
            f"{cell.load:g}",
            f"{one.ttft_ratio:.3f}",
            f"{one.latency_ratio:.3f}",
            f"{one.p99_ratio:.3f}",
            f"{one.reuse:.3f}",
            f"{one.least_loaded_reuse:.3f}",
            f"{one.least_loaded_ttft_ms:,.0f}",
            f"{one.max_share:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 130).print(table)


if __name__ == "__main__":
    main()
