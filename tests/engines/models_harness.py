"""A hub on loopback that speaks what huggingface_hub asks, a tiny package with a model, and both used from processes of their own.

The libraries read their settings when they are imported, so each use is a process of its own, with JSON in and out.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from meshserve.engines.models.packaged import fetch_packaged
from meshserve.engines.models.resolving import resolve
from meshserve.engines.models.specs import PackagedModel
from meshserve.errors import MeshserveError

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 60.0
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Outcome:
    """What one process had to say."""

    path: str = ""
    name: str = ""
    error: str = ""
    """The class of the error."""
    message: str = ""
    said: list[str] = field(default_factory=list)


def start(environment: dict[str, str], asked: dict[str, Any], *flags: str) -> "subprocess.Popen[str]":
    """A process that resolves `{"spec": ...}` or fetches `{"package": ...}`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PIP_", "XDG_", "MESHSERVE_"))}
    return subprocess.Popen(
        [sys.executable, *flags, "-m", "tests.engines.models_harness", json.dumps(asked)],
        env={**kept, "PYTHONPATH": str(ROOT), "PIP_CONFIG_FILE": os.devnull, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome_of(process: "subprocess.Popen[str]") -> Outcome:
    """Its end. Nothing but our own lines may be on stderr."""
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0 and not stderr, stderr
    return Outcome(**json.loads(stdout))


def resolved(spec: str, environment: dict[str, str]) -> Outcome:
    """What a process makes of `--model SPEC`."""
    return outcome_of(start(environment, {"spec": spec}))


def packaged(model: PackagedModel, environment: dict[str, str], *flags: str) -> Outcome:
    """What a process makes of a short name for this package."""
    return outcome_of(start(environment, {"package": asdict(model)}, *flags))


def tiny_package(directory: Path, content: bytes = b"GGUF" + bytes(1000)) -> PackagedModel:
    """A wheel in this folder with a model of so many bytes."""
    wheel = directory / "tiny_model-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", metadata)
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    packed = wheel.read_bytes()
    return PackagedModel(
        requirement="tiny-model==1.0",
        wheel_bytes=len(packed),
        wheel_sha256=hashlib.sha256(packed).hexdigest(),
        member="tiny_model/tiny.gguf",
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


@dataclass
class Hub:
    """What it holds, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Of the repository `org/repo`."""
    is_gated: bool = False
    break_after_bytes: int | None = None
    """The next download of a file breaks off here."""
    stall_after_bytes: int | None = None
    """The next download of a file stops here until its client is gone."""
    flips_a_bit: bool = False
    status: int = 200
    """Anything else is all that it answers."""
    asked: list[str] = field(default_factory=list)
    """Method, path and range of each request."""
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing goes to stderr."""

    def _answer(self, is_head: bool) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if self.hub.status != 200:
            self._send(self.hub.status, {}, b"", is_head)
        elif path == "/api/models/org/repo":
            self._send(200, {"Content-Type": "application/json"}, json.dumps(self._listing()).encode(), is_head)
        elif path.startswith("/org/repo/resolve/main/"):
            self._file(path.removeprefix("/org/repo/resolve/main/"), is_head)
        else:
            self._send(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"", is_head)

    def _listing(self) -> dict[str, Any]:
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": "0" * 40,
                "lfs": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134},
            }
            for name, content in self.hub.files.items()
        ]
        return {
            "id": "org/repo",
            "modelId": "org/repo",
            "sha": COMMIT,
            "siblings": siblings,
            "gated": "auto" if self.hub.is_gated else False,
        }

    def _file(self, name: str, is_head: bool) -> None:
        if self.hub.is_gated:
            self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"", is_head)
            return
        content = self.hub.files[name]
        named = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if self.hub.flips_a_bit:
            content = bytes([content[0] ^ 1]) + content[1:]
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if first:
            named["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self._send(206 if first else 200, named, content[first:], is_head)

    def _send(self, status: int, headers: dict[str, str], body: bytes, is_head: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if is_head:
            return
        if "ETag" not in headers:
            self.wfile.write(body)
            return
        breaks, self.hub.break_after_bytes = self.hub.break_after_bytes, None
        stalls, self.hub.stall_after_bytes = self.hub.stall_after_bytes, None
        self.wfile.write(body[: breaks or stalls])
        if stalls is not None:
            with suppress(ConnectionError):
                self.rfile.read(1)
        self.close_connection = (breaks or stalls) is not None


@contextmanager
def hub_on_loopback(hub: Hub) -> Iterator[Hub]:
    """Serve it on a free port until the end of the block."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _main(asked: dict[str, Any]) -> Outcome:
    said: list[str] = []
    try:
        if "package" in asked:
            return Outcome(str(fetch_packaged("tiny", PackagedModel(**asked["package"]), said.append)), "tiny", said=said)
        source = resolve(asked["spec"], said.append)
        return Outcome(str(source.path), source.name, said=said)
    except MeshserveError as error:
        return Outcome(error=type(error).__name__, message=error.message, said=said)


if __name__ == "__main__":
    print(json.dumps(asdict(_main(json.loads(sys.argv[1])))))
