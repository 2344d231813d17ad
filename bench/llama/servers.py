"""The two servers, each pinned to cores of its own, with one thread for the model."""

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

import click

from bench.systems import READY_TIMEOUT_S, System, free_ports


class _RealSystem(System):
    """A system whose tokens are those of a real model: some are no whole character, and come with the next one."""

    def check(self) -> None:
        """That it streams to a proper end. Raises ClickException."""
        if "data: [DONE]" not in self.ask(4, stream=True):
            raise click.ClickException(f"{self.name} does not end its stream")


class Theirs(_RealSystem):
    """llama.cpp's server, from the wheel whose library meshserve calls."""

    name = "llama.cpp"

    def __init__(
        self, path: Path, core: int, *, num_slots: int, num_cells: int, kv_type: str = "q8_0", num_batch: int | None = None
    ) -> None:
        super().__init__(0.0)
        self.model = "llama"
        settings = [f"model={path}", f"slots={num_slots}", f"cells={num_cells}", f"kv={kv_type}", f"port={self.http}"]
        if num_batch is not None:
            settings.append(f"batch={num_batch}")
        self.command = ["taskset", "-c", str(core), sys.executable, "-m", "bench.llama.their_server", *settings]

    def launch(self) -> None:
        """One process."""
        self.spawn(self.command, OMP_WAIT_POLICY="passive")


class Ours(_RealSystem):
    """meshserve: all of it on one core, or prefill and decode on one core each; the frontend runs beside the decode peer."""

    name = "meshserve"

    def __init__(self, path: Path, decode_core: int, prefill_core: int | None, *, num_cells: int, kv_type: str = "q8_0") -> None:
        super().__init__(0.0)
        self.model = path.stem
        self.prefill_core, (first, second) = prefill_core, free_port_blocks()
        engine = engine_options(path, num_cells, kv_type)
        common = ["--interface", "127.0.0.1", "--no-mdns", "--mesh", f"bench-llama-{os.getpid()}-{first}"]
        run = [sys.executable, "-m", "meshserve", "run"]
        front = ["--role", "frontend,processor,router,decode", "--port", str(first), "--http", f"127.0.0.1:{self.http}"]
        self.commands = [["taskset", "-c", str(decode_core), *run, *front, *common, *engine]]
        if prefill_core is not None:
            own = ["--role", "prefill", "--port", str(second), "--peer", f"127.0.0.1:{first}"]
            self.commands.append(["taskset", "-c", str(prefill_core), *run, *own, *common, *engine])

    @property
    def command(self) -> list[str]:
        """All processes, as one line for people."""
        return [part for command in self.commands for part in ("&", *command)][1:]

    def launch(self) -> None:
        """One process, or two."""
        for command in self.commands:
            self.spawn(command)


class Apart(_RealSystem):
    """meshserve in three processes: frontend with processor and router, a decode peer, a prefill peer. None has a core of its own."""

    name = "meshserve apart"

    def __init__(self, path: Path, *, num_cells: int) -> None:
        super().__init__(0.0)
        self.model = path.stem
        port = free_ports(4)[0]
        run = [sys.executable, "-m", "meshserve", "run", "--interface", "127.0.0.1", "--no-mdns", "--mesh", f"bench-llama-{self.http}"]
        worker = [*run, "--peer", f"127.0.0.1:{port}", *engine_options(path, num_cells)]
        front = ["--role", "frontend,processor,router", "--port", str(port), "--http", f"127.0.0.1:{self.http}"]
        self.commands = [[*run, *front], [*worker, "--role", "decode"], [*worker, "--role", "prefill"]]

    @property
    def command(self) -> list[str]:
        """All processes, as one line for people."""
        return [part for command in self.commands for part in ("&", *command)][1:]

    @property
    def decode_pid(self) -> int:
        """The process of the decode peer, once it was started."""
        return self._processes[1].pid

    def launch(self) -> None:
        """Three processes."""
        for command in self.commands:
            self.spawn(command)

    def check(self) -> None:
        """That all peers reach each other. Raises ClickException."""
        super().check()
        deadline_s, count = time.monotonic() + READY_TIMEOUT_S, len(self.commands)
        while True:
            with urllib.request.urlopen(f"{self.url}/mesh/peers", timeout=READY_TIMEOUT_S) as response:
                peers = json.loads(response.read())
            if len(peers) == count and all(peer["num_reached"] == count - 1 for peer in peers):
                return
            if time.monotonic() > deadline_s:
                raise click.ClickException(f"{self.name}: {len(peers)} of {count} peers have met")
            time.sleep(0.1)


def engine_options(path: Path, num_cells: int, kv_type: str = "q8_0") -> list[str]:
    """Of a worker with one thread."""
    return ["--model", str(path), "--kv-cache-tokens", str(num_cells), "--kv-type", kv_type, "--engine-opt", "threads=1"]


def free_port_blocks() -> tuple[int, int]:
    """Two blocks of four ports that a peer uses."""
    first = free_ports(8)[0]
    return first, first + 4
