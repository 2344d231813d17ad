"""Systems that serve HTTP on this machine's loopback, for benchmarks that compare them: started, checked, looked at, stopped."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

READY_TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 15.0
_CHECK_TOKENS = 32
_CONTENT = re.compile(r'"text": ?"[^"]')


def free_ports(count: int = 1) -> list[int]:
    """So many that nobody listens on now, in a row."""
    for _ in range(100):
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            ports = list(range(first, first + count))
            try:
                for port in ports[1:]:
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except (OSError, OverflowError):
                continue
            return ports
    raise click.ClickException("no free ports")


class System:
    """Processes, and the URL at which they serve."""

    name = "system"
    model = "dummy"

    def __init__(self, step_ms: float) -> None:
        self.step_ms = step_ms
        self.http = free_ports()[0]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop
        self.ready_s = 0.0
        """From its start to its first answer."""

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.http}"

    def launch(self) -> None:
        """Start all processes."""
        raise AssertionError("each system knows its own")

    def spawn(self, command: Sequence[str | Path], **environment: str) -> None:
        """One process."""
        env = {**os.environ, **environment}
        process = subprocess.Popen([str(part) for part in command], stdout=self._log, stderr=self._log, start_new_session=True, env=env)
        self._processes.append(process)

    def start(self) -> None:
        """Return when it has answered. Raises ClickException with its last words if it does not."""
        began = time.monotonic()
        self.launch()
        while True:
            try:
                self.ask(1)
                break
            except (OSError, ValueError) as exc:
                is_dead = any(process.poll() is not None for process in self._processes)
                if is_dead or time.monotonic() > began + READY_TIMEOUT_S:
                    raise click.ClickException(f"{self.name} did not become ready ({exc}): {self.last_words()}") from exc
                time.sleep(0.02)
        self.ready_s = time.monotonic() - began
        self.check()

    def last_words(self) -> str:
        """The end of what its processes printed."""
        self._log.seek(0)
        return self._log.read()[-1000:].decode(errors="replace").strip()

    def ask(self, num_tokens: int, **fields: Any) -> str:
        """One completion. Raises OSError for anything but an answer."""
        body = {"model": self.model, "prompt": "a short prompt", "max_tokens": num_tokens, "ignore_eos": True, **fields}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=20) as response:
            return str(response.read().decode())

    def check(self) -> None:
        """What is measured must be the real thing: each token a chunk, and a proper end. Raises ClickException."""
        stream = self.ask(_CHECK_TOKENS, stream=True)
        num_chunks = len(_CONTENT.findall(stream))
        if num_chunks < _CHECK_TOKENS - 1 or "data: [DONE]" not in stream:
            raise click.ClickException(f"{self.name} streams {_CHECK_TOKENS} tokens in {num_chunks} chunks")

    def cpu_s(self) -> float:
        """That its processes used so far, their children included."""
        groups = {process.pid for process in self._processes}
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[2]) in groups:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End them; those that will not go are killed."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.01, deadline - time.monotonic()))
        self._log.close()


class FloorSystem(System):
    """`bench.floor`: a front and a worker."""

    name = "floor"

    def launch(self) -> None:
        address = f"tcp://127.0.0.1:{free_ports()[0]}"
        self.spawn([sys.executable, "-m", "bench.floor", "worker", address, f"{self.step_ms:g}"])
        self.spawn([sys.executable, "-m", "bench.floor", "front", address, str(self.http)])


class MeshSystem(System):
    """A front peer, two decode workers and, if it is to be disaggregated, a prefill worker that gets every prompt.

    With `checkout`, the peers run the code of that directory instead of this one's.
    """

    def __init__(
        self,
        step_ms: float,
        is_disaggregated: bool = False,
        options: Sequence[str] = (),
        checkout: Path | None = None,
    ) -> None:
        super().__init__(step_ms)
        self.name = "meshserve disaggregated" if is_disaggregated else "meshserve aggregated"
        self._is_disaggregated, self._options, self._checkout = is_disaggregated, options, checkout

    def launch(self) -> None:
        port = free_ports(4)[0]
        # -P: without this directory, so that the path of a checkout counts
        python = [sys.executable, *(["-P"] if self._checkout else [])]
        code = {"PYTHONPATH": str(self._checkout)} if self._checkout else {}
        run = [*python, "-m", "meshserve", "run", "--interface", "127.0.0.1", "--no-mdns", "--mesh", f"bench-{self.http}"]
        run += self._options
        engine = ["--peer", f"127.0.0.1:{port}", "--engine-opt", f"step_ms={self.step_ms:g}"]
        engine += ["--max-local-prefill-tokens", "0"] if self._is_disaggregated else []
        self.spawn([*run, "--role", "frontend,processor,router", "--port", str(port), "--http", f"127.0.0.1:{self.http}"], **code)
        for role in ("decode", "decode", *(["prefill"] if self._is_disaggregated else [])):
            self.spawn([*run, "--role", role, *engine], **code)

    def check(self) -> None:
        super().check()
        deadline = time.monotonic() + 10
        while True:  # a prefill worker may be found a moment after the first answer
            peers = json.loads(self.ask(4, meshserve={"receipt": True}))["meshserve"]["peers"]
            if bool(peers["prefill"]) is self._is_disaggregated:
                return
            if time.monotonic() > deadline:
                raise click.ClickException(f"{self.name}: prefilled by {peers['prefill']}")
            time.sleep(0.05)


@contextmanager
def running(systems: Sequence[System]) -> Iterator[None]:
    """All of them at once, until the block ends."""
    with contextlib.ExitStack() as stack:
        for system in systems:
            stack.callback(system.stop)
            system.start()
        yield
