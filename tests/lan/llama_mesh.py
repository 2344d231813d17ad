"""Meshes on a `Lan` whose workers run llama.cpp, and what they are asked: prompts of token ids, greedy and seeded, compared bit for bit."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness import Host, Lan, Process, wait_until
from tests.lan.meshes import HTTP, LanMesh

START_S = 120.0
"""For a worker that loads a model, on a busy machine."""
SERVED = "model"
BULK_OFFSET = 1
"""From a peer's first port to the one that takes blocks."""
BLOCK_TOKENS = 64


@dataclass(frozen=True)
class Load:
    """How much a test asks, of which model."""

    model: Path
    num_prompts: int
    lengths: tuple[int, int] = (20, 1500)
    """Of the shortest and the longest prompt, in tokens; both occur."""
    token_ids: tuple[int, int] = (270, 500)
    """Between which prompts have theirs: ordinary pieces of the model's vocabulary."""
    max_tokens: int = 24
    num_at_once: int = 4
    kv_cache_tokens: int = 16384
    deadline_s: float = 120.0
    """For one answer."""

    def prompts(self, seed: int = 1) -> list[list[int]]:
        """Different from the first token on; in any order of their lengths, of which more are short than long."""
        draw = random.Random(seed)
        least, most = self.lengths
        last = max(1, self.num_prompts - 1)
        lengths = [least + (most - least) * number**2 // last**2 for number in range(self.num_prompts)]
        draw.shuffle(lengths)
        return [[draw.randint(*self.token_ids) for _ in range(length)] for length in lengths]

    def engine(self, *more: str) -> tuple[str, ...]:
        """Options of a worker."""
        threads = ("--engine-opt", "threads=1")
        return ("--model", str(self.model), "--served-model-name", SERVED, "--kv-cache-tokens", str(self.kv_cache_tokens), *threads, *more)


@dataclass(frozen=True)
class Answer:
    """What must be the same wherever it is computed."""

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    """Of each token, so that logits that differ in one bit are seen."""
    alternatives: tuple[tuple[tuple[str, float], ...], ...]


@dataclass
class LlamaMesh(LanMesh):
    """A running mesh, asked with a `Load`."""

    hosts: dict[Process, Host] = field(default_factory=dict)
    """Where each worker runs."""

    def start_worker(self, lan: Lan, role: str, *options: str, host: Host | None = None) -> Process:
        """One more, on a host of its own unless told otherwise."""
        host = host or lan.add_host()
        process = host.run("--role", role, *options)
        (self.decode if role == "decode" else self.prefill).append(process)
        self.hosts[process] = host
        return process

    def wait(self) -> None:
        """Until the router has all of them, and all know each other."""
        self.wait_until_ready(START_S)
        wait_until(self._have_all_met, START_S, "all peers reach each other")

    def _have_all_met(self) -> bool:
        peers, count = self.peers(), 1 + len(self.decode) + len(self.prefill)
        return len(peers) == count and all(peer["num_reached"] == count - 1 for peer in peers)

    def ask(self, load: Load, number: int, prompt: Sequence[int], **fields: Any) -> tuple[Answer, dict[str, Any]]:
        """An answer and its receipt. Prompts of even numbers are answered greedily, others by a seed."""
        sampling = {"temperature": 0.0} if number % 2 == 0 else {"temperature": 0.9, "top_p": 0.95, "seed": number}
        asked = {"model": SERVED, "prompt": list(prompt), "max_tokens": load.max_tokens, "ignore_eos": True, "logprobs": 2}
        body = {**asked, "meshserve": {"receipt": True}, **sampling, **fields}
        response = self.front.post_json(f"{HTTP}/v1/completions", body, timeout_s=load.deadline_s)
        assert response.status == 200, response.body
        answer = response.json()
        (choice,) = answer["choices"]
        found = choice["logprobs"]
        alternatives = tuple(tuple(sorted(each.items())) for each in found["top_logprobs"])
        return Answer(choice["text"], tuple(found["tokens"]), tuple(found["token_logprobs"]), alternatives), answer["meshserve"]

    def ask_all(self, load: Load, prompts: Sequence[Sequence[int]], **fields: Any) -> tuple[list[Answer], list[dict[str, Any]]]:
        """Some at a time; answers and receipts in the order of the prompts."""
        with ThreadPoolExecutor(load.num_at_once) as pool:
            found = list(pool.map(lambda asked: self.ask(load, *asked, **fields), enumerate(prompts)))
        return [answer for answer, _ in found], [receipt for _, receipt in found]

    def counter(self, process: Process, name: str) -> float:
        """One of a peer's counters."""
        own = process.ready(START_S)["name"]
        (peer,) = [peer for peer in self.peers() if peer["name"] == own]
        return float(peer["counters"].get(name, 0))


def start_front(lan: Lan, *options: str) -> LlamaMesh:
    """A frontend, processor and router."""
    front = lan.add_host()
    return LlamaMesh(front, front.run("--role", "frontend,processor,router", *options))


def answers_alone(lan: Lan, load: Load, prompts: Sequence[Sequence[int]], *more: str) -> list[Answer]:
    """What a single peer answers, without any other."""
    host = lan.add_host()
    options = ("--role", "frontend,processor,router,decode", "--mesh", "alone", *load.engine(*more))
    alone = LlamaMesh(host, host.run(*options))
    alone.frontend.wait_for_line("^1 decode, 0 prefill ready", START_S)
    answers, receipts = alone.ask_all(load, prompts)
    assert all(receipt["kv"]["bytes"] == 0 and not receipt["attempts"] for receipt in receipts)
    alone.frontend.terminate()
    assert alone.frontend.wait(START_S) == 0
    return answers


def bulk_port(process: Process) -> int:
    """Where this peer takes blocks."""
    return int(process.ready(START_S)["address"].rsplit(":", 1)[1]) + BULK_OFFSET


def check_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Fail with the first that differs."""
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == other, f"prompt {number}:\n{one}\n{other}"
