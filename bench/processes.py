"""Peers in processes of their own, for benchmarks: started, asked over a pipe, ended."""

import asyncio
import contextlib
import multiprocessing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.connection import Connection
from typing import Any

from meshserve.config import MeshConfig
from meshserve.engines.protocol import Engine
from meshserve.mesh.mesh import Mesh

JOIN_TIMEOUT_S = 10.0


def loopback(mesh: str, *roles: str, seeds: tuple[str, ...] = ()) -> MeshConfig:
    """A peer that only knows this machine's loopback and the peers it is told of."""
    return MeshConfig(mesh=mesh, roles=roles, interface="127.0.0.1", use_mdns=False, seeds=seeds)


@asynccontextmanager
async def joined(config: MeshConfig, engine: Engine | None, build: Callable[[Mesh], Callable[[], None]]) -> AsyncIterator[Mesh]:
    """A peer that has joined; `build` gives it what it serves and returns what ends that."""
    mesh = Mesh(config, engine.card, engine.kv_layout) if engine is not None else Mesh(config)
    await mesh.start()
    close = build(mesh)
    await mesh.join()
    try:
        yield mesh
    finally:
        close()
        await mesh.close()


async def until(condition: Callable[[], Any]) -> None:
    """Wait for something that comes within seconds, or fail."""
    async with asyncio.timeout(JOIN_TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.002)


@contextmanager
def started(target: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """A process that runs `target(pipe, *args)` until the block ends; gives this end of its pipe."""
    spawn = multiprocessing.get_context("spawn")
    near, far = spawn.Pipe()
    process = spawn.Process(target=target, args=(far, *args), daemon=True)
    process.start()
    far.close()  # else the end of the process would not be seen from here
    try:
        yield near
    finally:
        with contextlib.suppress(OSError):
            near.send(None)
        process.join(5)
        if process.is_alive():
            process.kill()


async def answer_until_told(pipe: Connection, answer: Callable[[Any], Awaitable[Any]]) -> None:
    """Answer what comes over the pipe, one after the other, until None comes."""
    while (question := await asyncio.to_thread(pipe.recv)) is not None:
        pipe.send(await answer(question))
