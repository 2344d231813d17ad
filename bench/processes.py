"""Peers in processes of their own, for benchmarks: started, asked over a pipe, ended."""

import asyncio
import contextlib
import itertools
import multiprocessing
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click

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


# --- `meshserve run`


def start_peer(mesh: str, role: str, *options: str) -> "subprocess.Popen[str]":
    """A peer on loopback; :func:`ready_fields` waits until the peer serves."""
    command = [sys.executable, "-m", "meshserve", "run", "--role", role, "--mesh", mesh]
    command += ["--interface", "127.0.0.1", "--no-mdns", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def ready_fields(process: "subprocess.Popen[str]") -> dict[str, str]:
    """The fields of a peer's `ready` line. Raises ClickException if the peer ends instead."""
    assert process.stdout is not None
    while line := process.stdout.readline():
        if line.startswith("ready "):
            return dict(part.split("=", 1) for part in line.split()[1:])
    raise click.ClickException("a peer ended before it was ready")


def end_peers(processes: Iterable["subprocess.Popen[str]"]) -> None:
    """Drain all of them at once; kill those that do not end."""
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time of these processes over all threads (`/proc/PID/task/TID/schedstat`, in ns)."""
    tasks = itertools.chain.from_iterable(Path(f"/proc/{pid}/task").iterdir() for pid in pids)
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
