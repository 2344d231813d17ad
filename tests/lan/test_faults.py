"""Workers that are killed or stopped, as the rest of the mesh sees it."""

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.harness import Host, Lan, Process, wait_until
from tests.harness.pressure import allowance_s
from tests.harness.waiting import pace
from tests.lan.meshes import HTTP, READY_S, LanMesh, start_aggregated, text_of, undisturbed
from tests.lan.streams import Stream

NOTICED_S = 0.2
FAILURE_TIMEOUT_S = 1.5


def noticed_after_s(mesh: LanMesh, since: float, line: str) -> float:
    """Seconds from `since` until the router's own line about its workers."""
    mesh.frontend.wait_for_line(line, READY_S, since)
    return next(found.at for found in mesh.frontend.stdout if found.at >= since and found.text.startswith(line.strip("^"))) - since


def test_a_killed_worker_is_noticed_at_once_and_the_other_serves_on(lan: Lan) -> None:
    mesh = start_aggregated(lan)
    killed_at = time.monotonic()
    mesh.decode[1].kill()
    assert noticed_after_s(mesh, killed_at, "^1 decode") <= NOTICED_S + allowance_s(killed_at)
    (survivor,) = mesh.names(mesh.decode[:1])
    answers = [mesh.complete(f"prompt {number}") for number in range(4)]
    assert {answer["meshserve"]["peers"]["decode"] for answer in answers} == {survivor}


def test_a_stopped_worker_gets_no_new_work_after_the_failure_timeout_and_is_used_again_when_it_goes_on(lan: Lan) -> None:
    mesh = start_aggregated(lan)
    stopped_at = time.monotonic()
    mesh.decode[1].stop()
    assert noticed_after_s(mesh, stopped_at, "^1 decode") <= FAILURE_TIMEOUT_S + 0.3 + allowance_s(stopped_at)
    (survivor,) = mesh.names(mesh.decode[:1])
    answers = [mesh.complete(f"prompt {number}") for number in range(4)]
    assert {answer["meshserve"]["peers"]["decode"] for answer in answers} == {survivor}
    mesh.decode[1].resume()
    mesh.frontend.wait_for_line("^2 decode", READY_S, time.monotonic() - 0.05)


def test_while_the_only_worker_is_silent_requests_wait_for_the_failure_timeout(lan: Lan) -> None:
    front, host = lan.add_host(), lan.add_host()
    mesh = LanMesh(front, front.run("--role", "frontend,processor,router"))
    mesh.decode = [host.run("--role", "decode")]
    mesh.wait_until_ready()
    worker = mesh.decode[0]
    assert text_of(mesh.complete("before"))
    for is_back in (True, False):
        stopped_at = time.monotonic()
        worker.stop()
        noticed_after_s(mesh, stopped_at, "^no workers")
        with ThreadPoolExecutor(1) as pool:
            asked_at = time.monotonic()
            asked = pool.submit(front.post_json, f"{HTTP}/v1/completions", {"model": "dummy", "prompt": "meanwhile", "max_tokens": 4})
            if is_back:
                pace(FAILURE_TIMEOUT_S / 3)
                worker.resume()
            response = asked.result()
        took_s = time.monotonic() - asked_at
        assert response.status == (200 if is_back else 503), response.body
        assert took_s <= FAILURE_TIMEOUT_S + 0.5 + allowance_s(asked_at)
        assert is_back or took_s >= FAILURE_TIMEOUT_S
    worker.resume()


def test_what_had_not_started_on_a_stopped_worker_is_served_elsewhere(lan: Lan) -> None:
    mesh = start_aggregated(lan)
    mesh.decode[1].stop()
    began = time.monotonic()
    answers = mesh.complete_all([f"prompt {number}" for number in range(8)], num_at_once=8)
    assert time.monotonic() - began < FAILURE_TIMEOUT_S + 1.0 + allowance_s(began)
    assert len(answers) == 8
    rerouted = [answer for answer in answers if answer["meshserve"]["attempts"]]
    assert rerouted and all(attempt["role"] == "decode" for answer in rerouted for attempt in answer["meshserve"]["attempts"])


