"""`python -m bench.agreement [--aiperf DIRECTORY] [--json]`: whether `meshserve bench` sees what others see, on the same target in turn.

The targets are paced meshes of this machine. Requests per second of a closed loop are compared with wrk's; times to the first token and,
our TPOT with its ITL (which it averages over each request), with those of NVIDIA's AIPerf, from PyPI into a virtual environment in
DIRECTORY. That is an open loop, Poisson at the same rate: in a closed one each asks again in step with the engine, a moment after it
was answered, and that moment, which is each generator's own, comes off the wait for the next step. Where ours takes 0.1 ms and AIPerf
2 ms, it sees a TTFT that is 2 ms shorter, of the same server.
"""

import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench import wrk
from bench.systems import MeshSystem, running
from bench.venvs import ensure
from bench.wrk import Scenario
from meshserve.cli.bench.compare import Ratio, ratio_of

_TOKENS = 16
_CLOSED_STEP_MS, _OPEN_STEP_MS = 10.0, 50.0
"""Short, so that a turn has many answers of each client: at its ends it misses half of one. Long, so that a time to the first token, of one
to two steps, is of the size that servers of large models have, to which what a busy generator adds, some milliseconds, is little."""
_PROMPT_TOKENS = 70
"""As many bytes as a prompt of 32 tokens has that AIPerf makes with the tiny tokenizer; the target's prefill takes no time."""
_QUANTILES = ("p50", "p90", "p99")
_BOUND = 0.05
AGREES, UNDECIDED, DIFFERS = "agrees", "may or may not agree", "DIFFERS"
AIPERF = "aiperf==0.13.0"

Figures = dict[str, float]


def by_bench(url: str, seconds: float, *load: str) -> Figures:
    """What `meshserve bench` sees, as its users run it."""
    command = [sys.executable, "-m", "meshserve", "bench", url, "--json", "--ignore-eos", *load]
    command += ["--output-tokens", str(_TOKENS), "--prompt-tokens", str(_PROMPT_TOKENS), "--duration", f"{seconds:g}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode:
        raise click.ClickException(f"meshserve bench failed: {done.stderr.strip()[-300:]}")
    run = json.loads(done.stdout)["runs"][0]
    times = {f"{name} {quantile}": run[f"{field}_ms"][quantile] for name, field in _TIMES.items() for quantile in _QUANTILES}
    return {"requests/s": run["requests_per_s"], "errors": sum(run["errors"].values()), **times}


_TIMES = {"TTFT": "ttft", "TPOT": "tpot", "end to end": "e2e"}
_AIPERF_TIMES = {"TTFT": "time_to_first_token", "TPOT": "inter_token_latency", "end to end": "request_latency"}


def by_wrk(url: str, num_clients: int, seconds: float) -> Figures:
    """What wrk sees."""
    found = wrk.load(url, "dummy", Scenario("agreement", _TOKENS, True, num_clients), seconds)
    return {"requests/s": found.requests_per_s, "errors": found.num_errors}


def by_aiperf(python: Path, directory: Path, url: str, rate: float, seconds: float) -> Figures:
    """What AIPerf sees of its times. Raises ClickException with its last words."""
    with tempfile.TemporaryDirectory() as artifacts:
        command = [str(python.with_name("aiperf")), "profile", "--model", "dummy", "--url", url]
        command += ["--endpoint-type", "completions", "--streaming"]
        command += ["--tokenizer", str(directory / "tiny"), "--benchmark-duration", f"{seconds:g}"]
        command += ["--request-rate", f"{rate:g}", "--arrival-pattern", "poisson"]
        command += ["--synthetic-input-tokens-mean", "32", "--output-tokens-mean", str(_TOKENS), "--output-tokens-stddev", "0"]
        command += ["--extra-inputs", f"max_tokens:{_TOKENS}", "--extra-inputs", "ignore_eos:true", "--use-server-token-count"]
        # its processes share this machine's cores with the target
        command += ["--workers-max", "1", "--record-processors", "1", "--no-server-metrics", "--no-gpu-telemetry"]
        command += ["--warmup-request-count", f"{max(1.0, rate):.0f}", "--ui", "none", "--artifact-dir", artifacts]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 180, check=False)
        exported = sorted(Path(artifacts).rglob("profile_export_aiperf.json"))
        if done.returncode or not exported:
            raise click.ClickException(f"aiperf failed: {(done.stderr.strip() or done.stdout.strip())[-600:]}")
        seen = json.loads(exported[0].read_text())
    return {f"{name} {quantile}": seen[field][quantile] for name, field in _AIPERF_TIMES.items() for quantile in _QUANTILES}


