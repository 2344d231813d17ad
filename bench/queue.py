"""`python -m bench.queue [--json]`: the prefill queue against what it replaces.

First, how long an idle prefill worker takes to start: from the push of a ticket to the call of its engine, against the round trip of a
blocking DEALER/ROUTER echo in the same run. It is one message, as these prompts are short and go with their tickets (ticket, claim and task
were three). Both ends read one clock, as all processes of a host do.

Then, how long prompts wait under load: several prefill workers, each a process with the dummy engine, prompts of heavy-tailed lengths
that arrive at random at a share of what the workers can do, from two decode workers; against one ideal central queue simulated on the same
arrivals, whose servers start the next prompt in no time. Waiting is all of a prompt's time here that is not its own prefill.
"""

import asyncio
import contextlib
import heapq
import json
import math
import random
import statistics
import time
from array import array
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import click
import uvloop
import zmq

from bench.engine import BenchEngine, bench_layout
from bench.hop import echo_socket, time_floor
from bench.processes import answer_until_told, joined, loopback, started, until
from bench.ratios import interval, json_option
from meshserve.cli.bench.compare import ratio_of
from meshserve.config import HandoffConfig
from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import Engine, EngineOptions
from meshserve.handoff.intake import HandoffResult
from meshserve.handoff.provider import PrefillProvider
from meshserve.handoff.requester import PrefillRequester
from meshserve.handoff.task import TaskState
from meshserve.mesh.mesh import Mesh
from meshserve.wire.generation import GenerateRequest

_BLOCK_TOKENS = 16
_PREFILL_TOKENS_PER_S = 10_000
_MEDIAN_TOKENS, _SIGMA, _MOST_TOKENS = 500, 1.2, 15_000
"""Lengths are log-normal: a mean of about 1,000 tokens, which take 100 ms, and one in a hundred above 8,000."""


def _dummy() -> DummyEngine:
    options = {
        "kv_bytes_per_token": "1",
        "block_size": "64",  # few blocks, so that five processes on two cores measure the queue and not the machine
        "num_blocks": "1000000",
        "prefill_tokens_per_s": str(_PREFILL_TOKENS_PER_S),
    }
    return DummyEngine(EngineOptions(None, options))


def prefill_peer(pipe: Connection, is_timed: bool) -> None:
    """A prefill worker in a process of its own. Timed, it answers with the moments at which its engine was called."""

    async def serve() -> None:
        begun: dict[str, float] = {}
        engine: Engine
        if is_timed:

            def begin(attempt: str) -> None:
                begun[attempt.partition("/")[2].partition("@")[0]] = time.monotonic()

            engine = BenchEngine(bench_layout(1, _BLOCK_TOKENS), begin)
        else:
            engine = _dummy()
        await engine.start()

        def build(mesh: Mesh) -> Callable[[], None]:
            return PrefillProvider(mesh, engine, HandoffConfig()).close

        async def answer(question: Any) -> dict[str, float]:
            return begun

        async with joined(loopback("bench-queue", "prefill"), engine, build) as mesh:
            pipe.send(mesh.own.port)
            await answer_until_told(pipe, answer)
        await engine.close()

    uvloop.run(serve())


@dataclass
class _Outcome:
    pushed_s: float
    done_s: float
    result: HandoffResult