def test_a_stream_that_must_not_migrate_ends_in_a_clear_error_and_without_done_when_its_worker_is_killed(lan: Lan) -> None:
    mesh = start_paced(lan, "--max-migrations", "0")
    lines: dict[int, list[str]] = {0: [], 1: []}

    def follow(number: int) -> None:
        body = {"model": "dummy", "prompt": f"stream {number}", "max_tokens": 200, "stream": True, "ignore_eos": True}
        with mesh.front.stream("POST", f"{HTTP}/v1/completions", body, timeout_s=60.0) as received:
            for line in received:
                lines[number].append(line)

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(follow, number) for number in (0, 1)]
        wait_until(lambda: all(len(found) > 10 for found in lines.values()), READY_S, "both streams run")
        mesh.decode[1].kill()
        for stream in both:
            stream.result()
    ends = [[line for line in found if line.strip()][-1] for found in lines.values()]
    broken = [end for end in ends if "error" in end]
    assert len(broken) == 1 and sum("[DONE]" in end for end in ends) == 1
    error = json.loads(broken[0].removeprefix("data: "))["error"]
    assert error["code"] == "peer_lost" and mesh.names(mesh.decode[1:])[0] in error["message"]


def start_paced(lan: Lan, *front: str) -> LanMesh:
    """Two workers that take 10 ms a token, in turn."""
    options = ("--engine-opt", "step_ms=10")
    host1, host2 = lan.add_host(), lan.add_host()
    mesh = LanMesh(host1, host1.run("--role", "frontend,processor,router", "--policy", "round-robin", *front))
    mesh.decode = [host1.run("--role", "decode", *options), host2.run("--role", "decode", *options)]
    mesh.wait_until_ready()
    return mesh


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_row_14_what_a_killed_processor_had_is_started_over_at_another_where_nothing_has_left(lan: Lan, is_stream: bool) -> None:
    hosts = [lan.add_host() for _ in range(4)]
    mesh = LanMesh(hosts[0], hosts[0].run("--role", "frontend"))
    processors = [host.run("--role", "processor,router") for host in hosts[1:3]]
    slow_start = ("--engine-opt", "prefill_tokens_per_s=20") if is_stream else ("--engine-opt", "step_ms=50")
    mesh.decode = [hosts[3].run("--role", "decode", *slow_start)]
    mesh.frontend.ready(READY_S)
    mesh.wait_until_all_meet(4)
    wait_until(lambda: mesh.front.get(f"{HTTP}/ready").status == 200, READY_S, "the front is ready")
    prompts = [f"question {number}" for number in range(8)]

    def ask(prompt: str) -> str:
        if not is_stream:
            return text_of(mesh.complete(prompt))
        body = {"model": "dummy", "prompt": prompt, "max_tokens": 24, "stream": True}
        with mesh.front.stream("POST", f"{HTTP}/v1/completions", body, timeout_s=60.0) as lines:
            events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert not any("error" in event for event in events), events
        return "".join(choice["text"] for event in events for choice in event["choices"])

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, prompt) for prompt in prompts]
        wait_until(lambda: sum(peer["held"].get("requests", 0) for peer in mesh.peers()) == 8, READY_S, "processors have them")
        processors[0].kill()
        texts = [answer.result() for answer in asked]
    assert texts == undisturbed(lan, prompts)
    (front,) = [peer for peer in mesh.peers() if peer["roles"] == ["frontend"]]
    assert front["counters"].get("requests_started_over", 0) >= 1


def test_draining_finishes_what_runs_and_takes_nothing_new(lan: Lan) -> None:
    mesh = start_paced(lan)
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(mesh.complete, f"prompt {number}", 60, ignore_eos=True) for number in range(8)]
        wait_until(lambda: sum((peer["load"] or {}).get("num_running", 0) for peer in mesh.peers()) == 8, READY_S, "eight run")
        terminated_at = time.monotonic()
        mesh.decode[1].terminate()
        mesh.frontend.wait_for_line("^1 decode", READY_S, terminated_at)
        later = [text_of(mesh.complete(f"later {number}", 2)) for number in range(4)]
        assert len(later) == 4
        assert all(len(text_of(future.result())) > 60 for future in running)
    assert mesh.decode[1].wait() == 0


