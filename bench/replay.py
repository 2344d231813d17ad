"""`python -m bench.replay TRACE --workers N --policy P[,P2..]`: a trace in virtual time, through the code that serves.

TRACE is a file in Mooncake's format, or NAME[:SEED] of a workload of `bench.workloads`. What is simulated, and what the router may know,
stands in `bench.simulator`. Defaults are those under which Dynamo's offline replay gave the figures that we compare with.
"""

import importlib
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.simulator import Cluster, Served, Simulation
from bench.summary import Summary, summarize
from bench.traces import TRACE_BLOCK_SIZE, TraceRequest, format_trace, parse_trace, read_trace
from bench.workloads import WORKLOADS, make_workload
from meshserve.engines.dummy.options import PROFILES
from meshserve.errors import UsageError
from meshserve.routing.fleet import Fleet
from meshserve.routing.policies import POLICIES

_ANY, _SOME, _RATE = click.IntRange(0), click.IntRange(1), click.FloatRange(0, min_open=True)


def replay(requests: Iterable[TraceRequest], cluster: Cluster, policy: str, seed: int = 0) -> Simulation:
    """Serve these requests by one policy, and return what came of it."""
    simulation = Simulation(cluster, policy, Fleet(rng=random.Random(seed)))
    simulation.run(requests)
    return simulation


def summary_of(simulation: Simulation) -> Summary:
    """The figures of one run."""
    return summarize(simulation.policy, simulation.worker_names, simulation.served)


def _with_progress(requests: Sequence[TraceRequest], label: str) -> Iterator[TraceRequest]:
    with click.progressbar(requests, label=f"{label:>14}", file=sys.stderr, hidden=not sys.stderr.isatty()) as shown:
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


def draw(served: Mapping[str, Sequence[Served]], path: Path) -> None:
    """Write distributions, a line for each policy. Raises ClickException if matplotlib is missing."""
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ImportError as exc:
        raise click.ClickException("--plot needs matplotlib: pip install 'meshserve[bench]'") from exc
    figure: Any = figures.Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (heading, name) in zip(figure.subplots(1, 2), (("time to first token", "ttft_ms"), ("latency", "latency_ms")), strict=True):
        for policy, found in served.items():
            ranked = sorted(getattr(one, name) for one in found)
            axes.plot(ranked, [(rank + 1) / len(ranked) for rank in range(len(ranked))], label=policy)
        axes.set(title=heading, xlabel="ms", ylabel="share of requests", xscale="log", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def _requests(trace: str, num_requests: int, block_size: int, speed: float) -> list[TraceRequest]:
    """A generated workload goes through the trace's own format, so that all block sizes work."""
    name, _, seed = trace.partition(":")
    if name not in WORKLOADS:
        return read_trace(Path(trace), block_size, speed)[: num_requests or None]
    return parse_trace(format_trace(make_workload(name, int(seed or 0), num_requests or 4000)), block_size, speed)


def _policies(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    policies = value.split(",")
    for policy in policies:
        if policy not in POLICIES:
            raise click.BadParameter(f"{policy!r} is none of {', '.join(POLICIES)}")
    return policies


@click.command()
@click.argument("trace")
@click.option("--workers", type=_SOME, default=4, show_default=True, help="Decode workers; with no --prefill they prefill too.")
@click.option("--prefill", type=_ANY, default=0, show_default=True, help="Prefill workers; none is aggregated serving.")
@click.option("--kv-gbps", type=_RATE, default=10.0, show_default=True, help="Network between prefill and decode workers.")
@click.option("--kv-bytes-per-token", type=_ANY, default=131_072, show_default=True, help="What goes over it: 128 KiB for an 8B Llama 3.")
@click.option("--policy", "policies", default="kv", show_default=True, callback=_policies, help="One, or several with commas between.")
@click.option("--blocks", type=_SOME, default=2048, show_default=True, help="KV blocks of each worker.")
@click.option("--block-size", type=_SOME, default=TRACE_BLOCK_SIZE, show_default=True, help="Tokens a block; a divisor of the trace's 512.")
@click.option("--speed", type=_RATE, default=1.0, show_default=True, help="Replay so many times as fast.")
@click.option("--profile", type=click.Choice(sorted(PROFILES)), default="reference", show_default=True, help="Whose timing.")
@click.option("--requests", "num_requests", type=_ANY, default=0, help="Only the first so many.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the distributions of TTFT and latency here.")
@click.option("--seed", default=0, show_default=True, help="Of the policies that draw lots.")
@click.option("--json", "as_json", is_flag=True, help="A list with one object per policy.")
def main(
    trace: str,
    workers: int,
    prefill: int,
    kv_gbps: float,
    kv_bytes_per_token: int,
    policies: list[str],
    blocks: int,
    block_size: int,
    speed: float,
    profile: str,
    num_requests: int,
    plot: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Replay TRACE and print what each policy makes of it."""
    try:
        requests = _requests(trace, num_requests, block_size, speed)
    except (UsageError, OSError, ValueError) as exc:  # ValueError: a seed that is no number, a file that is no text
        raise click.UsageError(str(exc)) from exc
    cluster = Cluster(workers, blocks, block_size, PROFILES[profile], prefill, kv_gbps, kv_bytes_per_token)
    simulations = [replay(_with_progress(requests, policy), cluster, policy, seed) for policy in policies]
    summaries = [summary_of(simulation) for simulation in simulations]
    if plot is not None:
        draw({simulation.policy: simulation.served for simulation in simulations}, plot)
    if as_json:
        click.echo(json.dumps([found.to_dict() for found in summaries], indent=1))
        return
    Console(width=None if sys.stdout.isatty() else 130).print(_table(summaries))
    if any(simulation.num_refused for simulation in simulations):
        click.echo(f"{simulations[0].num_refused} prompts fit on no worker and were refused")


if __name__ == "__main__":
    main()
