"""Distributions of times to the first token and of latencies, a line for each policy. Needs matplotlib (`pip install meshserve[bench]`)."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from bench.simulator import Served


def draw(served: Mapping[str, Sequence[Served]], path: Path) -> None:
    """Write a picture in the format that the file's name says. Raises ClickException where matplotlib is missing."""
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
