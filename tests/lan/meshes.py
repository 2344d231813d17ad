"""Meshes on a `Lan` for tests: the two deployments, and questions to them."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness import Host, Lan, Process, wait_until

READY_S = 10.0
HTTP = "http://127.0.0.1:8000"

LONG_PROMPT = "The prompt of a long document that is worth handing over. " * 20
SHORT_PROMPT = "A short question"


@dataclass
class LanMesh:
    """A running mesh; `front` is the host whose HTTP side is asked."""

    front: Host
    frontend: Process
    decode: list[Process] = field(default_factory=list)
    prefill: list[Process] = field(default_factory=list)

    def names(self, processes: Iterable[Process]) -> list[str]:
        """What peers call themselves."""
        return [process.ready(READY_S)["name"] for process in processes]

    def wait_until_ready(self, deadline_s: float = READY_S) -> None:
        """Until the router says that it has all of them."""
        self.frontend.wait_for_line(rf"^{len(self.decode)} decode, {len(self.prefill)} prefill ready", deadline_s)

    def complete(self, prompt: str, max_tokens: int = 24, **fields: Any) -> dict[str, Any]:
        """One completion with its receipt; anything but success fails the test."""
        body = {"model": "dummy", "prompt": prompt, "max_tokens": max_tokens, "meshserve": {"receipt": True}, **fields}
        response = self.front.post_json(f"{HTTP}/v1/completions", body, timeout_s=60.0)
        assert response.status == 200, response.body
        answer: dict[str, Any] = response.json()
        return answer

    def complete_all(self, prompts: list[str], num_at_once: int, max_tokens: int = 24, **fields: Any) -> list[dict[str, Any]]:
        """Many, so many at a time; in the order of the prompts."""
        with ThreadPoolExecutor(num_at_once) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, max_tokens, **fields), prompts))

    def peers(self) -> list[dict[str, Any]]:
        """What `/mesh/peers` says."""
        found: list[dict[str, Any]] = self.front.get(f"{HTTP}/mesh/peers").json()
        return found

    def wait_until_all_meet(self, count: int | None = None) -> None:
        """Until each peer can call all others: the router may know a pair of workers before they know each other."""
        count = count or 1 + len(self.decode) + len(self.prefill)

        def have_met() -> bool:
            peers = self.peers()
            return len(peers) == count and all(peer["num_reached"] == count - 1 for peer in peers)

        wait_until(have_met, READY_S, "all peers reach each other")

    def wait_for_peers(self, count: int, deadline_s: float = READY_S) -> None:
        """Until so many are listed."""
        wait_until(lambda: len(self.peers()) == count, deadline_s, f"{count} peers are listed")


def text_of(answer: dict[str, Any]) -> str:
    """What was completed."""
    text: str = answer["choices"][0]["text"]
    return text


SLOW_PREFILL = ("--engine-opt", "prefill_tokens_per_s=2000")


def start_aggregated(lan: Lan, *options: str) -> LanMesh:
    """Two hosts: frontend, processor and router in one peer and a decode worker in another on the first, a decode worker on the second."""
    host1, host2 = lan.add_host(), lan.add_host()
    mesh = LanMesh(host1, host1.run("--role", "frontend,processor,router", *options))
    mesh.decode = [host1.run("--role", "decode", *options), host2.run("--role", "decode", *options)]
    mesh.wait_until_ready()
    return mesh


def start_disaggregated(lan: Lan, *options: str) -> LanMesh:
    """The same, and a prefill worker on a third host. Decode workers prefill slowly, so that a handoff pays however busy the machine is."""
    mesh = start_aggregated(lan, *SLOW_PREFILL, *options)
    mesh.prefill = [lan.add_host().run("--role", "prefill", *options)]
    mesh.wait_until_ready()
    mesh.wait_until_all_meet()  # a decode worker hands nothing over to a prefill worker that has no connection to it yet
    return mesh


def start_recorded(lan: Lan, record: Path, num_decode: int, num_prefill: int, *options: str, prefill: Sequence[str] = ()) -> LanMesh:
    """A frontend, processor and router on one host, each worker on a host of its own; all write one record."""
    common = ("--record", str(record), *options)
    front = lan.add_host()
    mesh = LanMesh(front, front.run("--role", "frontend,processor,router", *common))
    mesh.decode = [lan.add_host().run("--role", "decode", *common) for _ in range(num_decode)]
    mesh.prefill = [lan.add_host().run("--role", "prefill", *common, *prefill) for _ in range(num_prefill)]
    mesh.wait_until_ready()
    mesh.wait_until_all_meet()
    return mesh


def undisturbed(lan: Lan, prompts: list[str], max_tokens: int = 24, **fields: Any) -> list[str]:
    """What a peer alone answers."""
    host = lan.add_host()
    alone = LanMesh(host, host.run("--role", "all", "--mesh", "undisturbed"))
    alone.frontend.wait_for_line("^1 decode, 1 prefill ready", READY_S)
    return [text_of(answer) for answer in alone.complete_all(prompts, 8, max_tokens, **fields)]


def long_prompts(count: int, repeats: int = 20) -> list[str]:
    """Different from the first token on, so that no worker has any of another's KV."""
    return [f"{number:04} is a long document. " + "It is worth handing over to somebody else. " * repeats for number in range(count)]
