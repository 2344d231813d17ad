"""`python -m bench.watching [--json]`: what a reader of `/mesh/events` costs the mesh, in CPU time per request.

A mesh of real processes on loopback (frontend with processor and router, two decode workers and a prefill worker, the instant engine)
serves as many requests as it can to keep-alive connections. In turn, a reader follows the events or nobody does. All CPU time of the
mesh's processes counts, by the kernel's account; that of the load and of the reader, which are this process, does not.
"""

import asyncio
import contextlib
import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import click
import uvloop

from meshserve.cli.bench.compare import ratio_of

_READY_S = 20.0
_PROMPTS = ("A short question", "The prompt of a long document that is worth handing over. " * 8)


@contextlib.contextmanager
def mesh_processes() -> Iterator[tuple[str, list[int]]]:
    """The mesh: its URL, and the ids of its processes."""
    started: list[subprocess.Popen[str]] = []

    def start(role: str, *options: str) -> dict[str, str]:
        command = [sys.executable, "-m", "meshserve", "run", "--role", role, "--interface", "127.0.0.1", "--no-mdns", "--mesh", "watching"]
        started.append(subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
        stdout = started[-1].stdout
        assert stdout is not None
        return dict(part.split("=", 1) for part in stdout.readline().split()[1:])

    try:
        front = start("frontend,processor,router", "--http", "127.0.0.1:0")
        for role in ("decode", "decode", "prefill"):
            start(role, "--peer", front["address"].removeprefix("tcp://"))
        yield front["http"], [process.pid for process in started]
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(10)


def cpu_s(pids: list[int]) -> float:
    """All that these processes have used, over all their threads (`/proc/PID/task/TID/schedstat`, in nanoseconds)."""
    tasks = itertools.chain.from_iterable(Path(f"/proc/{pid}/task").iterdir() for pid in pids)
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


class Load(asyncio.Protocol):
    """One keep-alive connection that asks for a completion, and for the next one as soon as it has it."""

    def __init__(self, host: str, body: bytes, done: Callable[[], object]) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._question, self._done = head.encode() + body, done
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the first."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are none by descent
        self._transport.write(self._question)

    def data_received(self, data: bytes) -> None:
        """An answer, or part of one; answers come one at a time."""
        self._answer += data
        head, separator, body = self._answer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) >= length:
            assert head.startswith(b"HTTP/1.1 200"), body
            self._answer = b""
            self._done()
            self._transport.write(self._question)


