"""`python -m bench.versus_dynamo DIRECTORY [--json]`: meshserve and NVIDIA Dynamo under the same load in turn, on this machine.

DIRECTORY gets a virtual environment with Dynamo from PyPI (1 GB) and is used again by the next run. Dynamo runs as meshserve does:
without a broker (file discovery, TCP requests, ZeroMQ events), with its KV router, two workers, and its own sample engine in Python
with the same time for each step. Both are up all the time; ratios are meshserve to Dynamo.
"""

import tempfile
from pathlib import Path

import click

from bench.ratios import load_options, report
from bench.systems import MeshSystem, System
from bench.venvs import ensure

VERSION = "1.6.1"
_RUNTIME = [f"ai-dynamo-runtime=={VERSION}"]
# Dynamo names engines and clouds as requirements that its router, frontend and sample engine do without
_PACKAGE = ["--no-deps", f"ai-dynamo=={VERSION}"]
_NEEDED = ["aiohttp", "certifi", "kubernetes", "msgspec", "prometheus-client", "pyzmq", "redis"]
_NEEDED += ["tokenizers", "tqdm", "transformers", "uvloop", "zstandard"]


class DynamoSystem(System):
    """A frontend with the KV router, two workers, and one for prefill if it is to be disaggregated."""

    def __init__(self, step_ms: float, directory: Path, python: Path, is_disaggregated: bool) -> None:
        super().__init__(step_ms)
        self.name = "dynamo disaggregated" if is_disaggregated else "dynamo aggregated"
        self.model = str(directory / "tiny")
        self._python, self._is_disaggregated = python, is_disaggregated
        self._store = tempfile.TemporaryDirectory()

    def launch(self) -> None:
        planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
        environment = {"DYN_FILE_KV": self._store.name, "DYN_LOG": "error"}
        worker: list[str | Path] = [
            self._python,
            "-m",
            "dynamo.common.backend.sample_main",
            "--model-name",
            self.model,
            "--max-tokens",
            "128",
        ]
        worker += ["--delay", f"{self.step_ms / 1000:g}", *planes]
        modes = ["decode", "decode", "prefill"] if self._is_disaggregated else ["agg", "agg"]
        for mode in modes:
            component = "prefill" if mode == "prefill" else "backend"
            self.spawn([*worker, "--component", component, "--disaggregation-mode", mode], **environment)
        http = ["--http-host", "127.0.0.1", "--http-port", str(self.http)]
        self.spawn([self._python, "-m", "dynamo.frontend", *http, "--router-mode", "kv", *planes], **environment)

    def stop(self) -> None:
        super().stop()
        self._store.cleanup()


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@load_options
@click.option("--disaggregated", is_flag=True, help="Both with a prefill worker for every prompt.")
def main(directory: Path, as_json: bool, rounds: int, seconds: float, names: tuple[str, ...], disaggregated: bool) -> None:
    """Install Dynamo in DIRECTORY if it is not there, measure both, and print ratios with their 95 % intervals."""
    directory = directory.resolve()
    python = ensure(directory, _RUNTIME, _PACKAGE, _NEEDED)

    def build(step_ms: float) -> list[System]:
        return [DynamoSystem(step_ms, directory, python, disaggregated), MeshSystem(step_ms, disaggregated)]

    report(build, as_json, rounds, seconds, names, dynamo=VERSION)


if __name__ == "__main__":
    main()
