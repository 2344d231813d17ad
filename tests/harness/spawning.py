"""meshserve's processes, forked from one that has imported the package: of the 0.6 s that each costs, 0.4 are imports.

A test starts some four peers. The server below is a process without threads that each test process starts once; it forks
for each command. What it forks is a process like any other: in a session, network
namespace and environment of its own, and a child of the test process, which adopts it when the fork between them ends.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.harness.waiting import pace

ROOT = Path(__file__).parents[2]
_COMMAND = [sys.executable, "-m", "meshserve"]
_PRELOADED = (
    "meshserve.app",
    "meshserve.cli.main",
    "meshserve.cli.run",
    "meshserve.engines.dummy",
    "meshserve.roles.decode",
    "meshserve.roles.frontend.server",
    "meshserve.roles.prefill",
    "meshserve.roles.processor.processor",
    "meshserve.roles.router",
)
_NETNS, _CLONE_NEWNET = Path("/run/netns"), 0x40000000
_POLL_S = 0.005
_MOST_BYTES = 1 << 20
_servers: list[tuple[socket.socket, subprocess.Popen[bytes]]] = []


class Child:
    """A forked process, with the members of `subprocess.Popen` that the harness uses."""

    def __init__(self, pid: int, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        """Take over its pipes."""
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, the negative number of the signal that ended it, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end; raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(_COMMAND, timeout)
            pace(_POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


def can_fork(command: Sequence[str], env: Mapping[str, str] | None) -> bool:
    """Whether a command is one of meshserve's, in an environment that no interpreter or loader has to see at its start."""
    is_plain = not any(name.startswith(("PYTHON", "LD_")) for name in env or ())
    return sys.platform.startswith("linux") and list(command[:3]) == _COMMAND and is_plain


def fork(command: Sequence[str], netns: str | None, env: Mapping[str, str]) -> Child:
    """Start a command of meshserve's, in the network namespace `netns` if one is named, with exactly this environment."""
    if not _servers:
        start_server()
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    request = json.dumps({"arguments": list(command[3:]), "netns": netns, "env": dict(env)}).encode()
    server, _ = _servers[0]
    socket.send_fds(server, [request], [out_end, err_end])
    os.close(out_end)
    os.close(err_end)
    pid = int(server.recv(32))
    return Child(pid, os.fdopen(out, "rb"), os.fdopen(err, "rb"))


def start_server() -> None:
    """Start what forks, for as long as this process lives."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
    # unbuffered, as every child is; its stderr is that of the tests, so that a fault of its own shows
    process = subprocess.Popen(
        [sys.executable, "-c", "from tests.harness import spawning; spawning.serve()", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
    )
    theirs.close()
    _servers.append((ours, process))


# --- the server's side


def _forked(requests: socket.socket) -> list[str] | None:
    """Fork for each request; return its arguments in the child, and None at the end in the server."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, _MOST_BYTES, 2)
        if not data:
            return None
        read_end, write_end = os.pipe()
        if (between := os.fork()) == 0:
            if child := os.fork():
                os.write(write_end, b"%d" % child)
                os._exit(0)
            return _become(json.loads(data), descriptors)
        for descriptor in (*descriptors, write_end):
            os.close(descriptor)
        # once the process between has ended, the child is the test's own: only then does the test hear of it
        os.waitpid(between, 0)
        requests.send(os.read(read_end, 32))
        os.close(read_end)


def _become(request: dict[str, Any], outputs: Sequence[int]) -> list[str]:
    """Make this fork a process of its own; returns its arguments."""
    os.setsid()
    if request["netns"] is not None:
        with (_NETNS / request["netns"]).open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {request['netns']}")
    for number, descriptor in enumerate(outputs, 1):
        os.dup2(descriptor, number)
    os.closerange(3, 256)
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments: list[str] = request["arguments"]
    return arguments


def serve() -> None:
    """Fork for the test process until it closes its end; in what is forked, be the command."""
    # Ctrl-C is for the tests: the server ends when they close their end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    arguments = _forked(socket.socket(fileno=int(sys.argv[1])))
    if arguments is None:
        return
    with contextlib.suppress(KeyError):
        del sys.modules["meshserve.__main__"]
    sys.argv = ["meshserve", *arguments]
    runpy.run_module("meshserve", run_name="__main__", alter_sys=True)