@dataclass
class Split:
    """A mesh whose frontend, processor and decode worker have a host each.

    The worker's peer is a frontend too, which no fault befalls.
    """

    mesh: LanMesh
    hosts: dict[str, Host]
    processes: dict[str, Process]

    def num_running(self) -> int:
        """Sequences of the decode worker."""
        peers = self.hosts["decode"].get(f"{HTTP}/mesh/peers").json()
        return sum((peer["load"] or {}).get("num_running", 0) for peer in peers)


def start_split(lan: Lan) -> Split:
    roles = {"frontend": "frontend", "processor": "processor", "decode": "frontend,router,decode"}
    hosts = {name: lan.add_host(name) for name in roles}
    slow = ("--engine-opt", "step_ms=10")
    processes = {name: hosts[name].run("--role", roles[name], *slow) for name in roles}
    processes["decode"].wait_for_line("^1 decode", READY_S)
    split = Split(LanMesh(hosts["frontend"], processes["frontend"]), hosts, processes)
    split.mesh.wait_until_all_meet(3)
    return split


PROMPTS = [f"stream {number}" for number in range(4)]


def run_streams(
    pool: ThreadPoolExecutor, split: Split, num_tokens: int
) -> tuple[list[Stream], list[Future[Stream]]]:
    """Streams that have begun."""
    streams = [Stream(split.mesh, prompt, num_tokens) for prompt in PROMPTS]
    running = [pool.submit(stream.run) for stream in streams]

    def all_run() -> bool:
        return all(len(stream.chunks) > 10 for stream in streams)

    wait_until(all_run, READY_S, "all streams run")
    return streams, running


@pytest.mark.parametrize("silent", ["processor", pytest.param("frontend", marks=pytest.mark.full)])
def test_row_14_a_frontend_or_processor_that_is_silent_for_3_s_loses_no_stream(
    lan: Lan, silent: str
) -> None:
    split = start_split(lan)
    with ThreadPoolExecutor(4) as pool:
        streams, running = run_streams(pool, split, 400)
        split.processes[silent].stop()
        pace(3.0)
        split.processes[silent].resume()
        for stream in running:
            stream.result()
    assert not any(stream.receipt["migrations"] for stream in streams)
    assert [stream.text for stream in streams] == undisturbed(lan, PROMPTS, 400, ignore_eos=True)


DROPPED_S = 0.5
DEATH_S = 5.0
"""A silent peer is dead so long after it was suspected."""


@pytest.mark.parametrize(
    "is_silent",
    [False, pytest.param(True, marks=pytest.mark.full)],
    ids=["killed", "unplugged"],
)
@pytest.mark.parametrize("dead", ["frontend", "processor"])
def test_row_14_what_a_dead_frontend_or_processor_had_asked_for_is_dropped(
    lan: Lan, dead: str, is_silent: bool
) -> None:
    split = start_split(lan)
    with ThreadPoolExecutor(4) as pool:
        _, running = run_streams(pool, split, 10_000)
        died_s = time.monotonic()
        if is_silent:
            split.hosts[dead].link_down()
        else:
            split.processes[dead].kill()
        wait_until(lambda: split.num_running() == 0, 4 * DEATH_S, "the worker is idle")
        took_s = time.monotonic() - died_s
        if is_silent:
            split.processes[dead].kill()
            split.processes["frontend"].kill()
        for stream in running:
            assert stream.exception() or not stream.result().is_done
    print(f"dropped after {took_s:.2f} s")
    noticed_s = FAILURE_TIMEOUT_S + DEATH_S if is_silent else 0.0
    assert took_s <= noticed_s + DROPPED_S + allowance_s(died_s)
