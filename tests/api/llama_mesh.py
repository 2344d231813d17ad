"""A mesh of one peer that serves a GGUF file, and the official clients of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from meshserve.engines.models.directories import places
from tests.api.clients import Clients, clients_of
from tests.harness import Process, meshserve_command, wait_until

READY_S = 60.0
MODEL = "small"
"""What clients call it, whatever it is."""
_PACKAGED = "SmolLM2-135M-Instruct.Q4_1.gguf"


def real_model() -> Path:
    """A real model's file: the one that MESHSERVE_TEST_GGUF names, else the one that an earlier `--model smollm2` fetched; else skip."""
    named = os.environ.get("MESHSERVE_TEST_GGUF")
    found = [Path(named)] if named else [directory / _PACKAGED for directory in places()]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        pytest.skip("there is no real model: MESHSERVE_TEST_GGUF names none, and none was fetched")
    return path


def serving(path: Path, *options: str, mesh: str) -> Process:
    """A peer with all roles and this model, that nobody else on this machine meets."""
    alone = ("--mesh", mesh, "--interface", "127.0.0.1", "--no-mdns", "--http", "127.0.0.1:0")
    sizes = ("--kv-cache-tokens", "8192", "--engine-opt", "threads=1")
    return Process(meshserve_command("run", "--role", "all", "--model", str(path), "--served-model-name", MODEL, *alone, *sizes, *options))


@contextmanager
def llama_clients(path: Path, *, mesh: str, timeout_s: float) -> Iterator[Clients]:
    """Clients of a peer that serves this model; it must end well, and say nothing of a mistake."""
    with serving(path, mesh=mesh) as process:
        url = process.ready(READY_S)["http"]
        wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200, READY_S, "the front is ready")
        with clients_of(url, timeout_s) as clients:
            yield clients
        process.terminate()
        assert process.wait() == 0
        assert "Traceback" not in process.stderr_text
