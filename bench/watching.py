"""`python -m bench.watching [--json]`: what a reader of `/mesh/events` costs the mesh, in CPU time per request.

A mesh of real processes on loopback (frontend with processor and router, two decode workers and a prefill worker, the instant engine)
serves as many requests as it can to keep-alive connections. In turn, a reader follows the events or nobody does. All CPU time of the
mesh's processes counts, by the kernel's account; that of the load and of the reader, which are this process, does not.
"""

import asyncio
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import uvloop

from bench.processes import cpu_s, end_peers, ready_fields, start_peer
from bench.ratios import interval, json_option
from meshserve.cli.bench.compare import ratio_of
from meshserve.cli.bench.http_client import Pool, Reply, parse_url, request_head, with_body

_READY_S = 20.0
_PROMPTS = ("A short question", "The prompt of a long document that is worth handing over. " * 8)


@contextlib.contextmanager
def mesh_processes() -> Iterator[tuple[str, list[int]]]:
    """The mesh: its URL, and the ids of its processes."""
    peers = [start_peer("watching", "frontend,processor,router", "--http", "127.0.0.1:0")]
    try:
        front = ready_fields(peers[0])
        for role in ("decode", "decode", "prefill"):
            seed = front["address"].removeprefix("tcp://")
            peers.append(start_peer("watching", role, "--peer", seed))
            ready_fields(peers[-1])
        yield front["http"], [process.pid for process in peers]
    finally:
        end_peers(peers)


class Load(Reply):
    """Asks for a completion, and for the next one as soon as it has it, on one connection."""

    def __init__(self, pool: Pool, request: bytes, done: Callable[[], object]) -> None:
        super().__init__()
        self._pool, self._request, self._done = pool, request, done

    def complete(self, now_s: float) -> None:
        """An answer."""
        assert self.status == 200, self.parts
        self.parts.clear()
        self._done()
        self._pool.start(self._request, self)

    def failed(self, now_s: float, kind: str) -> None:
        """It would spoil the figures."""
        raise ConnectionError(kind)


class Reader(Reply):
    """Follows `/mesh/events` and throws it away, but counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.num_updates = 0

    def body(self, now_s: float, data: bytes) -> None:
        """Some events."""
        self.num_bytes += len(data)
        self.num_updates += data.count(b"\nevent: ")


class Turns:
    """The load, and turns of it that are measured."""

    def __init__(self, url: str, pids: list[int], seconds: float) -> None:
        origin, self._host, _ = parse_url(url)
        self._pool, self._pids, self._seconds = Pool(origin), pids, seconds
        self._count = itertools.count()

    async def warm_up(self) -> None:
        """Until all peers reach each other."""
        request = with_body(request_head("GET", self._host, "/mesh/peers"), b"")
        async with asyncio.timeout(_READY_S):
            while True:
                peers = json.loads((await self._pool.ask(request, _READY_S))[1])
                if len(peers) == 4 and all(peer["num_reached"] == 3 for peer in peers):
                    return
                await asyncio.sleep(0.05)

    def open(self, num_connections: int, max_tokens: int) -> None:
        """Connect, and ask from now on."""
        head = request_head("POST", self._host, "/v1/completions")
        for number in range(num_connections):
            prompt = _PROMPTS[number % len(_PROMPTS)]
            fields = {"model": "dummy", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
            request = with_body(head, json.dumps(fields).encode())
            self._pool.start(request, Load(self._pool, request, lambda: next(self._count)))

    async def take(self) -> tuple[float, float]:
        """One turn: CPU time in microseconds per request, and requests a second. Half a second before it does not count."""
        await asyncio.sleep(0.5)
        began_s, before_s, first = time.monotonic(), cpu_s(self._pids), next(self._count)
        await asyncio.sleep(self._seconds)
        num_requests = next(self._count) - first - 1
        return (cpu_s(self._pids) - before_s) / num_requests * 1e6, num_requests / (time.monotonic() - began_s)

    async def take_watched(self, reader: Reader) -> tuple[float, float]:
        """The same while this reader reads."""
        self._pool.start(with_body(request_head("GET", self._host, "/mesh/events"), b""), reader)
        try:
            return await self.take()
        finally:
            reader.cancel()
            reader.is_cancelled = False  # it reads again in the next turn

    async def close(self) -> None:
        """Ask no more."""
        await self._pool.close()


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


@click.command()
@json_option
@click.option("--pairs", default=10, show_default=True, help="Alternations.")
@click.option("--seconds", default=4.0, show_default=True, help="Of each turn.")
@click.option("--connections", default=16, show_default=True)
@click.option("--max-tokens", default=8, show_default=True, help="Of each completion.")
def main(as_json: bool, pairs: int, seconds: float, connections: int, max_tokens: int) -> None:
    """CPU time of the mesh per request with a reader of its events, as a ratio to that without."""

    async def run() -> dict[str, Any]:
        with mesh_processes() as (url, pids):
            turns = Turns(url, pids, seconds)
            try:
                await turns.warm_up()
                turns.open(connections, max_tokens)
                return await measure(turns, pairs)
            finally:
                await turns.close()

    found = uvloop.run(run())
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    ratio = found["ratio"]
    rate = f"{found['requests_per_s']} a second"
    click.echo(f"with a reader            {found['cpu_us_per_request_watched']:8.1f} us  of CPU time per request, {rate}")
    click.echo(f"without                  {found['cpu_us_per_request_alone']:8.1f} us")
    click.echo(f"ratio                    {ratio['median']:8.3f}     {interval(ratio)}")
    click.echo(f"the reader gets          {found['updates_per_s']:8.1f} updates a second, {found['bytes_per_s'] / 1000:.1f} kB/s")


if __name__ == "__main__":
    main()
