"""`python -m bench.kv [--json]`: KV handed from one process to another, against plain PUSH/PULL of frames of the same size.

Both sides of each are processes of their own on loopback. The handoff is the real one: ticket, claim, blocks within a window, checksums
made and verified, each block copied into the receiver's pool, acknowledgements; only the engines cost nothing. The floor sends and receives
frames without a copy and looks at none of them.

Then, with the rate limited: what a stream of small items between the same two peers sees of it, in the direction of the blocks.
"""

import asyncio
import contextlib
import json
import statistics
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

import click
import uvloop
import zmq

from bench.engine import BenchEngine, bench_layout
from bench.processes import answer_until_told, joined, loopback, started, until
from bench.ratios import interval, json_option
from meshserve.cli.bench.compare import ratio_of
from meshserve.config import HandoffConfig, MeshConfig, TransportConfig
from meshserve.errors import MeshserveError
from meshserve.handoff.intake import HandoffResult
from meshserve.handoff.provider import PrefillProvider
from meshserve.handoff.requester import PrefillRequester
from meshserve.handoff.task import TaskState
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.wire.generation import GenerateRequest
from meshserve.wire.messages import Method

_BLOCK_TOKENS = 16
_GAP_S = 0.002
_STREAM = Method("bench.stream")
_STREAM_TIMEOUT_S = 600.0
_WARM_UP_BLOCKS = 64


class _Prefill:
    """The prefill peer's side: a provider, and a stream of small items for whoever asks."""

    def __init__(self, mesh: Mesh, engine: BenchEngine) -> None:
        self.close = PrefillProvider(mesh, engine, HandoffConfig()).close
        mesh.serve(_STREAM, self._stream)
        self._mesh = mesh

    def _stream(self, call: IncomingCall) -> None:
        async def send() -> None:
            for number in range(int(call.body)):
                call.send(number)
                await asyncio.sleep(_GAP_S)
            call.end()

        self._mesh.tasks.spawn(send())


def prefill_peer(pipe: Connection, kv_bytes_per_token: int, bulk_bytes_per_s: float) -> None:
    """The sending side, in a process of its own. Gives its port, then runs until it is told to stop."""

    async def serve() -> None:
        config = MeshConfig(
            mesh="bench-kv",
            roles=("prefill",),
            interface="127.0.0.1",
            use_mdns=False,
            transport=TransportConfig(bulk_bytes_per_s=bulk_bytes_per_s),
        )
        engine = BenchEngine(bench_layout(kv_bytes_per_token, _BLOCK_TOKENS))

        def build(mesh: Mesh) -> Callable[[], None]:
            return _Prefill(mesh, engine).close

        async with joined(config, engine, build) as mesh:
            pipe.send(mesh.own.port)
            await answer_until_told(pipe, _no_answer)

    uvloop.run(serve())


async def _no_answer(question: Any) -> None:
    return None


def floor_peer(pipe: Connection) -> None:
    """The floor's sending side: as many frames as it is asked for, as fast as the socket takes them."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.linger = 0
        port, size_bytes = pipe.recv()
        socket.connect(f"tcp://127.0.0.1:{port}")
        frames = [bytes([number]) * size_bytes for number in range(16)]
        while (count := pipe.recv()) is not None:
            for number in range(count):
                socket.send(frames[number % 16], copy=False)


def _request(request_id: str, num_blocks: int) -> GenerateRequest:
    return GenerateRequest(request_id, "bench", array("I", bytes(4 * (num_blocks * _BLOCK_TOKENS + 1))))


class _Decode:
    """The decode peer's side: asks for prompts and waits for their KV."""

    def __init__(self) -> None:
        self.requester: PrefillRequester
        self.counters: Any
        self._num_requests = 0

    def build(self, mesh: Mesh, engine: BenchEngine) -> Callable[[], None]:
        self.requester = PrefillRequester(mesh, engine, HandoffConfig())
        return self.requester.close

    async def hand_over(self, num_blocks: int) -> float:
        """Seconds until all blocks of a prompt of this length are here."""
        self._num_requests += 1
        request = _request(f"r{self._num_requests}", num_blocks)
        done: asyncio.Future[HandoffResult] = asyncio.get_running_loop().create_future()
        began_s = time.monotonic()
        self.requester.start(request, self.requester.choice.candidates(request), began_s + 60.0, done.set_result, lambda name: None)
        result = await done
        assert result.state is TaskState.DONE and result.num_blocks == num_blocks, result
        return time.monotonic() - began_s

    def cancel(self) -> None:
        """Give up the latest prompt, if it is under way."""
        self.requester.cancel(f"r{self._num_requests}")


