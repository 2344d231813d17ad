"""Memory of a decode peer that serves a real model, less what any server of that model has: the model's pages and the context."""

import asyncio
import random
from pathlib import Path
from typing import Any

import click

from bench.llama.client import complete, random_prompt
from bench.llama.context_alone import ContextSize, Stages, measure
from bench.llama.resident import Resident, resident_of
from bench.llama.servers import Apart
from bench.processes import started
from bench.systems import running
from meshserve.engines.claims import Claim
from meshserve.engines.llama.options import parse_options
from meshserve.engines.protocol import EngineOptions

_NUM_CELLS = 8192
_NUM_HANDOFFS, _HANDOFF_TOKENS = 3, 300
_SHORT_TOKENS, _OUTPUT_TOKENS = 40, 16
_REFERENCE_TIMEOUT_S = 120.0


def decode_memory(path: Path) -> dict[str, Any]:
    """A peer with the role decode alone, 64 slots, that has taken in prompts and computed some; no grammar was used."""
    system = Apart(path, num_cells=_NUM_CELLS)
    size = context_size(path, _NUM_CELLS)
    with running([system]):
        num_blocks = asyncio.run(_serve(system, size.max_outputs))
        peer = resident_of(system.decode_pid)
    return {"handed_over_blocks": num_blocks, **figures(peer, context_alone(path, size), path.name), "command": system.command}


def context_size(path: Path, num_cells: int) -> ContextSize:
    """As the engine's options have it."""
    claim = Claim()
    options = parse_options(EngineOptions(str(path), {"threads": "1"}, num_cells), claim)
    claim.update(None)
    limits = options.limits
    return ContextSize(options.num_cells, options.num_slots + 1, limits.max_step_tokens, limits.max_running, options.kv_type)


def context_alone(path: Path, size: ContextSize) -> Stages:
    """What it takes in a process of its own. Raises ClickException if that process does not say so."""
    with started(measure, path, size) as pipe:
        if not pipe.poll(_REFERENCE_TIMEOUT_S):
            raise click.ClickException("the process with a context alone does not answer")
        try:
            found: Stages = pipe.recv()
        except EOFError as exc:
            raise click.ClickException("the process with a context alone has ended") from exc
    return found


async def _serve(system: Apart, num_streams: int) -> int:
    """Prompts that are handed over, then as many streams at once as the engine runs, whose prompts it computes itself.

    Returns the number of blocks that were handed over. Raises ClickException if there were none.
    """
    rng, num_blocks = random.Random(11), 0
    for _ in range(_NUM_HANDOFFS):
        answer = await complete(system.url, system.model, random_prompt(_HANDOFF_TOKENS, rng), 2, with_receipt=True)
        num_blocks += answer.receipt["kv"]["blocks"]
    prompts = [random_prompt(_SHORT_TOKENS, rng) for _ in range(num_streams)]
    await asyncio.gather(*(complete(system.url, system.model, prompt, _OUTPUT_TOKENS) for prompt in prompts))
    if not num_blocks:
        raise click.ClickException("no prompt was handed over")
    return num_blocks


def figures(peer: Resident, alone: Stages, model_file: str) -> dict[str, Any]:
    """Millions of bytes. `peer_mb` is the figure: the sum of `parts_mb`, each of which counts; what does not count stands in `less_mb`."""
    model, context = peer.of_files(model_file), alone.context + alone.steps
    library = sum(count for name, count in peer.by_file.items() if name.endswith(".so") and "llama" in Path(name).name)
    return {
        "peer_mb": _mb(peer.total - model - context),
        "rss_mb": _mb(peer.total),
        "less_mb": {
            "model_file": _mb(model),
            "pool": _mb(alone.buffers["KV"]),
            "context_bookkeeping": _mb(alone.context - alone.buffers["KV"]),
            "compute_and_output_buffers": _mb(alone.steps),
        },
        "buffers_as_logged_mb": {name: _mb(count) for name, count in alone.buffers.items()},
        "parts_mb": {
            "llama_cpp_file": _mb(library),
            "other_files": _mb(sum(peer.by_file.values()) - model - library),
            "llama_cpp_loaded": _mb(alone.library),
            "llama_cpp_model_and_vocabulary": _mb(alone.model),
            "python": _mb(peer.anonymous - context - alone.library - alone.model),
        },
    }


def _mb(num_bytes: int) -> float:
    return round(num_bytes / 1e6, 1)
