"""What is measured: each row starts both systems, asks them in turn, and gives ratios with their intervals."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench.llama.client import Answer, closed_loop, complete, random_prompt
from bench.llama.handoff import handoff_1gbit
from bench.llama.memory import decode_memory
from bench.llama.servers import Ours, Theirs
from bench.systems import running
from meshserve.cli.bench.compare import ratio_of


@dataclass(frozen=True, slots=True)
class Size:
    """How long a row is measured."""

    pairs: int = 10
    minutes: float = 5.0
    prompt_every_s: float = 5.0
    """Of the row `separation`: from one long prompt to the next."""
    batches: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    """`n_batch` settings of their server, of which the best one counts."""


def batching(path: Path, size: Size, num_clients: int) -> dict[str, Any]:
    """One server on core 0, the client on core 1: 64 tokens in, 64 out, closed loop."""
    cells = max(512, 192 * num_clients)  # half more than the clients' sequences take
    theirs, ours = Theirs(path, 0, num_slots=num_clients, num_cells=cells), Ours(path, 0, None, num_cells=cells)
    found: dict[str, list[Any]] = {"theirs": [], "ours": []}
    with running([theirs, ours]):
        for pair in range(size.pairs):
            turns = [("theirs", theirs), ("ours", ours)]
            for name, system in turns if pair % 2 else turns[::-1]:
                found[name].append(asyncio.run(closed_loop(system.url, system.model, num_clients, 2, 64, 64, pair)))
    figures = {
        key: ratio_of([getattr(load, key) for load in found["ours"]], [getattr(load, key) for load in found["theirs"]]).to_dict()
        for key in ("tokens_per_s", "itl_p50_ms", "ttft_mean_ms")
    }
    medians = {name: round(median(load.tokens_per_s for load in loads), 1) for name, loads in found.items()}
    return {"clients": num_clients, "ratios": figures, "tokens_per_s": medians, "commands": [theirs.command, ours.command]}


@dataclass(slots=True)
class Interference:
    """What long prompts did to running streams."""

    longest_gap_ms: float
    """Of any stream in each window of the time between two prompts, median over the windows."""
    share_over_100_ms: float
    """Of the streams' time, spent in gaps above 100 ms."""
    itl_p50_ms: float
    ttft_mean_ms: float
    """Of the long prompts."""


async def interference(urls: list[str], model: str, duration_s: float, prompt_every_s: float, seed: int) -> Interference:
    """Four streams of 64 tokens in and 1,024 out, again and again, and 300-token prompts (16 out) between; servers take turns."""
    rng, ends_s, turn = random.Random(seed), time.monotonic() + duration_s, 0
    streams: list[Answer] = []
    prompts: list[Answer] = []

    def next_url() -> str:
        nonlocal turn
        turn += 1
        return urls[turn % len(urls)]

    async def stream() -> None:
        while time.monotonic() < ends_s:
            streams.append(await complete(next_url(), model, random_prompt(64, rng), 1024))

    async def ask() -> None:
        pending = []
        while time.monotonic() < ends_s:
            pending.append(asyncio.create_task(complete(next_url(), model, random_prompt(300, rng), 16)))
            await asyncio.sleep(prompt_every_s)
        prompts.extend(await asyncio.gather(*pending))

    began_s = time.monotonic()
    await asyncio.gather(*(stream() for _ in range(4)), ask())
    return _interference_of(streams, prompts, began_s, duration_s, prompt_every_s)


def _interference_of(
    streams: list[Answer], prompts: list[Answer], began_s: float, duration_s: float, prompt_every_s: float
) -> Interference:
    """A prompt comes in each window; streams that go on after the last one are left out."""
    pieces = [pair for answer in streams for pair in zip(answer.piece_s, answer.piece_s[1:], strict=False)]
    gaps = [(later - began_s, later - earlier) for earlier, later in pieces if later <= began_s + duration_s]
    windows: dict[int, float] = {}
    for at_s, gap_s in gaps:
        window = int(at_s / prompt_every_s)
        windows[window] = max(windows.get(window, 0.0), gap_s)
    total_s = sum(gap_s for _, gap_s in gaps)
    over_s = sum(gap_s for _, gap_s in gaps if gap_s > 0.1)
    return Interference(
        median(windows.values()) * 1000,
        over_s / total_s,
        median(gap_s for _, gap_s in gaps) * 1000,
        mean(answer.ttft_s for answer in prompts) * 1000,
    )


