"""Clients of a mesh under faults that come at random: of all kinds on five hosts, and of its prefill workers."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.chaos import run
from tests.harness import Host, Lan, Process, pace
from tests.harness.records import Record
from tests.lan.meshes import long_prompts, start_recorded, text_of, undisturbed

NUM_REQUESTS, NUM_AT_ONCE = 1000, 8
PERIOD_S = 1.0
OPTIONS = ("--engine-opt", "prefill_tokens_per_s=20000", "--engine-opt", "step_ms=2")
SHORT = ("--engine-opt", "prefill_tokens_per_s=5000", "--engine-opt", "step_ms=2", "--max-local-prefill-tokens", "0")
"""For prompts that go with their tickets: they take some 20 ms, so that faults meet them."""


class Chaos:
    """Every second one prefill worker is killed and started again, or stopped and continued after one to four seconds."""

    def __init__(self, workers: list[tuple[Host, Process]], record: Path, options: tuple[str, ...], seed: int) -> None:
        self._workers, self._record, self._options, self._rng = workers, record, options, random.Random(seed)
        self._stopped: list[tuple[float, Process]] = []
        self._is_over = threading.Event()
        self.num_killed = self.num_stopped = 0

    def run(self) -> None:
        """Until `end`."""
        due_at = time.monotonic()
        while not self._is_over.is_set():
            due_at += PERIOD_S
            pace(max(0.0, due_at - time.monotonic()))
            self._resume(time.monotonic())
            number = self._rng.randrange(len(self._workers))
            host, process = self._workers[number]
            if any(process is stopped for _, stopped in self._stopped):
                continue
            if self._rng.random() < 0.5:
                process.kill()
                self._workers[number] = (host, host.run("--role", "prefill", "--record", str(self._record), *self._options))
                self.num_killed += 1
            else:
                process.stop()
                self._stopped.append((time.monotonic() + self._rng.choice((1.0, 2.0, 4.0)), process))
                self.num_stopped += 1
        self._resume(float("inf"))

    def _resume(self, now_s: float) -> None:
        for at_s, process in self._stopped[:]:
            if at_s <= now_s:
                process.resume()
                self._stopped.remove((at_s, process))

    def end(self) -> None:
        """No more faults."""
        self._is_over.set()


@pytest.mark.full
@pytest.mark.parametrize(("repeats", "options"), [(20, OPTIONS), (2, SHORT)], ids=["long", "short"])
def test_a_thousand_requests_under_chaos_are_each_answered_right_and_once(
    lan: Lan, tmp_path: Path, repeats: int, options: tuple[str, ...]
) -> None:
    path = tmp_path / "record.jsonl"
    mesh = start_recorded(lan, path, 2, 0, *options)
    hosts = [lan.add_host() for _ in range(3)]
    mesh.prefill = [host.run("--role", "prefill", "--record", str(path), *options) for host in hosts]
    mesh.wait_until_all_meet()
    chaos = Chaos(list(zip(hosts, mesh.prefill, strict=True)), path, options, seed=20)
    prompts = long_prompts(NUM_REQUESTS, repeats)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(chaos.run)
        try:
            texts = [text_of(answer) for answer in mesh.complete_all(prompts, NUM_AT_ONCE)]
        finally:
            chaos.end()
        running.result()
    record = Record(path)
    record.check()
    report(record, chaos)
    assert texts == undisturbed(lan, prompts)
    assert chaos.num_killed >= 3 and chaos.num_stopped >= 3 and record.of("attempt_failed")


def report(record: Record, chaos: Chaos) -> None:
    """What happened, for whoever runs it with `-s`."""
    ends = [event.details["state"] for event in record.of("handoff_ended")]
    counts = ", ".join(f"{ends.count(state)} {state}" for state in sorted(set(ends)))
    failed = len(record.of("attempt_failed"))
    took_s = record.events[-1].at_s - record.events[0].at_s
    print(
        f"\n{len(record.of('submit'))} requests in {took_s:.0f} s: {counts}; {chaos.num_killed} killed, {chaos.num_stopped} stopped,",
        end=" ",
    )
    print(f"{failed} attempts made again")


@pytest.mark.parametrize("seconds", [60.0, pytest.param(600.0, marks=pytest.mark.full)])
def test_faults_of_all_kinds_on_five_hosts_cost_clients_nothing(
    lan: Lan, tmp_path: Path, seconds: float
) -> None:
    path = tmp_path / "record.jsonl"
    outcome = run(lan, 1, seconds, path)
    seen = outcome.seen
    print(f"\n{seen.num_asked} requests, {seen.num_migrated} went on elsewhere, {dict(seen.errors)}")
    assert not seen.is_bad, seen
    assert outcome.is_whole and not outcome.left
    assert seen.num_right > 2 * seconds and seen.num_migrated
    Record(path).check()
