"""Streams whose decode worker is lost: another one goes on, and a client sees a pause and nothing else."""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Host, Lan, pace, wait_until
from tests.harness.engines import KILL_MARK
from tests.harness.pressure import allowance_s
from tests.harness.records import Record
from tests.lan.llama_mesh import SERVED, Load, start_front
from tests.lan.meshes import READY_S, LanMesh, undisturbed
from tests.lan.streams import Stream, reading, undisturbed_texts

FAILURE_TIMEOUT_S = 1.5
PACED = ("--engine-opt", "step_ms=10")


@dataclass
class Workers(LanMesh):
    """A mesh whose decode workers can be started again."""

    hosts: list[Host] = field(default_factory=list)
    """Of the decode workers."""
    options: tuple[str, ...] = ()

    def start_again(self, index: int) -> None:
        """Kill a decode worker, and start another one on its host."""
        self.decode[index].kill()
        self.decode[index] = self.hosts[index].run("--role", "decode", *self.options)

    def busy(self) -> list[str]:
        """Names of the workers that have sequences."""
        return [peer["name"] for peer in self.peers() if (peer["load"] or {}).get("num_running")]


def start(lan: Lan, num_decode: int, *options: str, front: tuple[str, ...] = ()) -> Workers:
    """Frontend, processor and router on one host, each worker on a host of its own."""
    host = lan.add_host()
    mesh = Workers(host, host.run("--role", "frontend,processor,router", "--policy", "round-robin", *front))
    mesh.options = (*PACED, *options)
    mesh.hosts = [lan.add_host() for _ in range(num_decode)]
    mesh.decode = [host.run("--role", "decode", *mesh.options) for host in mesh.hosts]
    mesh.wait_until_ready()
    return mesh


def test_row_6_a_stream_goes_on_at_another_worker_when_its_own_is_killed(lan: Lan) -> None:
    mesh = start(lan, 2)
    streams = [Stream(mesh, f"stream {number}", 200) for number in range(2)]
    with reading(streams):
        lost, survivor = mesh.names([mesh.decode[1], mesh.decode[0]])
        mesh.decode[1].kill()
    (moved,) = [stream for stream in streams if stream.receipt["migrations"]]
    (continued,) = moved.receipt["continuations"]
    assert (continued["from"], continued["to"], continued["outcome"]) == (lost, survivor, "peer_lost")
    assert moved.receipt["peers"]["decode"] == survivor and moved.receipt["tokens"]["completion"] == 200
    assert continued["pause_ms"] <= 500, continued
    assert [stream.text for stream in streams] == undisturbed_texts(mesh, 2, 200)


def test_row_6_a_worker_that_is_stopped_for_3_s_doubles_no_token(lan: Lan) -> None:
    mesh = start(lan, 2)
    streams = [Stream(mesh, f"stream {number}", 500) for number in range(4)]
    with reading(streams):
        mesh.decode[1].stop()
        began_s = time.monotonic()
        pace(3.0)
        mesh.decode[1].resume()
    moved = [stream for stream in streams if stream.receipt["migrations"]]
    assert len(moved) == 2 and all(stream.receipt["continuations"][0]["outcome"] == "peer_silent" for stream in moved)
    longest_s = max(stream.longest_pause_s for stream in streams)
    assert longest_s <= FAILURE_TIMEOUT_S + 0.5 + allowance_s(began_s), longest_s
    wait_until(lambda: not mesh.busy(), READY_S, "nothing runs any more")
    assert [stream.text for stream in streams] == undisturbed_texts(mesh, 4, 500)


def test_row_6_the_only_worker_may_be_silent_and_go_on_or_be_killed_and_started_again(lan: Lan) -> None:
    mesh = start(lan, 1)
    stream = Stream(mesh, "stream 0", 500)
    with reading([stream]):
        mesh.decode[0].stop()
        pace(FAILURE_TIMEOUT_S + 1.0)
        mesh.decode[0].resume()
        num_before = len(stream.chunks)
        wait_until(lambda: len(stream.chunks) > num_before + 10, READY_S, "the stream goes on")
        mesh.start_again(0)
    assert [found["outcome"] for found in stream.receipt["continuations"]] == ["peer_lost"]
    assert [stream.text] == undisturbed_texts(mesh, 1, 500)


def test_row_18_a_stream_that_outlasts_the_drain_of_its_worker_goes_on_at_another(lan: Lan) -> None:
    mesh = start(lan, 2, "--drain-timeout", "0.5")
    streams = [Stream(mesh, f"stream {number}", 300) for number in range(2)]
    with reading(streams):
        mesh.decode[1].terminate()
    assert mesh.decode[1].wait() == 0
    (moved,) = [stream for stream in streams if stream.receipt["migrations"]]
    assert [found["outcome"] for found in moved.receipt["continuations"]] == ["draining"]
    assert [stream.text for stream in streams] == undisturbed_texts(mesh, 2, 300)


