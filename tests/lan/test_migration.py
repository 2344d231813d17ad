"""Streams whose decode worker is lost: another one goes on, and a client sees a pause and nothing else."""

import json
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
from tests.lan.meshes import HTTP, READY_S, LanMesh

FAILURE_TIMEOUT_S = 1.5
PACED = ("--engine-opt", "step_ms=10")


class Stream:
    """One streamed completion or chat, as its client reads it."""

    def __init__(self, mesh: LanMesh, prompt: str | list[int], max_tokens: int, **fields: Any) -> None:
        self._mesh = mesh
        self._path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
        asked = {} if "messages" in fields else {"prompt": prompt}
        self._body = {"model": "dummy", **asked, "max_tokens": max_tokens, "stream": True, "ignore_eos": True, **fields}
        self._body["meshserve"] = {"receipt": True}
        self.chunks: list[dict[str, Any]] = []
        self.came_s: list[float] = []
        self.is_done = False

    def run(self) -> "Stream":
        """Read it to its end."""
        with self._mesh.front.stream("POST", f"{HTTP}{self._path}", self._body, timeout_s=60.0) as received:
            for line in received:
                data = line.strip().removeprefix("data: ")
                if data == "[DONE]":
                    self.is_done = True
                elif data:
                    self.chunks.append(json.loads(data))
                    self.came_s.append(time.monotonic())
        return self

    @property
    def text(self) -> str:
        """All of it; an error fails the test."""
        assert self.is_done, self.chunks[-1:]
        return "".join(choice["text"] for chunk in self.chunks for choice in chunk["choices"])

    @property
    def said(self) -> list[str]:
        """All that was said of each answer, in order: text, calls, log probabilities, how it ended; an error fails the test."""
        assert self.is_done, self.chunks[-1:]
        choices = [choice for chunk in self.chunks for choice in chunk["choices"]]
        for call in [call for choice in choices for call in choice.get("delta", {}).get("tool_calls") or []]:
            call.pop("id", None)  # made up for each answer
        return [json.dumps(choice) for choice in sorted(choices, key=lambda choice: int(choice["index"]))]

    @property
    def receipt(self) -> dict[str, Any]:
        """What the last chunk brought."""
        found: dict[str, Any] = next(chunk["meshserve"] for chunk in reversed(self.chunks) if chunk.get("meshserve"))
        return found

    @property
    def longest_pause_s(self) -> float:
        """Between two chunks."""
        return max(later - sooner for sooner, later in zip(self.came_s, self.came_s[1:], strict=False))


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


def undisturbed_texts(mesh: LanMesh, count: int, max_tokens: int) -> list[str]:
    """What the same streams say while nothing is lost."""
    with ThreadPoolExecutor(count) as pool:
        streams = list(pool.map(lambda number: Stream(mesh, f"stream {number}", max_tokens).run(), range(count)))
    assert not any(stream.receipt["migrations"] for stream in streams)
    return [stream.text for stream in streams]


