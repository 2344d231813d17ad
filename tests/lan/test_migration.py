"""Streams whose decode worker is lost: another one goes on, and a client sees a pause and nothing else."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.harness import Lan, wait_until
from tests.lan.meshes import HTTP, READY_S, LanMesh

PACED = ("--engine-opt", "step_ms=10")


class Stream:
    """One streamed completion, as its client reads it."""

    def __init__(self, mesh: LanMesh, prompt: str, max_tokens: int, **fields: Any) -> None:
        self._mesh = mesh
        self._body = {"model": "dummy", "prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True, **fields}
        self._body["meshserve"] = {"receipt": True}
        self.chunks: list[dict[str, Any]] = []
        self.came_s: list[float] = []
        self.is_done = False

    def run(self) -> "Stream":
        """Read it to its end."""
        with self._mesh.front.stream("POST", f"{HTTP}/v1/completions", self._body, timeout_s=60.0) as received:
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
    def receipt(self) -> dict[str, Any]:
        """What the last chunk brought."""
        found: dict[str, Any] = next(chunk["meshserve"] for chunk in reversed(self.chunks) if chunk.get("meshserve"))
        return found

    @property
    def longest_pause_s(self) -> float:
        """Between two chunks."""
        return max(later - sooner for sooner, later in zip(self.came_s, self.came_s[1:], strict=False))


def start(lan: Lan, num_decode: int, *options: str) -> LanMesh:
    """Frontend, processor and router on one host, each worker on a host of its own."""
    front = lan.add_host()
    mesh = LanMesh(front, front.run("--role", "frontend,processor,router", "--policy", "round-robin", *options))
    mesh.decode = [lan.add_host().run("--role", "decode", *PACED, *options) for _ in range(num_decode)]
    mesh.wait_until_ready()
    return mesh


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
        texts = [stream.text for stream in streams]
        assert texts == [Stream(mesh, f"stream {number}", 200).run().text for number in range(2)]
