"""`python -m bench.replay TRACE --workers N --policy P[,P2..]`: a trace in virtual time, through the code that serves.

TRACE is a file in Mooncake's format, or the name of a workload of `bench.workloads`. What is simulated, and what the router may know,
stands in `bench.simulator`. Defaults are those under which Dynamo's offline replay gave the figures that we compare with.
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bench.simulator import Cluster, Simulation
from bench.summary import Summary, summarize
from bench.traces import TRACE_BLOCK_SIZE, TraceRequest, read_trace
from meshserve.engines.dummy.timing import PROFILES
from meshserve.errors import UsageError
from meshserve.routing.fleet import Fleet
from meshserve.routing.policies import POLICIES


def replay(requests: Sequence[TraceRequest], cluster: Cluster, policy: str, seed: int = 0, is_shown: bool = False) -> Summary:
    """Serve these requests by one policy. With `is_shown`, a progress bar on stderr where that is a terminal."""
    simulation = Simulation(cluster, policy, Fleet(rng=random.Random(seed)))
    if is_shown:
        simulation.run(_with_progress(requests, policy))
    else:
        simulation.run(requests)
    return summarize(policy, simulation.worker_names, simulation.served)


def _with_progress(requests: Sequence[TraceRequest], label: str) -> Iterator[TraceRequest]:
    with click.progressbar(requests, label=f"{label:>14}", file=sys.stderr) as shown:
        yield from shown


def _table(summaries: Sequence[Summary]) -> Table:
    table = Table(title=f"{summaries[0].requests} requests, {summaries[0].workers} workers")
    for heading in ("policy", "reuse", "TTFT mean", "p50", "p90", "p99", "latency mean", "p50", "p90", "p99", "share min..max"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for found in summaries:
        times = [f"{value:,.0f}" for times in (found.ttft_ms, found.latency_ms) for value in (times.mean, times.p50, times.p90, times.p99)]
        shares = found.share.values()
        table.add_row(found.policy, f"{found.prefix_reuse:.4f}", *times, f"{min(shares):.3f}..{max(shares):.3f}")
    return table


def _policies(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    policies = value.split(",")
    for policy in policies:
        if policy not in POLICIES:
            raise click.BadParameter(f"{policy!r} is none of {', '.join(POLICIES)}")
    return policies


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--workers", default=4, show_default=True, help="Decode workers; with no --prefill they prefill too.")
@click.option("--policy", "policies", default="kv", show_default=True, callback=_policies, help="One, or several with commas between.")
@click.option("--blocks", default=2048, show_default=True, help="KV blocks of each worker.")
@click.option("--block-size", default=TRACE_BLOCK_SIZE, show_default=True, help="Tokens a block; a divisor of the trace's 512.")
@click.option("--speed", default=1.0, show_default=True, help="Replay so many times as fast.")
@click.option("--profile", type=click.Choice(sorted(PROFILES)), default="reference", show_default=True, help="Whose timing.")
@click.option("--seed", default=0, show_default=True, help="Of the policies that draw lots.")
@click.option("--json", "as_json", is_flag=True, help="A list with one object per policy.")
def main(
    trace: Path,
    workers: int,
    policies: list[str],
    blocks: int,
    block_size: int,
    speed: float,
    profile: str,
    seed: int,
    as_json: bool,
) -> None:
    """Replay TRACE and print what each policy makes of it."""
    try:
        requests = read_trace(trace, block_size, speed)
    except UsageError as exc:
        raise click.UsageError(str(exc)) from exc
    cluster = Cluster(workers, blocks, block_size, PROFILES[profile])
    summaries = [replay(requests, cluster, policy, seed, is_shown=True) for policy in policies]
    if as_json:
        click.echo(json.dumps([found.to_dict() for found in summaries], indent=1))
    else:
        Console().print(_table(summaries))


if __name__ == "__main__":
    main()
