"""`python -m bench.index [--json]`: how long a router takes to look up a prompt, and to decide where it goes.

A million blocks on 64 workers: documents of 256 blocks, each held by 1 to 8 workers from the start on up to somewhere. The prompts
have 64 blocks of them, followed by new ones from a random place on. Beside it, where `ai-dynamo-runtime` is installed, the same
lookups in Dynamo's RadixTree, in turns, so that whatever else the machine does happens to both.
"""

import importlib
import json
import random
import statistics
import time
import tracemalloc
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import click

from meshserve.cli.bench.compare import ratio_of
from meshserve.kv.pool import PrefixIndex
from meshserve.routing.fleet import Fleet, Question
from meshserve.routing.workers import Prompt
from meshserve.wire.routing import WorkerLoad, WorkerReport

_BLOCK_SIZE = 16
_DOCUMENT_BLOCKS = 256
_PROMPT_BLOCKS = 64
_NUM_WORKERS = 64
_WORKERS = [f"{number:032x}" for number in range(_NUM_WORKERS)]
"""Incarnations are as long as this."""

Holding = tuple[int, "array[int]"]
"""A worker's number, and the hashes that it holds of one document."""


def make_holdings(rng: random.Random, num_blocks: int) -> tuple[list["array[int]"], list[Holding]]:
    """Documents with so many blocks in all, and who holds how much of each."""
    documents = [array("Q", (rng.getrandbits(64) for _ in range(_DOCUMENT_BLOCKS))) for _ in range(num_blocks // _DOCUMENT_BLOCKS)]
    holdings = []
    for document in documents:
        first, *others = rng.sample(range(_NUM_WORKERS), rng.choice((1, 1, 1, 2, 2, 3, 8)))
        holdings.append((first, document))
        holdings += [(other, document[: rng.randrange(1, _DOCUMENT_BLOCKS)]) for other in others]
    return documents, holdings


def make_prompts(rng: random.Random, documents: Sequence["array[int]"], num_prompts: int) -> list[list[int]]:
    """Each the beginning of a document, and from somewhere on new."""
    prompts = []
    for _ in range(num_prompts):
        known = rng.randrange(_PROMPT_BLOCKS + 1)
        prompts.append([*rng.choice(documents)[:known], *(rng.getrandbits(64) for _ in range(_PROMPT_BLOCKS - known))])
    return prompts


def build_index(holdings: Sequence[Holding]) -> tuple[PrefixIndex, float]:
    """The index, and the bytes that a block in it takes: those of its dict and of all its numbers, the hash included."""
    index = PrefixIndex()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for worker, hashes in holdings:
        index.stored(_WORKERS[worker], hashes)
    size_bytes = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return index, size_bytes / max(1, len(index))


def build_radix_tree(holdings: Sequence[Holding]) -> Any:
    """Dynamo's, with the same blocks; None where its package is not installed."""
    try:
        tree = importlib.import_module("dynamo.llm").RadixTree()
    except ImportError:
        return None
    for number, (worker, hashes) in enumerate(holdings):
        blocks = [{"block_hash": block_hash, "tokens_hash": block_hash} for block_hash in hashes]
        event = {"event_id": number, "data": {"stored": {"parent_hash": None, "blocks": blocks}}}
        tree.apply_event(worker, json.dumps(event).encode())
    return tree


def build_fleet(holdings: Sequence[Holding], num_blocks: int) -> Fleet:
    """A router that follows workers with these blocks, some busier than others."""
    fleet = Fleet(rng=random.Random(0))
    rates = {"prefill_base_us": 16_000, "prefill_ns_per_token": 18_000, "decode_base_us": 6_000, "decode_ns_per_block": 800}
    for number, incarnation in enumerate(_WORKERS):
        load = WorkerLoad(number % 7, 0, number % 3 * 500, number % 7 * 64, num_blocks // 8, num_blocks, mean_output_tokens=150, **rates)
        fleet.join(incarnation, f"worker-{number}")
        fleet.report(incarnation, WorkerReport(load), 0.0)
    for worker, hashes in holdings:
        fleet.report(_WORKERS[worker], WorkerReport(load, tuple(hashes)), 0.0)
    return fleet


def time_each(prompts: Sequence[list[int]], look_up: Callable[[list[int]], object]) -> list[float]:
    """Microseconds of every one."""
    times, clock = [], time.perf_counter
    for prompt in prompts:
        began = clock()
        look_up(prompt)
        times.append((clock() - began) * 1e6)
    return times


def _in_turns(prompts: list[list[int]], ours: Callable[[list[int]], object], theirs: Callable[[list[int]], object]) -> dict[str, Any]:
    near: list[float] = []
    far: list[float] = []
    size = max(1, len(prompts) // 50)
    for start in range(0, len(prompts), size):
        near.append(statistics.median(time_each(prompts[start : start + size], ours)))
        far.append(statistics.median(time_each(prompts[start : start + size], theirs)))
    return {"us_p50": round(statistics.median(far), 2), "ratio_of_ours": ratio_of(near, far).to_dict()}


def _quantiles(times: list[float]) -> dict[str, float]:
    ranked = sorted(times)
    return {"p50": round(statistics.median(ranked), 2), "p99": round(ranked[int(len(ranked) * 0.99)], 2)}


def measure(num_blocks: int, num_lookups: int, num_decisions: int) -> dict[str, Any]:
    """All figures, for `--json`."""
    rng = random.Random(7)
    documents, holdings = make_holdings(rng, num_blocks)
    prompts = make_prompts(rng, documents, num_lookups)
    found = _time_lookups(holdings, prompts, num_lookups)
    fleet = build_fleet(holdings, 4 * num_blocks // _NUM_WORKERS)
    found["decision_us"] = _quantiles(time_decisions(fleet, prompts[:num_decisions]))
    return found


def _time_lookups(holdings: Any, prompts: list[list[int]], num_lookups: int) -> dict[str, Any]:
    """Of the index, beside the other tree if it is there. Both are gone when this returns: a fleet needs the memory."""
    index, bytes_per_block = build_index(holdings)

    def look_up(prompt: list[int]) -> list[int]:
        return index.overlaps(prompt, _WORKERS)

    found: dict[str, Any] = {
        "blocks": len(index),
        "copies": sum(len(hashes) for _, hashes in holdings),
        "workers": _NUM_WORKERS,
        "lookups": num_lookups,
        "bytes_per_block": round(bytes_per_block, 1),
        "lookup_us": _quantiles(time_each(prompts, look_up)),
        "dynamo_radix_tree": None,
    }
    tree = build_radix_tree(holdings)
    if tree is not None:
        found["dynamo_radix_tree"] = _in_turns(prompts, look_up, tree.find_matches)
    return found


def time_decisions(fleet: Fleet, prompts: Sequence[list[int]]) -> list[float]:
    """Microseconds of each whole decision: lookup, ranking, reservation. They are a millisecond apart, as on a busy mesh."""
    questions = [
        Question(str(number), Prompt(_PROMPT_BLOCKS * _BLOCK_SIZE + 5, _BLOCK_SIZE, prompt), _WORKERS)
        for number, prompt in enumerate(prompts)
    ]
    times, clock = [], time.perf_counter
    for number, question in enumerate(questions):
        began = clock()
        fleet.choose("kv", question, number / 1000)
        times.append((clock() - began) * 1e6)
    return times


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--blocks", default=1_000_000, show_default=True)
@click.option("--lookups", default=100_000, show_default=True)
@click.option("--decisions", default=10_000, show_default=True)
def main(as_json: bool, blocks: int, lookups: int, decisions: int) -> None:
    """Lookups of 64-block prompts on 64 workers, and whole routing decisions."""
    found = measure(blocks, lookups, decisions)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(f"blocks       {found['blocks']:12,}     on {found['workers']} workers, {found['copies']:,} copies")
    click.echo(f"memory       {found['bytes_per_block']:12.1f} B   a block")
    for name in ("lookup", "decision"):
        times = found[f"{name}_us"]
        click.echo(f"{name:12} {times['p50']:12.1f} us  p50     {times['p99']:8.1f} us p99")
    tree = found["dynamo_radix_tree"]
    click.echo(f"RadixTree    {tree['us_p50']:12.1f} us  p50" if tree else "RadixTree    ai-dynamo-runtime is not installed")


if __name__ == "__main__":
    main()