def kill_whoever_has(mesh: Workers, stream: Stream) -> None:
    """Wait until the only stream that runs has more tokens, and kill its worker."""
    num_before = len(stream.chunks)
    wait_until(lambda: len(stream.chunks) > num_before + 10, READY_S, "the stream goes on")
    wait_until(lambda: len(mesh.busy()) == 1, READY_S, "one worker has it")
    next(found for found in mesh.decode if mesh.names([found]) == mesh.busy()).kill()


def test_row_6_a_stream_survives_each_of_the_workers_that_have_it(lan: Lan) -> None:
    mesh = start(lan, 4)
    stream = Stream(mesh, "stream 0", 600)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream.run)
        for _ in range(3):
            kill_whoever_has(mesh, stream)
        running.result()
    assert stream.receipt["migrations"] == 3
    assert [stream.text] == undisturbed_texts(mesh, 1, 600)


def test_row_20_a_stream_that_kills_whoever_goes_on_with_it_ends_after_two(lan: Lan) -> None:
    mesh = start(lan, 4, "--engine", "tests.harness.engines:FatalContinuationEngine")
    stream = Stream(mesh, KILL_MARK, 600)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream.run)
        kill_whoever_has(mesh, stream)
        running.result()
    error = stream.chunks[-1]["error"]
    assert error["code"] == "gave_up" and not stream.is_done
    wait_until(lambda: len([process for process in mesh.decode if process.exit_code is not None]) == 3, READY_S, "three have died")
    mesh.frontend.wait_for_line("^1 decode", READY_S)


def kill_one_every_second(mesh: Workers, are_through: Callable[[], bool]) -> None:
    """The workers in turn, each started again at once, until nothing runs any more."""
    due_s = time.monotonic()
    for number in itertools.count():
        due_s += 1.0
        pace(max(0.0, due_s - time.monotonic()))
        if are_through():
            return
        mesh.start_again(number % len(mesh.decode))


PAUSE_S = 0.5
"""Beyond the prefill of prompt and tokens so far, which takes this engine no time."""


def assert_no_long_pause(streams: Sequence[Stream]) -> None:
    """No client waited for long between two chunks, but for what the machine stalled meanwhile."""
    for stream in streams:
        for sooner_s, later_s in itertools.pairwise(stream.came_s):
            if later_s - sooner_s > PAUSE_S:
                assert later_s - sooner_s <= PAUSE_S + allowance_s(sooner_s, later_s)


@pytest.mark.parametrize(
    ("num_streams", "num_tokens", "step_ms", "least_s", "least_migrations", "least_thrice"),
    [(10, 400, 10, 4.0, 5, 0), pytest.param(100, 300, 40, 10.0, 50, 10, marks=pytest.mark.full)],
    ids=["ten", "hundred"],
)
def test_row_6_streams_are_whole_while_a_worker_is_killed_every_second(
    lan: Lan,
    tmp_path: Path,
    num_streams: int,
    num_tokens: int,
    step_ms: int,
    least_s: float,
    least_migrations: int,
    least_thrice: int,
) -> None:
    path = tmp_path / "record.jsonl"
    record = ("--record", str(path))
    mesh = start(lan, 3, *record, "--engine-opt", f"step_ms={step_ms}", front=record)
    prompts = [f"stream {number}" for number in range(num_streams)]
    streams = [Stream(mesh, prompt, num_tokens) for prompt in prompts]
    with ThreadPoolExecutor(num_streams) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        kill_one_every_second(mesh, lambda: all(stream.done() for stream in running))
        for stream in running:
            stream.result()
    Record(path).check()
    assert min(stream.came_s[-1] - stream.came_s[0] for stream in streams) >= least_s
    continued = [found for stream in streams for found in stream.receipt["continuations"]]
    num_thrice = sum(stream.receipt["migrations"] >= 3 for stream in streams)
    longest_s = max(stream.longest_pause_s for stream in streams)
    print(f"\n{len(continued)} migrations, {num_thrice} streams with three or more")
    print(f"longest pause {longest_s:.2f} s")
    assert {found["outcome"] for found in continued} == {"peer_lost"}
    assert len(continued) >= least_migrations and num_thrice >= least_thrice
    assert_no_long_pause(streams)
    expected = undisturbed(lan, prompts, num_tokens, ignore_eos=True)
    assert [stream.text for stream in streams] == expected


