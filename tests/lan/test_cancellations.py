"""Clients that leave at random moments among clients that stay: nothing is left of the former, and the latter notice nothing."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.harness import Process, meshserve_command, wait_until
from tests.harness.held import held
from tests.harness.records import Record
from tests.lan.cancelling import Asked, Told, make_load, run_load

READY_S = 20.0
FREE_S = 5.0
"""An in-flight reservation that no worker reports is dropped within two seconds."""
NUM_AT_ONCE = 96
PACE = ("--engine-opt", "prefill_tokens_per_s=20000", "--engine-opt", "step_ms=10", "--engine-opt", "max_batch=32")
ALONE = ("--interface", "127.0.0.1", "--no-mdns")


class Apart(NamedTuple):
    """A frontend, a processor, a router, two decode and two prefill workers, each a peer of its own."""

    port: int
    record: Path

    def peers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"http://127.0.0.1:{self.port}/mesh/peers", headers={"connection": "close"}).json()
        return found


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Apart]:
    record = tmp_path / "record.jsonl"
    options = (*ALONE, "--mesh", "cancellations", "--record", str(record), "--max-local-prefill-tokens", "64", *PACE)
    with ExitStack() as stack:
        front = stack.enter_context(Process(meshserve_command("run", "--role", "frontend", "--http", "127.0.0.1:0", *options)))
        ready = front.ready(READY_S)
        seed = ("--peer", ready["address"].removeprefix("tcp://"))
        roles = ("processor", "router", "decode", "decode", "prefill", "prefill")
        processes = [stack.enter_context(Process(meshserve_command("run", "--role", role, *options, *seed))) for role in roles]
        mesh = Apart(int(ready["http"].rpartition(":")[2]), record)
        wait_until(lambda: have_met(mesh.peers(), 7), READY_S, "all peers reach each other")
        yield mesh
        for process in [front, *processes]:
            process.terminate()
        for process in [front, *processes]:
            assert process.wait() == 0
            assert "Traceback" not in process.stderr_text


def have_met(peers: list[dict[str, Any]], count: int) -> bool:
    return len(peers) == count and all(peer["num_reached"] == count - 1 for peer in peers)


def undisturbed(load: Sequence[Asked]) -> dict[str, Told]:
    """What a peer alone tells those who stay."""
    run = meshserve_command("run", "--role", "all", *ALONE, "--mesh", "undisturbed", "--http", "127.0.0.1:0")
    with Process(run) as alone:
        port = int(alone.ready(READY_S)["http"].rpartition(":")[2])
        found = asyncio.run(run_load(port, [asked for asked in load if not asked.leaves], 16))
        alone.terminate()
        assert alone.wait() == 0
        return found


def check_cancellations(apart: Apart, num_each: int, seed: int) -> None:
    load = make_load(num_each, num_each, seed)
    told = asyncio.run(run_load(apart.port, load, NUM_AT_ONCE))
    wait_until(lambda: not held(apart.peers()), FREE_S, "nothing is held anywhere")
    wait_until(lambda: connections(apart) == 1, FREE_S, "no connection is open but the asker's own")
    record = Record(apart.record)
    record.check()
    print(describe(apart, record))
    assert len(told) == num_each
    expected = undisturbed(load)
    assert {label: answer for label, answer in told.items() if answer != expected[label]} == {}


def connections(apart: Apart) -> int:
    return sum(int(peer["held"].get("http_connections", 0)) for peer in apart.peers())


def describe(apart: Apart, record: Record) -> str:
    """Where those were that left."""
    outcomes = Counter(event.details["outcome"] for event in record.of("result"))
    handoffs = Counter(event.details["state"] for event in record.of("handoff_ended"))
    counters = Counter[str]()
    for peer in apart.peers():
        counters.update({name: peer["counters"].get(name, 0) for name in ("requests_refused", "requests_cancelled", "clients_gone")})
    struck, begun = len(record.of("struck")), len(record.of("prefill_begun"))
    return f"sequences {dict(outcomes)}; handoffs {dict(handoffs)}; struck {struck}, begun {begun}; {dict(counters)}"


def test_sixty_clients_that_leave_at_random_moments_leave_nothing_behind_among_sixty_that_stay(apart: Apart) -> None:
    check_cancellations(apart, 60, seed=1)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_thousand_clients_that_leave_at_random_moments_leave_nothing_behind_among_a_thousand_that_stay(apart: Apart) -> None:
    check_cancellations(apart, 1000, seed=2)