class Reader:
    """Follows `/mesh/events` and throws it away, but counts it."""

    def __init__(self) -> None:
        self.num_bytes = self.num_updates = 0

    async def read(self, host: str, port: int) -> None:
        """Until cancelled."""
        stream, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(f"GET /mesh/events HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
            while data := await stream.read(65536):
                self.num_bytes += len(data)
                self.num_updates += data.count(b"\nevent: ")
        finally:
            writer.close()


class Turns:
    """The load, and turns of it that are measured."""

    def __init__(self, url: str, pids: list[int], seconds: float) -> None:
        self.parts, self._pids, self._seconds = urlsplit(url), pids, seconds
        self._address = (str(self.parts.hostname), self.parts.port or 80)
        self._count = itertools.count()
        self._transports: list[asyncio.BaseTransport] = []

    async def open(self, num_connections: int, max_tokens: int) -> None:
        """Connect, and ask from now on."""
        loop = asyncio.get_running_loop()
        for number in range(num_connections):
            prompt = _PROMPTS[number % len(_PROMPTS)]
            body = json.dumps({"model": "dummy", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}).encode()
            load = Load(self.parts.netloc, body, lambda: next(self._count))
            transport, _ = await loop.create_connection(functools.partial(_same, load), *self._address)
            self._transports.append(transport)

    async def take(self) -> tuple[float, float]:
        """One turn: CPU time in microseconds per request, and requests a second. Half a second before it does not count."""
        await asyncio.sleep(0.5)
        began_s, before_s, first = time.monotonic(), cpu_s(self._pids), next(self._count)
        await asyncio.sleep(self._seconds)
        num_requests = next(self._count) - first - 1
        return (cpu_s(self._pids) - before_s) / num_requests * 1e6, num_requests / (time.monotonic() - began_s)

    async def take_watched(self, reader: Reader) -> tuple[float, float]:
        """The same while this reader reads."""
        task = asyncio.create_task(reader.read(*self._address))
        try:
            return await self.take()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def close(self) -> None:
        """Ask no more."""
        for transport in self._transports:
            transport.close()


def _same(load: Load) -> Load:
    return load


async def measure(turns: Turns, num_pairs: int) -> dict[str, Any]:
    """Alternate between a reader and none; who begins alternates too."""
    reader = Reader()
    watched: list[tuple[float, float]] = []
    alone: list[tuple[float, float]] = []
    began_s = time.monotonic()
    await turns.take()
    turn_s = time.monotonic() - began_s
    for pair in range(num_pairs):
        if pair % 2:
            watched.append(await turns.take_watched(reader))
        alone.append(await turns.take())
        if not pair % 2:
            watched.append(await turns.take_watched(reader))
    return {
        "cpu_us_per_request_watched": round(statistics.median(cpu_us for cpu_us, _ in watched), 1),
        "cpu_us_per_request_alone": round(statistics.median(cpu_us for cpu_us, _ in alone), 1),
        "ratio": ratio_of([cpu_us for cpu_us, _ in watched], [cpu_us for cpu_us, _ in alone]).to_dict(),
        "requests_per_s": round(statistics.median(per_s for _, per_s in watched + alone)),
        "updates_per_s": round(reader.num_updates / (turn_s * num_pairs), 1),
        "bytes_per_s": round(reader.num_bytes / (turn_s * num_pairs)),
    }


async def _warm_up(url: str) -> None:
    parts = urlsplit(url)
    async with asyncio.timeout(_READY_S):
        while True:
            stream, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(f"GET /mesh/peers HTTP/1.1\r\nhost: {parts.netloc}\r\nconnection: close\r\n\r\n".encode())
            peers = json.loads((await stream.read()).partition(b"\r\n\r\n")[2])
            writer.close()
            if len(peers) == 4 and all(peer["num_reached"] == 3 for peer in peers):
                return
            await asyncio.sleep(0.05)


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--pairs", default=10, show_default=True, help="Alternations.")
@click.option("--seconds", default=4.0, show_default=True, help="Of each turn.")
@click.option("--connections", default=16, show_default=True)
@click.option("--max-tokens", default=8, show_default=True, help="Of each completion.")
def main(as_json: bool, pairs: int, seconds: float, connections: int, max_tokens: int) -> None:
    """CPU time of the mesh per request with a reader of its events, as a ratio to that without."""

    async def run() -> dict[str, Any]:
        with mesh_processes() as (url, pids):
            await _warm_up(url)
            turns = Turns(url, pids, seconds)
            await turns.open(connections, max_tokens)
            try:
                return await measure(turns, pairs)
            finally:
                turns.close()

    found = uvloop.run(run())
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    ratio = found["ratio"]
    rate = f"{found['requests_per_s']} a second"
    click.echo(f"with a reader            {found['cpu_us_per_request_watched']:8.1f} us  of CPU time per request, {rate}")
    click.echo(f"without                  {found['cpu_us_per_request_alone']:8.1f} us")
    interval = f"95 % interval {ratio['low']:.3f} to {ratio['high']:.3f}, {ratio['num_pairs']} pairs"
    click.echo(f"ratio                    {ratio['median']:8.3f}     {interval}")
    click.echo(f"the reader gets          {found['updates_per_s']:8.1f} updates a second, {found['bytes_per_s'] / 1000:.1f} kB/s")


if __name__ == "__main__":
    main()