def test_row_6_a_stream_goes_on_at_another_worker_when_its_own_is_killed(lan: Lan) -> None:
    mesh = start(lan, 2)
    streams = [Stream(mesh, f"stream {number}", 200) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        wait_until(lambda: all(len(stream.chunks) > 10 for stream in streams), READY_S, "both streams run")
        lost, survivor = mesh.names([mesh.decode[1], mesh.decode[0]])
        mesh.decode[1].kill()
        for stream in running:
            stream.result()
    (moved,) = [stream for stream in streams if stream.receipt["migrations"]]
    (continued,) = moved.receipt["continuations"]
    assert (continued["from"], continued["to"], continued["outcome"]) == (lost, survivor, "peer_lost")
    assert moved.receipt["peers"]["decode"] == survivor and moved.receipt["tokens"]["completion"] == 200
    assert continued["pause_ms"] <= 500, continued
    assert [stream.text for stream in streams] == undisturbed_texts(mesh, 2, 200)


def test_row_6_a_worker_that_is_stopped_for_3_s_doubles_no_token(lan: Lan) -> None:
    mesh = start(lan, 2)
    streams = [Stream(mesh, f"stream {number}", 500) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        wait_until(lambda: all(len(stream.chunks) > 10 for stream in streams), READY_S, "all streams run")
        mesh.decode[1].stop()
        began_s = time.monotonic()
        pace(3.0)
        mesh.decode[1].resume()
        for stream in running:
            stream.result()
    moved = [stream for stream in streams if stream.receipt["migrations"]]
    assert len(moved) == 2 and all(stream.receipt["continuations"][0]["outcome"] == "peer_silent" for stream in moved)
    longest_s = max(stream.longest_pause_s for stream in streams)
    assert longest_s <= FAILURE_TIMEOUT_S + 0.5 + allowance_s(began_s), longest_s
    wait_until(lambda: not mesh.busy(), READY_S, "nothing runs any more")
    assert [stream.text for stream in streams] == undisturbed_texts(mesh, 4, 500)


def test_row_6_the_only_worker_may_be_silent_and_go_on_or_be_killed_and_started_again(lan: Lan) -> None:
    mesh = start(lan, 1)
    stream = Stream(mesh, "stream 0", 500)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream.run)
        wait_until(lambda: len(stream.chunks) > 10, READY_S, "the stream runs")
        mesh.decode[0].stop()
        pace(FAILURE_TIMEOUT_S + 1.0)
        mesh.decode[0].resume()
        num_before = len(stream.chunks)
        wait_until(lambda: len(stream.chunks) > num_before + 10, READY_S, "the stream goes on")
        mesh.start_again(0)
        running.result()
    assert [found["outcome"] for found in stream.receipt["continuations"]] == ["peer_lost"]
    assert [stream.text] == undisturbed_texts(mesh, 1, 500)


def test_row_18_a_stream_that_outlasts_the_drain_of_its_worker_goes_on_at_another(lan: Lan) -> None:
    mesh = start(lan, 2, "--drain-timeout", "0.5")
    streams = [Stream(mesh, f"stream {number}", 300) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        wait_until(lambda: all(len(stream.chunks) > 10 for stream in streams), READY_S, "both streams run")
        mesh.decode[1].terminate()
        for stream in running:
            stream.result()
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


@pytest.mark.parametrize(
    ("num_streams", "num_tokens", "most_kills"),
    [(10, 400, 6), pytest.param(100, 1000, 60, marks=pytest.mark.full)],
    ids=["ten", "hundred"],
)
def test_row_6_streams_are_whole_while_a_worker_is_killed_every_second(
    lan: Lan, tmp_path: Path, num_streams: int, num_tokens: int, most_kills: int
) -> None:
    path = tmp_path / "record.jsonl"
    mesh = start(lan, 3, "--record", str(path), front=("--record", str(path)))
    streams = [Stream(mesh, f"stream {number}", num_tokens) for number in range(num_streams)]
    with ThreadPoolExecutor(num_streams) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        began_s = due_s = time.monotonic()
        for number in range(most_kills):
            due_s += 1.0
            pace(max(0.0, due_s - time.monotonic()))
            if all(stream.done() for stream in running):
                break
            mesh.start_again(number % 3)
        for stream in running:
            stream.result()
    Record(path).check()
    continued = [found for stream in streams for found in stream.receipt["continuations"]]
    assert len(continued) >= num_streams / 2 and {found["outcome"] for found in continued} == {"peer_lost"}
    assert sum(stream.receipt["migrations"] >= 3 for stream in streams) >= num_streams / 10 or most_kills < 10
    longest_ms = max(found["pause_ms"] for found in continued)
    print(f"\n{len(continued)} migrations, longest pause {longest_ms:.0f} ms")
    assert longest_ms <= 500 + allowance_s(began_s) * 1000
    mesh.wait_until_ready()
    assert [stream.text for stream in streams] == undisturbed_texts(mesh, num_streams, num_tokens)


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
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        wait_until(lambda: all(len(stream.chunks) > 10 for stream in streams), READY_S, "all streams run")
        began_s = time.monotonic()
        mesh.hosts[1].link_down()
        wait_until(lambda: mesh.busy() == mesh.names(mesh.decode[:1]), READY_S, "the other one has all of them")
        pace(1.0)
        mesh.hosts[1].link_up()
        for stream in running:
            stream.result()
    moved = [stream for stream in streams if stream.receipt["migrations"]]
    assert len(moved) == 2
    assert max(stream.longest_pause_s for stream in streams) <= FAILURE_TIMEOUT_S + 0.5 + allowance_s(began_s)
    wait_until(lambda: len(mesh.peers()) == 3 and not mesh.busy(), READY_S, "both are idle")
    mesh.wait_until_ready()
    assert [stream.text for stream in streams] == undisturbed_texts(mesh, 4, 700)
