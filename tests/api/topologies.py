"""The four ways to spread the roles over peers, each a mesh on loopback: what a client must not be able to tell apart."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.api.clients import KEYS, Clients, clients_of
from tests.api.full_cases import NUM_PLACES
from tests.harness import Process, meshserve_command, wait_until

READY_S = 20.0
HANDS_ALL_OVER = ("--max-local-prefill-tokens", "0")

TOPOLOGIES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "monolith": (("--role", "frontend,processor,router,decode"),),
    "disaggregated": (("--role", "frontend,processor,router"), ("--role", "decode", *HANDS_ALL_OVER), ("--role", "prefill")),
    "all in one peer": (("--role", "all"),),
    "every role apart": (
        ("--role", "frontend"),
        ("--role", "processor"),
        ("--role", "router"),
        ("--role", "decode", *HANDS_ALL_OVER),
        ("--role", "prefill"),
    ),
}
"""The options of each peer; the first one has the frontend."""


@dataclass(frozen=True, slots=True)
class Topology:
    """A running mesh, its clients, and the record that all its peers write."""

    name: str
    clients: Clients
    record: Path

    @property
    def hands_all_over(self) -> bool:
        """No prompt is prefilled where it is decoded."""
        return any(HANDS_ALL_OVER[0] in options for options in TOPOLOGIES[self.name])


@contextmanager
def all_topologies(directory: Path) -> Iterator[list[Topology]]:
    """All of them at the same time, with keys, and with as many places each; their peers must end well and say nothing of a mistake."""
    with ExitStack() as stack:
        records = {name: directory / f"{number}.jsonl" for number, name in enumerate(TOPOLOGIES)}
        fronts = {name: stack.enter_context(_start(name, 0, records[name], "--http", "127.0.0.1:0", *_keys())) for name in TOPOLOGIES}
        processes = list(fronts.values())
        for name, peers in TOPOLOGIES.items():
            seed = fronts[name].ready(READY_S)["address"].removeprefix("tcp://")
            processes += [stack.enter_context(_start(name, number, records[name], "--peer", seed)) for number in range(1, len(peers))]
        urls = {name: front.ready(READY_S)["http"] for name, front in fronts.items()}
        for name, peers in TOPOLOGIES.items():
            _wait_until_all_meet(urls[name], len(peers))
        yield [Topology(name, stack.enter_context(clients_of(url)), records[name]) for name, url in urls.items()]
        for process in processes:
            process.terminate()
        for process in processes:
            assert process.wait() == 0
            assert "Traceback" not in process.stderr_text


def _start(name: str, number: int, record: Path, *options: str) -> Process:
    engine = ("--engine", "tests.harness.engines:HoldingEngine", "--engine-opt", f"max_batch={NUM_PLACES}")
    mesh = ("--mesh", f"topology-{name.replace(' ', '-')}", "--interface", "127.0.0.1", "--no-mdns", "--record", str(record))
    return Process(meshserve_command("run", *TOPOLOGIES[name][number], *mesh, *engine, *options))


def _keys() -> tuple[str, ...]:
    return (*(part for key in KEYS for part in ("--api-key", key)), "--max-queue", "2")


def _wait_until_all_meet(url: str, count: int) -> None:
    headers = {"authorization": f"Bearer {KEYS[0]}"}

    def have_met() -> bool:
        peers = httpx.get(f"{url}/mesh/peers", headers=headers).json()
        return len(peers) == count and all(peer["num_reached"] == count - 1 for peer in peers)

    wait_until(have_met, READY_S, "all peers reach each other")
    wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200, READY_S, "the front is ready")
