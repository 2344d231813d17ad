"""A process with an engine and no mesh around it: how long a prompt's prefill takes where nothing is handed over."""

import asyncio
import os
import time
from array import array
from multiprocessing.connection import Connection
from pathlib import Path

from bench.processes import answer_until_told
from meshserve.engines.llama import LlamaEngine
from meshserve.engines.protocol import EngineOptions, KVBlock
from meshserve.errors import MeshserveError


class _Sink:
    """Says when all is computed."""

    def __init__(self, is_done: "asyncio.Future[None]") -> None:
        self._is_done = is_done

    def on_blocks(self, blocks: list[KVBlock]) -> None:
        """There are none: it asks for blocks beyond the prompt's last."""

    def on_prefilled(self, num_cached_tokens: int) -> None:
        """All tokens are computed."""
        self._is_done.set_result(None)

    def on_prefill_failed(self, error: MeshserveError) -> None:
        """None will be."""
        self._is_done.set_exception(error)


def serve(pipe: Connection, path: Path, core: int, num_cells: int) -> None:
    """Say that the engine is there; then, for each list of tokens that comes over the pipe, send the seconds that their KV takes.

    The engine is that of a prefill peer with the same options and one thread, on this core alone; it computes the tokens in the
    same steps as a prefill peer, and exports no block.
    """
    os.sched_setaffinity(0, {core})
    asyncio.run(_serve(pipe, LlamaEngine(EngineOptions(str(path), {"threads": "1"}, num_cells))))


async def _serve(pipe: Connection, engine: LlamaEngine) -> None:
    await engine.start()
    pipe.send("ready")
    try:
        await answer_until_told(pipe, lambda tokens: _prefill_s(engine, tokens))
    finally:
        await engine.close()


async def _prefill_s(engine: LlamaEngine, tokens: list[int]) -> float:
    is_done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    began_s = time.monotonic()
    engine.prefill(f"{began_s}", array("I", tokens), len(tokens), _Sink(is_done))
    await is_done
    return time.monotonic() - began_s