class _Gaps:
    """The sink of a stream: times between its items, in milliseconds."""

    def __init__(self) -> None:
        self.gaps_ms: list[float] = []
        self._last_s: float | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_item(self, item: Any) -> None:
        now_s = time.monotonic()
        if self._last_s is not None:
            self.gaps_ms.append((now_s - self._last_s) * 1000)
        self._last_s = now_s

    def on_end(self, value: Any) -> None:
        self.ended.set_result(None)

    def on_error(self, error: MeshserveError) -> None:
        self.ended.set_exception(error)


async def compare_throughput(
    prefill_port: int, kv_bytes_per_token: int, floor: Connection, num_pairs: int, num_blocks: int
) -> dict[str, Any]:
    """Alternate between the handoff and the floor."""
    layout = bench_layout(kv_bytes_per_token, _BLOCK_TOKENS)
    size_bytes = kv_bytes_per_token * _BLOCK_TOKENS
    decode, engine = _Decode(), BenchEngine(layout)
    config = loopback("bench-kv", "decode", seeds=(f"127.0.0.1:{prefill_port}",))
    async with joined(config, engine, lambda mesh: decode.build(mesh, engine)):
        await until(lambda: decode.requester.choice.candidates(_request("probe", 1)))
        with zmq.Context() as context, context.socket(zmq.PULL) as socket:
            socket.linger = 0
            floor.send((socket.bind_to_random_port("tcp://127.0.0.1"), size_bytes))
            handoffs, floors = [], []
            await decode.hand_over(_WARM_UP_BLOCKS)
            _floor_bytes_per_s(socket, floor, _WARM_UP_BLOCKS, size_bytes)
            for _ in range(num_pairs):
                handoffs.append(num_blocks * size_bytes / await decode.hand_over(num_blocks))
                floors.append(_floor_bytes_per_s(socket, floor, num_blocks, size_bytes))
    return {
        "block_bytes": size_bytes,
        "handoff_gb_per_s": round(statistics.median(handoffs) / 1e9, 3),
        "floor_gb_per_s": round(statistics.median(floors) / 1e9, 3),
        "ratio": ratio_of(handoffs, floors).to_dict(),
    }


def _floor_bytes_per_s(socket: "zmq.Socket[bytes]", floor: Connection, count: int, size_bytes: int) -> float:
    began_s = time.monotonic()
    floor.send(count)
    for _ in range(count):
        socket.recv(copy=False)
    return count * size_bytes / (time.monotonic() - began_s)


async def compare_gaps(prefill_port: int, kv_bytes_per_token: int, num_pairs: int, num_items: int) -> dict[str, Any]:
    """A stream alone, then beside blocks that never stop coming, in turn."""
    layout = bench_layout(kv_bytes_per_token, _BLOCK_TOKENS)
    decode, engine = _Decode(), BenchEngine(layout)
    config = loopback("bench-kv", "decode", seeds=(f"127.0.0.1:{prefill_port}",))
    async with joined(config, engine, lambda mesh: decode.build(mesh, engine)) as mesh:
        await until(lambda: decode.requester.choice.candidates(_request("probe", 1)))
        peer = mesh.peers_with("prefill")[0].incarnation
        await decode.hand_over(_WARM_UP_BLOCKS)
        alone, beside, rates = [], [], []
        for _ in range(num_pairs):
            alone.append(_p99(await _gaps(mesh, peer, num_items)))
            async with _bulk_running(mesh, decode) as rate:
                beside.append(_p99(await _gaps(mesh, peer, num_items)))
                rates.append(rate())
    longer_ms = [with_bulk - without for with_bulk, without in zip(beside, alone, strict=True)]
    return {
        "bulk_gb_per_s": round(statistics.median(rates) / 1e9, 3),
        "alone_p99_ms": round(statistics.median(alone), 3),
        "beside_p99_ms": round(statistics.median(beside), 3),
        "longer_ms": round(statistics.median(longer_ms), 3),
        "longer_ms_worst": round(max(longer_ms), 3),
        "num_pairs": num_pairs,
    }


