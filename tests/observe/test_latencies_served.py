"""Times to the first token and between tokens, by worker: of two workers, one slow, behind two processors, all real processes."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from meshserve.telemetry import Histogram, added_up
from tests.harness import Process, meshserve_command, run_command, wait_until

READY_S = 10.0
ALONE = ("--interface", "127.0.0.1", "--no-mdns", "--mesh", "latencies")
STEP_MS = {"fast": 1, "slow": 60}
NUM_ASKED, NUM_TOKENS = 4, 6
"""Of each front, one after the other; every second one goes to the same worker."""


@dataclass
class Served:
    """The mesh, after it was asked."""

    seed: str
    fronts: list[httpx.Client]
    workers: dict[str, Process]

    def peers(self) -> dict[str, dict[str, Any]]:
        """By name, as the command says, once all of them answered it."""

        def answers() -> list[dict[str, Any]] | None:
            found: list[dict[str, Any]] = json.loads(run_command(command).stdout)
            return found if all(peer["rtt_ms"] is not None for peer in found) else None

        command = meshserve_command("peers", "--json", *ALONE, "--peer", self.seed)
        return {peer["name"]: peer for peer in wait_until(answers, READY_S, "every peer answers")}

    def metric(self, name: str) -> dict[str, float]:
        """Samples of this name, by their labels."""
        text = self.fronts[0].get("/metrics").text
        return {labels: float(value) for labels, value in re.findall(rf"^meshserve_{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE)}

    def ask(self, front: httpx.Client) -> str:
        """One request; the worker that served it."""
        body = {"model": "dummy", "prompt": "Hello", "max_tokens": NUM_TOKENS, "ignore_eos": True, "meshserve": {"receipt": True}}
        answer = front.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        worker: str = answer.json()["meshserve"]["peers"]["decode"]
        return worker


def front_command(name: str, *options: str) -> list[str]:
    roles = ("--role", "frontend,processor,router", "--policy", "round-robin")
    return meshserve_command("run", *roles, "--name", name, "--http", "127.0.0.1:0", *ALONE, *options)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with ExitStack() as stack:
        first = stack.enter_context(Process(front_command("front-1")))
        seed = first.ready(READY_S)["address"].removeprefix("tcp://")
        fronts = [first, stack.enter_context(Process(front_command("front-2", "--peer", seed)))]
        workers = {}
        for name, step_ms in STEP_MS.items():
            options = ("--role", "decode", "--name", name, "--engine-opt", f"step_ms={step_ms}")
            workers[name] = stack.enter_context(Process(meshserve_command("run", *options, *ALONE, "--peer", seed)))
        for front in fronts:
            front.wait_for_line("^2 decode, 0 prefill ready", READY_S)
        no_pool = httpx.Limits(max_keepalive_connections=0)  # a test leaves no connection to the next
        clients = [
            stack.enter_context(httpx.Client(base_url=front.ready(READY_S)["http"], timeout=60.0, limits=no_pool)) for front in fronts
        ]
        mesh = Served(seed, clients, workers)
        served_by = [mesh.ask(client) for client in clients for _ in range(NUM_ASKED)]
        assert sorted(served_by) == ["fast"] * NUM_ASKED + ["slow"] * NUM_ASKED
        yield mesh


def num_of(histogram: list[Any]) -> int:
    return sum(histogram[1])


def median_ms(histogram: list[Any]) -> float:
    return Histogram.of_row(histogram).quantile_ms(0.5)


def test_a_slow_worker_and_a_fast_one_show_their_own_latencies(served: Served) -> None:
    peers = served.peers()
    slow, fast = (peers[name]["latencies"] for name in ("slow", "fast"))
    assert num_of(slow["ttft"]) == num_of(fast["ttft"]) == NUM_ASKED
    assert num_of(slow["itl"]) == NUM_ASKED * (NUM_TOKENS - 1) and slow["itl"][0] >= num_of(slow["itl"]) * 0.045
    assert median_ms(slow["itl"]) > 50 > median_ms(fast["itl"])
    for name in ("front-1", "front-2"):
        own, by_worker = peers[name]["histograms"], peers[name]["histograms_by_worker"]
        assert by_worker.keys() == {peers[worker]["incarnation"] for worker in STEP_MS} and peers[name]["latencies"] is None
        assert num_of(own["ttft"]) == NUM_ASKED and own["itl"] == added_up(by_worker.values())["itl"]


def test_top_shows_them_in_each_workers_row(served: Served) -> None:
    with Process(meshserve_command("top", *ALONE, "--peer", served.seed)) as process:
        figures = r"((?: +[\d.]+){4}) +[\d.]+$"  # TTFT, its p99, ITL, its p99; the round trip is the last
        found = {name: process.wait_for_line(rf"^{name} .*?{figures}", READY_S)[1].split() for name in ("slow", "fast", "front-1")}
        process.interrupt()
        assert process.wait() == 130
    assert 50 < float(found["slow"][2]) <= float(found["slow"][3])
    assert float(found["fast"][2]) < 50


def test_a_worker_that_died_mid_stream_stays_in_the_sums_and_its_own_series_end(served: Served) -> None:
    of_all, of_one = "inter_token_latency_seconds", "worker_inter_token_latency_seconds"
    assert sum(served.metric(f"{of_one}_count").values()) == sum(served.metric(f"{of_all}_count").values())
    assert len(served.metric(f"{of_one}_count")) == 4
    before = served.metric(f"{of_all}_count")
    body = {"model": "dummy", "prompt": "Hello", "max_tokens": 50_000, "ignore_eos": True, "stream": True}
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=served.fronts[0].base_url, timeout=60.0))
        for _ in STEP_MS:  # one at each worker
            lines = stack.enter_context(client.stream("POST", "/v1/completions", json=body)).iter_lines()
            assert sum("text" in next(lines) for _ in range(12)) >= 6
        served.workers["slow"].kill()
        served.workers["slow"].wait()
        wait_until(lambda: len(served.metric(f"{of_one}_count")) == 2, READY_S, "both processors miss it")
    wait_until(lambda: all(peer["held"].get("requests", 0) == 0 for peer in served.peers().values()), READY_S, "nothing runs")
    slow_s, slow = (
        sum(served.metric(f"{of_all}_{kind}").values()) - sum(served.metric(f"{of_one}_{kind}").values()) for kind in ("sum", "count")
    )
    after = served.metric(f"{of_all}_count")
    assert slow >= NUM_ASKED * (NUM_TOKENS - 1) + 4 and slow_s >= 0.045 * slow
    assert after.keys() == before.keys() and all(after[labels] >= before[labels] for labels in before)
    assert served.peers()["front-1"]["histograms_by_worker"].keys() == {served.peers()["fast"]["incarnation"]}