def compare(ours: Callable[[], Figures], theirs: Callable[[], Figures], num_pairs: int, told: Callable[[str], None]) -> dict[str, Any]:
    """In turn, the first drawn by lot: the ratio of each figure that both have, and whether it is within 5 %."""
    pairs: list[tuple[Figures, Figures]] = []
    rng = random.Random(0)
    for number in range(num_pairs):
        told(f"pair {number + 1} of {num_pairs}")
        if rng.random() < 0.5:
            own = ours()
            pairs.append((own, theirs()))
        else:
            other = theirs()
            pairs.append((ours(), other))
    found = {}
    for name in pairs[0][0].keys() & pairs[0][1].keys() - {"errors"}:
        ratio = ratio_of([own[name] for own, _ in pairs], [other[name] for _, other in pairs])
        found[name] = {
            "ours": round(sorted(own[name] for own, _ in pairs)[num_pairs // 2], 4),
            "theirs": round(sorted(other[name] for _, other in pairs)[num_pairs // 2], 4),
            **ratio.to_dict(),
            "verdict": verdict(ratio),
        }
    return dict(sorted(found.items()))


def with_wrk(clients: int, seconds: float, num_pairs: int, told: Callable[[str], None]) -> dict[str, Any]:
    """A closed loop of so many clients."""
    target = MeshSystem(_CLOSED_STEP_MS)
    with running([target]):
        return compare(
            lambda: by_bench(target.url, seconds, "--concurrency", str(clients)),
            lambda: by_wrk(target.url, clients, seconds),
            num_pairs,
            lambda what: told(f"wrk, {what}"),
        )


def with_aiperf(python: Path, directory: Path, rate: float, seconds: float, num_pairs: int, told: Callable[[str], None]) -> dict[str, Any]:
    """An open loop of so many requests a second."""
    target = MeshSystem(_OPEN_STEP_MS)
    seeds = itertools.count(1)  # else all turns of ours had the same arrivals, and the interval knew nothing of their chance
    with running([target]):
        return compare(
            lambda: by_bench(target.url, seconds, "--rate", f"{rate:g}", "--seed", str(next(seeds))),
            lambda: by_aiperf(python, directory, target.url, rate, seconds),
            num_pairs,
            lambda what: told(f"AIPerf, {what}"),
        )


def verdict(ratio: Ratio) -> str:
    """By the whole interval: noise alone neither passes for agreement nor for a difference. Pure."""
    if ratio.low >= 1 - _BOUND and ratio.high <= 1 + _BOUND:
        return AGREES
    return DIFFERS if ratio.low > 1 + _BOUND or ratio.high < 1 - _BOUND else UNDECIDED


def _show(peer: str, found: dict[str, Any]) -> None:
    for name, figures in found.items():
        interval = f"95 % interval {figures['low']:.3f} to {figures['high']:.3f}"
        values = f"{figures['ours']:10.3f} {figures['theirs']:10.3f}  ratio {figures['median']:.3f}"
        click.echo(f"{peer:8} {name:16} {values} ({interval})  {figures['verdict']}")


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--aiperf", "directory", type=click.Path(path_type=Path), default=None, help="Compare with AIPerf too, installed there.")
@click.option("--clients", default=4, show_default=True, help="Of the closed loop.")
@click.option("--rate", default=40.0, show_default=True, help="Requests a second of the open loop.")
@click.option("--pairs", default=10, show_default=True, help="Alternations; half as many with AIPerf, which starts slowly, and 6 at least.")
@click.option("--seconds", default=8.0, show_default=True, help="Of each turn; three times as long with AIPerf, for its percentiles.")
def main(as_json: bool, directory: Path | None, clients: int, rate: float, pairs: int, seconds: float) -> None:
    """Compare, and print ratios; exit code 1 if the whole interval of one lies beyond 5 %."""

    def told(what: str) -> None:
        click.echo(f"{what} ...", err=True)

    python = ensure(directory.resolve(), [AIPERF]) if directory is not None else None
    found = {"wrk": with_wrk(clients, seconds, pairs, told)}
    if python is not None and directory is not None:
        found["aiperf"] = with_aiperf(python, directory.resolve(), rate, 3 * seconds, max(6, pairs // 2), told)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        for peer, figures in found.items():
            _show(peer, figures)
    if any(figures["verdict"] == DIFFERS for peer in found.values() for figures in peer.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