class _Decode:
    """A decode worker that hands prompts over and takes no other part."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._num_requests = 0
        self.requester: PrefillRequester

    def build(self, mesh: Mesh) -> Callable[[], None]:
        self.requester = PrefillRequester(mesh, self.engine, HandoffConfig(max_prefill_queue=1 << 20))
        return self.requester.close

    def can_hand_over(self, num_workers: int = 1) -> bool:
        """Whether so many prefill workers and this peer reach each other."""
        probe = GenerateRequest("probe", self.engine.card.model, array("I", [1, 1]))
        return len(self.requester.choice.candidates(probe)) == num_workers

    async def hand_over(self, num_tokens: int) -> tuple[str, _Outcome]:
        """Have a prompt of so many tokens prefilled; no two prompts share a prefix."""
        self._num_requests += 1
        request_id = f"r{self._num_requests}"
        tokens = array("I", [random.getrandbits(32), *([1] * num_tokens)])
        request = GenerateRequest(request_id, self.engine.card.model, tokens)
        done: asyncio.Future[HandoffResult] = asyncio.get_running_loop().create_future()
        candidates = self.requester.choice.candidates(request)
        random.shuffle(candidates)  # no router has ranked them
        pushed_s = time.monotonic()
        self.requester.start(request, candidates, pushed_s + 600.0, done.set_result, lambda name: None)
        result = await done
        if result.reservation is not None:
            result.reservation.release()
        return request_id, _Outcome(pushed_s, time.monotonic(), result)


async def compare_start(prefill: Connection, floor_port: int, num_pairs: int, num_prompts: int) -> dict[str, Any]:
    """Alternate between prompts to an idle worker and the echo."""
    engine = BenchEngine(bench_layout(1, _BLOCK_TOKENS))
    decode = _Decode(engine)
    config = loopback("bench-queue", "decode", seeds=(f"127.0.0.1:{prefill.recv()}",))
    starts, floors = [], []
    async with joined(config, engine, decode.build):
        await until(decode.can_hand_over)
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(f"tcp://127.0.0.1:{floor_port}")
            for number in range(num_pairs + 1):
                outcomes = dict([await decode.hand_over(_BLOCK_TOKENS) for _ in range(num_prompts)])
                prefill.send("begun")
                begun = await asyncio.to_thread(prefill.recv)
                took_us = [(begun[request_id] - outcome.pushed_s) * 1e6 for request_id, outcome in outcomes.items()]
                floor_us = time_floor(socket, num_prompts)
                if number:  # the first round warms up
                    starts.append(statistics.median(took_us))
                    floors.append(floor_us)
            socket.send(b"stop", zmq.NOBLOCK)
            await asyncio.sleep(0.05)
    return {
        "start_us_p50": round(statistics.median(starts), 1),
        "floor_us_p50": round(statistics.median(floors), 1),
        "ratio": ratio_of(starts, floors).to_dict(),
    }


def draw_arrivals(num_prompts: int, num_workers: int, load: float, seed: int) -> list[tuple[float, int]]:
    """Moments in seconds, Poisson, and lengths in tokens, log-normal."""
    rng = random.Random(seed)
    lengths = [min(_MOST_TOKENS, max(_BLOCK_TOKENS, int(rng.lognormvariate(math.log(_MEDIAN_TOKENS), _SIGMA)))) for _ in range(num_prompts)]
    rate_per_s = load * num_workers * _PREFILL_TOKENS_PER_S / statistics.mean(lengths)
    arrivals, now_s = [], 0.0
    for length in lengths:
        now_s += rng.expovariate(rate_per_s)
        arrivals.append((now_s, length))
    return arrivals


def ideal_waits_s(arrivals: list[tuple[float, int]], num_workers: int) -> list[float]:
    """One central queue, first come first served, with no time between two prompts."""
    free_at_s = [0.0] * num_workers
    waits = []
    for arrived_s, length in arrivals:
        begins_s = max(arrived_s, heapq.heappop(free_at_s))
        waits.append(begins_s - arrived_s)
        heapq.heappush(free_at_s, begins_s + length / _PREFILL_TOKENS_PER_S)
    return waits


async def measure_waits(ports: list[int], arrivals: list[tuple[float, int]]) -> tuple[list[float], dict[str, int]]:
    """The same arrivals through the real queue, from two decode workers in turn."""
    seeds = tuple(f"127.0.0.1:{port}" for port in ports)
    decodes = [_Decode(_dummy()) for _ in range(2)]
    async with AsyncExitStack() as stack:
        for decode in decodes:
            await decode.engine.start()  # one that is down reserves nothing
            stack.push_async_callback(decode.engine.close)
        meshes = [
            await stack.enter_async_context(joined(loopback("bench-queue", "decode", seeds=seeds), decode.engine, decode.build))
            for decode in decodes
        ]
        await until(lambda: all(decode.can_hand_over(len(ports)) for decode in decodes))
        for decode in decodes:
            await asyncio.gather(*(decode.hand_over(_BLOCK_TOKENS) for _ in range(8)))  # connections are warm
        began_s = time.monotonic()
        waiting = []
        for number, (arrives_s, length) in enumerate(arrivals):
            await asyncio.sleep(began_s + arrives_s - time.monotonic())
            waiting.append(asyncio.create_task(decodes[number % 2].hand_over(length)))
        outcomes = [(await task)[1] for task in waiting]
        hedged = sum(mesh.counters.snapshot().get("tickets_hedged", 0) for mesh in meshes)
    assert all(outcome.result.state is TaskState.DONE for outcome in outcomes)
    waits = [
        outcome.done_s - outcome.pushed_s - length / _PREFILL_TOKENS_PER_S for outcome, (_, length) in zip(outcomes, arrivals, strict=True)
    ]
    return waits, {"hedged": hedged}


def measure_load(num_workers: int, num_prompts: int, load: float, seed: int) -> dict[str, Any]:
    """Real and ideal, on the same arrivals."""
    arrivals = draw_arrivals(num_prompts, num_workers, load, seed)
    ideal = ideal_waits_s(arrivals, num_workers)
    with contextlib.ExitStack() as stack:
        pipes = [stack.enter_context(started(prefill_peer, False)) for _ in range(num_workers)]
        waits, notes = uvloop.run(measure_waits([pipe.recv() for pipe in pipes], arrivals))
    return {
        "workers": num_workers,
        "prompts": num_prompts,
        "load": load,
        "mean_wait_ms": round(statistics.mean(waits) * 1000, 2),
        "ideal_mean_wait_ms": round(statistics.mean(ideal) * 1000, 2),
        "ratio": round(statistics.mean(waits) / statistics.mean(ideal), 4),
        "p99_wait_ms": round(sorted(waits)[int(len(waits) * 0.99)] * 1000, 2),
        "ideal_p99_wait_ms": round(sorted(ideal)[int(len(ideal) * 0.99)] * 1000, 2),
        **notes,
    }


@click.command()
@json_option
@click.option("--pairs", default=20, show_default=True, help="Alternations of the first half.")
@click.option("--prompts", default=100, show_default=True, help="In each turn of the first half.")
@click.option("--load-prompts", default=2000, show_default=True, help="Of the second half.")
@click.option("--workers", default=4, show_default=True)
@click.option("--load", default=0.8, show_default=True, help="Share of what the workers can do.")
@click.option("--seed", default=1, show_default=True)
def main(as_json: bool, pairs: int, prompts: int, load_prompts: int, workers: int, load: float, seed: int) -> None:
    """Time to start on an idle worker, and waiting under load against one ideal central queue."""
    with started(prefill_peer, True) as prefill, started(echo_socket) as floor:
        start = uvloop.run(compare_start(prefill, floor.recv(), pairs, prompts))
    found = {"start": start, "waiting": measure_load(workers, load_prompts, load, seed)}
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    ratio, waiting = start["ratio"], found["waiting"]
    click.echo(f"ticket to start of prefill, idle   {start['start_us_p50']:8.1f} us  p50")
    click.echo(f"blocking DEALER/ROUTER             {start['floor_us_p50']:8.1f} us  p50")
    click.echo(f"ratio                              {ratio['median']:8.2f}     {interval(ratio)}")
    click.echo(
        f"mean wait, {workers} workers at {load:.0%}        {waiting['mean_wait_ms']:8.2f} ms     p99 {waiting['p99_wait_ms']:.0f} ms"
    )
    ideal = f"{waiting['ideal_mean_wait_ms']:8.2f} ms     p99 {waiting['ideal_p99_wait_ms']:.0f} ms"
    click.echo(f"one ideal central queue            {ideal}")
    click.echo(f"ratio                              {waiting['ratio']:8.3f}")


if __name__ == "__main__":
    main()
