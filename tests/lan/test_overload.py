"""A mesh that gets five times the load that it can serve."""

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from meshserve.cli.bench.compare import ratio_of
from tests.harness import Process, meshserve_command, pace
from tests.harness.pressure import allowance_s
from tests.harness.waiting import pace_async
from tests.lan.test_frontend_faults import ALONE, completion


class Outcome(NamedTuple):
    """What open-loop load came to."""

    accepted_s: list[float]
    statuses: Counter[int]
    retry_after: list[int]
    memory_bytes: int
    stalled_s: float = 0.0
    """While the load was offered."""

    @property
    def p99_s(self) -> float:
        return sorted(self.accepted_s)[int(len(self.accepted_s) * 0.99)]


NUM_PLACES, NUM_TOKENS, STEP_S = 8, 50, 0.02
CAPACITY_PER_S = NUM_PLACES / (NUM_TOKENS * STEP_S)


async def offer(port: int, per_s: float, duration_s: float, pid: int) -> Outcome:
    """Requests at times that do not depend on the answers. A bare client, so that it can be five times as fast as the mesh."""
    outcome = Outcome([], Counter(), [], 0)
    loop = asyncio.get_running_loop()
    most_bytes = 0

    async def one(at_s: float) -> None:
        await pace_async(max(0.0, at_s - loop.time()))
        body = completion(max_tokens=NUM_TOKENS)
        began_s = loop.time()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        told = await reader.read(-1)
        writer.close()
        await writer.wait_closed()
        status = int(told[9:12])
        outcome.statuses[status] += 1
        if status == 200:
            outcome.accepted_s.append(loop.time() - began_s - allowance_s(began_s))
        else:
            found = re.search(rb"retry-after: (\d+)", told)
            outcome.retry_after.append(int(found[1]) if found else 0)

    async def watch() -> None:
        nonlocal most_bytes
        while True:
            most_bytes = max(most_bytes, resident_bytes(pid))
            await pace_async(0.1)

    start_s = loop.time() + 0.1
    watching = loop.create_task(watch())
    await asyncio.gather(*(one(start_s + number / per_s) for number in range(int(per_s * duration_s))))
    watching.cancel()
    return outcome._replace(memory_bytes=most_bytes, stalled_s=allowance_s(start_s))


def resident_bytes(pid: int) -> int:
    """Memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.fixture
def paced() -> Iterator[tuple[Process, int]]:
    options = ("--engine-opt", f"step_ms={STEP_S * 1000:g}", "--engine-opt", f"max_batch={NUM_PLACES}")
    with Process(meshserve_command("run", "--role", "all", *ALONE, "--mesh", "front-load", "--http", "127.0.0.1:0", *options)) as peer:
        yield peer, int(peer.ready()["http"].rpartition(":")[2])
        peer.terminate()
        assert peer.wait() == 0 and "Traceback" not in peer.stderr_text


def check_row_21(five_times: Outcome, duration_s: float) -> None:
    assert set(five_times.statuses) == {200, 503}
    assert len(five_times.accepted_s) >= 0.85 * CAPACITY_PER_S * max(0.0, duration_s - five_times.stalled_s), "the mesh is used to the full"
    assert all(1 <= seconds <= 60 for seconds in five_times.retry_after)


def test_row_21_five_times_the_load_is_turned_away_with_a_time_to_come_back(paced: tuple[Process, int]) -> None:
    peer, port = paced
    five_times = asyncio.run(offer(port, 5 * CAPACITY_PER_S, 4.0, peer.pid))
    check_row_21(five_times, 4.0)
    assert five_times.p99_s <= 2 * (NUM_TOKENS * STEP_S) * 1.2, "a fifth more than two requests take, on a busy machine"


@pytest.mark.full
@pytest.mark.timeout(900)
def test_row_21_those_who_are_served_under_five_times_the_load_wait_hardly_longer(paced: tuple[Process, int]) -> None:
    peer, port = paced
    asyncio.run(offer(port, 0.8 * CAPACITY_PER_S, 10.0, peer.pid))
    at_first = resident_bytes(peer.pid)
    overloaded, relaxed = [], []
    for _ in range(10):
        outcome = asyncio.run(offer(port, 5 * CAPACITY_PER_S, 20.0, peer.pid))
        check_row_21(outcome, 20.0)
        assert outcome.memory_bytes - at_first <= 32 * 1024 * 1024
        overloaded.append(outcome.p99_s)
        pace(2.0)
        calm = asyncio.run(offer(port, 0.8 * CAPACITY_PER_S, 20.0, peer.pid))
        assert set(calm.statuses) == {200}
        relaxed.append(calm.p99_s)
    ratio = ratio_of(overloaded, relaxed)
    print(f"p99 of the accepted at five times the load against that at 80 %: {ratio}")
    assert ratio.low <= 2.0