LONG = "It is worth handing over to somebody else. " * 30
FIELDS = [f"field{number}" for number in range(6)]
SCHEMA = {"type": "object", "properties": {name: {"type": "string"} for name in FIELDS}, "required": FIELDS}
TOOL = {"type": "function", "function": {"name": "note", "parameters": SCHEMA}}
CHAT = [{"role": "user", "content": "Say something."}]
FEATURES: tuple[dict[str, Any], ...] = (
    {"presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "temperature": 0.9, "seed": 1},
    {"logprobs": 3, "stop": ["never said", "nor this"], "temperature": 0.7, "top_p": 0.9, "seed": 2},
    {"n": 3, "temperature": 1.1, "seed": 3, "echo": True},
    {"logit_bias": {"300": 4, "301": -100}, "min_tokens": 50, "temperature": 1.0, "min_p": 0.02, "seed": 4},
    {"messages": CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "ignore_eos": False},
    {"messages": CHAT, "tools": [TOOL], "tool_choice": "required", "ignore_eos": False},
    {"messages": CHAT, "logprobs": True, "top_logprobs": 2, "temperature": 0.8, "seed": 5},
    {"structured_outputs": {"regex": "([a-z]{4,8} ){40}"}, "ignore_eos": False, "temperature": 0.9, "seed": 6},
)


def run_all(streams: Sequence[Stream], faults: Sequence[Callable[[], None]]) -> list[list[str]]:
    """What all of them say. Before each fault all go on, or are through."""
    with ThreadPoolExecutor(len(streams)) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        for fault in faults:
            least = [len(stream.chunks) + 3 for stream in streams]

            def go_on(least: list[int] = least) -> bool:
                return all(stream.is_done or len(stream.chunks) >= count for stream, count in zip(streams, least, strict=True))

            wait_until(go_on, READY_S, "all streams go on")
            fault()
        for stream in running:
            stream.result()
    return [stream.said for stream in streams]


@pytest.mark.parametrize("num_prefill", [0, 2], ids=["computed there", "handed over"])
def test_row_6_whatever_was_asked_goes_on_without_gap_or_repeat(lan: Lan, num_prefill: int) -> None:
    slow = ("--engine-opt", "step_ms=25")
    mesh = start(lan, 3, *slow, "--max-local-prefill-tokens", "0")
    mesh.prefill = [lan.add_host().run("--role", "prefill", *slow) for _ in range(num_prefill)]
    mesh.wait_until_ready()
    mesh.wait_until_all_meet()

    def streams() -> list[Stream]:
        return [Stream(mesh, LONG, 100, **fields) for fields in FEATURES]

    disturbed = streams()
    found = run_all(disturbed, [lambda: mesh.start_again(0), lambda: mesh.start_again(1)])
    assert sum(stream.receipt["migrations"] for stream in disturbed) >= 3
    if num_prefill:
        moved = [stream.receipt for stream in disturbed if stream.receipt["migrations"]]
        assert any(receipt["peers"]["prefill"] for receipt in moved)
    mesh.wait_until_ready()
    assert found == run_all(streams(), [])


def test_row_6_a_real_model_goes_on_with_the_same_bits(lan: Lan, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    from tests.engines.tiny_models import make_model

    load = Load(make_model(tmp_path / "tiny.gguf", seed=1), 4, lengths=(20, 300), kv_cache_tokens=8192)
    mesh = start_front(lan, "--policy", "round-robin")
    workers = [mesh.start_worker(lan, "decode", *load.engine()) for _ in range(3)]
    mesh.wait()

    def streams() -> list[Stream]:
        fields: dict[str, Any] = {"model": SERVED, "logprobs": 2, "temperature": 0.9, "frequency_penalty": 0.3}
        return [Stream(mesh, prompt, 700, seed=number, **fields) for number, prompt in enumerate(load.prompts())]

    disturbed = streams()
    found = run_all(disturbed, [workers[0].kill, workers[1].kill])
    assert sum(stream.receipt["migrations"] for stream in disturbed) >= 2
    assert found == run_all(streams(), [])


def test_row_6_a_link_that_is_down_costs_a_pause_and_the_worker_behind_it_is_told_when_it_is_up(lan: Lan) -> None:
    mesh = start(lan, 2)
    streams = [Stream(mesh, f"stream {number}", 700) for number in range(4)]
    with reading(streams):
        began_s = time.monotonic()
        mesh.hosts[1].link_down()
        wait_until(lambda: mesh.busy() == mesh.names(mesh.decode[:1]), READY_S, "the other one has all of them")
        pace(1.0)
        mesh.hosts[1].link_up()
    moved = [stream for stream in streams if stream.receipt["migrations"]]
    assert len(moved) == 2
    assert max(stream.longest_pause_s for stream in streams) <= FAILURE_TIMEOUT_S + 0.5 + allowance_s(began_s)
    wait_until(lambda: len(mesh.peers()) == 3 and not mesh.busy(), READY_S, "both are idle")
    mesh.wait_until_ready()
    assert [stream.text for stream in streams] == undisturbed_texts(mesh, 4, 700)