def separation(path: Path, size: Size) -> dict[str, Any]:
    """Two machines of one core: prefill and decode apart, against two servers taken in turn, at several batch sizes."""
    cells, duration_s, every_s = 8192, size.minutes * 60, size.prompt_every_s
    ours = Ours(path, 0, 1, num_cells=cells)
    with running([ours]):
        own = asyncio.run(interference([ours.url], ours.model, duration_s, every_s, 1))
    found: dict[str, Interference] = {}
    commands = [ours.command]
    for batch in (None, *size.batches):
        pair = [Theirs(path, core, num_slots=4, num_cells=cells, num_batch=batch) for core in (0, 1)]
        commands.append(pair[0].command)
        with running(pair):
            seconds = duration_s if batch is None else min(duration_s, 60.0)
            found[str(batch or "default")] = asyncio.run(interference([server.url for server in pair], "llama", seconds, every_s, 1))
    default = found["default"]
    best = min(
        (name for name, figures in found.items() if figures.ttft_mean_ms <= 1.3 * default.ttft_mean_ms),
        key=lambda name: found[name].longest_gap_ms,
    )
    return {
        "prompt_every_s": every_s,
        "ours": _rounded(own),
        "theirs": {name: _rounded(figures) for name, figures in found.items()},
        "best": best,
        "gap_ratio_best": round(own.longest_gap_ms / found[best].longest_gap_ms, 3),
        "gap_ratio_default": round(own.longest_gap_ms / default.longest_gap_ms, 3),
        "ttft_ratio_best": round(own.ttft_mean_ms / found[best].ttft_mean_ms, 3),
        "itl_ratio_best": round(own.itl_p50_ms / found[best].itl_p50_ms, 3),
        "commands": commands,
    }


def _rounded(found: Interference) -> dict[str, float]:
    return {name: round(getattr(found, name), 4) for name in ("longest_gap_ms", "share_over_100_ms", "itl_p50_ms", "ttft_mean_ms")}


def long_prompt(path: Path, size: Size) -> dict[str, Any]:
    """One prompt of 2,000 tokens on one core: time to the first token, against theirs at its defaults (f16 KV), and at our KV type."""
    theirs = {f"theirs_{kv_type}": Theirs(path, 0, num_slots=1, num_cells=4096, kv_type=kv_type) for kv_type in ("f16", "q8_0")}
    systems: dict[str, Theirs | Ours] = {**theirs, "ours": Ours(path, 0, None, num_cells=4096)}
    rng, times = random.Random(7), {name: list[float]() for name in systems}
    with running(list(systems.values())):
        for pair in range(max(2, size.pairs // 2)):
            turns = list(systems.items())
            for name, system in turns if pair % 2 else turns[::-1]:
                times[name].append(asyncio.run(complete(system.url, system.model, random_prompt(2000, rng), 2)).ttft_s)
    ratios = {name: ratio_of(times["ours"], times[name]).to_dict() for name in theirs}
    commands = [system.command for system in systems.values()]
    return {"ttft": ratios, "ttft_ms": {name: round(median(found) * 1000) for name, found in times.items()}, "commands": commands}


def second_turn(path: Path, size: Size) -> dict[str, Any]:
    """The second turn of a conversation of 1,500 tokens at the same worker: time to the first token against the first turn's."""
    ours, rng = Ours(path, 0, None, num_cells=8192), random.Random(8)
    first, second = [], []
    with running([ours]):
        for _ in range(max(2, size.pairs // 2)):
            prompt = random_prompt(1500, rng)
            first.append(asyncio.run(complete(ours.url, ours.model, prompt, 2)).ttft_s)
            second.append(asyncio.run(complete(ours.url, ours.model, prompt + random_prompt(12, rng), 2)).ttft_s)
    return {"ttft": ratio_of(second, first).to_dict(), "first_ms": round(median(first) * 1000), "second_ms": round(median(second) * 1000)}


ROWS: dict[str, Callable[[Path, Size], dict[str, Any]]] = {
    **{f"batch{count}": lambda path, size, count=count: batching(path, size, count) for count in (1, 4, 8)},  # type: ignore[misc]
    "separation": separation,
    "long_prompt": long_prompt,
    "second_turn": second_turn,
    "handoff_1gbit": lambda path, size: handoff_1gbit(path, size.pairs),
    "decode_memory": lambda path, size: decode_memory(path),
}