async def _gaps(mesh: Mesh, peer: str, num_items: int) -> list[float]:
    sink = _Gaps()
    mesh.open(peer, _STREAM, num_items, sink, _STREAM_TIMEOUT_S)
    await sink.ended
    return sink.gaps_ms


@asynccontextmanager
async def _bulk_running(mesh: Mesh, decode: _Decode) -> AsyncIterator[Callable[[], float]]:
    """Prompts are handed over without a pause; gives what tells the bytes a second so far."""

    async def keep_handing_over() -> None:
        while True:
            await decode.hand_over(_WARM_UP_BLOCKS)

    def received() -> int:
        return mesh.counters.snapshot().get("kv_bytes_received", 0)

    began_s, before = time.monotonic(), received()
    task = asyncio.create_task(keep_handing_over())
    try:
        yield lambda: (received() - before) / (time.monotonic() - began_s)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        decode.cancel()  # so that the next pair starts clean


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def measure(kv_bytes_per_token: int, num_pairs: int, num_blocks: int, limit_bytes_per_s: float, num_items: int) -> dict[str, Any]:
    """Both halves, each with peers of its own."""
    with started(prefill_peer, kv_bytes_per_token, 0.0) as prefill, started(floor_peer) as floor:
        throughput = uvloop.run(compare_throughput(prefill.recv(), kv_bytes_per_token, floor, num_pairs, num_blocks))
    with started(prefill_peer, kv_bytes_per_token, limit_bytes_per_s) as prefill:
        gaps = uvloop.run(compare_gaps(prefill.recv(), kv_bytes_per_token, num_pairs, num_items))
    return {"throughput": throughput, "stream_beside_limited_bulk": gaps}


@click.command()
@json_option
@click.option("--pairs", default=20, show_default=True, help="Alternations.")
@click.option("--blocks", default=256, show_default=True, help="Blocks in each turn.")
@click.option("--kv-bytes-per-token", default=128 * 1024, show_default=True)
@click.option("--limit-gb-per-s", default=1.0, show_default=True, help="Of the second half.")
@click.option("--items", default=500, show_default=True, help="Of the stream, 2 ms apart, in each turn.")
def main(as_json: bool, pairs: int, blocks: int, kv_bytes_per_token: int, limit_gb_per_s: float, items: int) -> None:
    """Throughput of the handoff as a ratio to plain PUSH/PULL, and what tokens see of it."""
    found = measure(kv_bytes_per_token, pairs, blocks, limit_gb_per_s * 1e9, items)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    throughput, gaps = found["throughput"], found["stream_beside_limited_bulk"]
    ratio = throughput["ratio"]
    click.echo(f"handoff, blocks of {throughput['block_bytes']} bytes  {throughput['handoff_gb_per_s']:6.2f} GB/s")
    click.echo(f"plain PUSH/PULL, the same frames     {throughput['floor_gb_per_s']:6.2f} GB/s")
    click.echo(f"ratio                                {ratio['median']:6.2f}       {interval(ratio)}")
    click.echo(f"a stream alone, p99 gap              {gaps['alone_p99_ms']:6.2f} ms")
    click.echo(f"beside bulk at {gaps['bulk_gb_per_s']:.2f} GB/s             {gaps['beside_p99_ms']:6.2f} ms")
    click.echo(f"longer by, in pairs                  {gaps['longer_ms']:6.2f} ms    at worst {gaps['longer_ms_worst']:.2f} ms")


if __name__ == "__main__":
    main()
