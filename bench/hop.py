"""`python -m bench.hop [--json]`: a 100-byte call between two peers, against a blocking DEALER/ROUTER echo in the same run.

Both sides of each are processes of their own on loopback. The floor is the least that ZeroMQ in Python can do: two blocking sockets, no
event loop, no msgpack, no streams, no deadline. Also: the same call to a role in the same peer.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import click
import uvloop
import zmq

from bench.processes import joined, loopback, started, until
from bench.ratios import interval, json_option
from meshserve.cli.bench.compare import ratio_of
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.wire.messages import Method

_PAYLOAD = b"x" * 100
_ECHO = Method("echo")


def _answer(call: IncomingCall) -> None:
    call.end(call.body)


def _serve_echo(mesh: Mesh) -> Callable[[], None]:
    mesh.serve(_ECHO, _answer)
    return lambda: None


def echo_peer(pipe: Connection) -> None:
    """A peer that answers calls, in a process of its own."""

    async def serve() -> None:
        async with joined(loopback("bench-hop", "decode"), None, _serve_echo) as mesh:
            pipe.send(mesh.own.port)
            await asyncio.to_thread(pipe.recv)

    uvloop.run(serve())


def echo_socket(pipe: Connection) -> None:
    """The floor's far side: a blocking ROUTER."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        pipe.send(socket.bind_to_random_port("tcp://127.0.0.1"))
        while True:
            frames = socket.recv_multipart()
            if frames[-1] == b"stop":
                return
            socket.send_multipart(frames)


def time_floor(socket: "zmq.Socket[bytes]", num_calls: int) -> float:
    """Median round trip in microseconds."""
    times = []
    for _ in range(num_calls):
        began = time.perf_counter()
        socket.send(_PAYLOAD)
        socket.recv()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


async def time_calls(mesh: Mesh, peer: str, num_calls: int) -> float:
    """Median round trip in microseconds."""
    times = []
    for _ in range(num_calls):
        began = time.perf_counter()
        await mesh.call(peer, _ECHO, _PAYLOAD, 10.0)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


async def compare(peer_port: int, floor_port: int, num_pairs: int, num_calls: int) -> dict[str, Any]:
    """Alternate between the two."""
    config = loopback("bench-hop", "processor", seeds=(f"127.0.0.1:{peer_port}",))
    hops, floors = [], []
    async with joined(config, None, _serve_echo) as mesh:
        await until(lambda: mesh.peers_with("decode"))
        peer = mesh.peers_with("decode")[0].incarnation
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(f"tcp://127.0.0.1:{floor_port}")
            await time_calls(mesh, peer, num_calls)
            time_floor(socket, num_calls)
            for _ in range(num_pairs):
                hops.append(await time_calls(mesh, peer, num_calls))
                floors.append(time_floor(socket, num_calls))
            socket.send(b"stop", zmq.NOBLOCK)
            await asyncio.sleep(0.05)
        local = await time_calls(mesh, mesh.incarnation, num_calls * 5)
    return {
        "hop_us_p50": round(statistics.median(hops), 1),
        "floor_us_p50": round(statistics.median(floors), 1),
        "ratio": ratio_of(hops, floors).to_dict(),
        "in_process_us_p50": round(local, 1),
    }


def run(num_pairs: int, num_calls: int) -> dict[str, Any]:
    """Start both far sides, compare, and end them."""
    with started(echo_peer) as peer, started(echo_socket) as floor:
        return uvloop.run(compare(peer.recv(), floor.recv(), num_pairs, num_calls))


@click.command()
@json_option
@click.option("--pairs", default=30, show_default=True, help="Alternations.")
@click.option("--calls", default=300, show_default=True, help="Calls in each turn.")
def main(as_json: bool, pairs: int, calls: int) -> None:
    """Round trip between two peers, as a ratio to a blocking ZeroMQ echo."""
    found = run(pairs, calls)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    ratio = found["ratio"]
    click.echo(f"a call to another peer   {found['hop_us_p50']:8.1f} us  p50")
    click.echo(f"blocking DEALER/ROUTER   {found['floor_us_p50']:8.1f} us  p50")
    click.echo(f"ratio                    {ratio['median']:8.2f}     {interval(ratio)}")
    click.echo(f"a call within a peer     {found['in_process_us_p50']:8.1f} us  p50")


if __name__ == "__main__":
    main()
