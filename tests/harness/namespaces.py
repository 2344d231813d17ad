"""Network namespaces: made and removed by name, entered by a thread, swept when their maker has died."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.harness.waiting import wait_until

T = TypeVar("T")

PREFIX = "msh"
DIRECTORY = Path("/run/netns")
CLONE_NEWNET = 0x40000000
ENTER_DEADLINE_S = 60.0
TOOL_DEADLINE_S = 60.0


class ToolError(Exception):
    """A command such as `ip` or `nft` failed."""

    def __init__(self, command: list[str], script: str, message: str) -> None:
        """Keep what was asked and what was answered."""
        super().__init__(f"{' '.join(command)}: {message.strip()}\n{script}".strip())


def run_tool(*command: str, script: str = "") -> str:
    """Run one of the system's own commands with `script` on its stdin and return its stdout.

    Raises:
        ToolError: it failed, took longer than ten seconds, or is not there.
    """
    try:
        done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=TOOL_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(list(command), script, str(error)) from error
    if done.returncode:
        raise ToolError(list(command), script, done.stderr)
    return done.stdout


def namespace_name(*labels: object) -> str:
    """Return a namespace name that no other live process uses, and that `sweep` recognises once this one is dead."""
    return "-".join([PREFIX, str(os.getpid()), *map(str, labels)])


def add_namespace(name: str) -> None:
    """Make the namespace `name` with its loopback up.

    Raises:
        ToolError: it exists, or the right is missing.
    """
    run_tool("ip", "netns", "add", name)
    run_tool("ip", "-n", name, "link", "set", "lo", "up")


def remove_namespace(name: str) -> None:
    """Kill what still runs in the namespace `name` and remove it; one that is gone already is no error."""
    if not (DIRECTORY / name).exists():
        return
    for pid in map(int, run_tool("ip", "netns", "pids", name).split()):
        # this process is in the list while one of its own threads is inside
        if pid != os.getpid():
            _end(pid)
    run_tool("ip", "netns", "delete", name)


def sweep(prefix: str = PREFIX) -> list[str]:
    """Remove the namespaces named after `prefix` and a process that is no longer alive, and return their names."""
    names = [path.name for path in DIRECTORY.glob(f"{prefix}-*")]
    dead = [name for name in names if (match := re.match(rf"{prefix}-(\d+)-", name)) and not Path("/proc", match[1]).exists()]
    for name in dead:
        # another suite may be sweeping the same one
        with contextlib.suppress(ToolError):
            remove_namespace(name)
    return dead


def inside(name: str, action: Callable[[], T]) -> T:
    """Run `action` in a thread of its own inside the namespace `name` and return its result; what it raises is raised here.

    A socket stays in the namespace it was made in, whoever uses it later; so does what a child process inherits.

    Raises:
        OSError: there is no such namespace.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def enter_and_act() -> None:
        try:
            _enter(name)
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=enter_and_act, name=f"inside-{name}", daemon=True)
    thread.start()
    thread.join(ENTER_DEADLINE_S)
    if errors:
        raise errors.pop()
    assert results, f"still inside {name} after {ENTER_DEADLINE_S:g} s"
    return results[0]


def leave_network() -> None:
    """Move this thread, and whatever it starts from now on, into a new network with nothing but its loopback.

    Raises:
        OSError: the right is missing.
    """
    # os.unshare is there from Python 3.12 on only
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot make a network namespace")
    run_tool("ip", "link", "set", "lo", "up")


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    # an orphan becomes a child of the test process, which has to wait for it
    with contextlib.suppress(ChildProcessError):
        wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0], TOOL_DEADLINE_S, f"process {pid} ended")


def _enter(name: str) -> None:
    # os.setns is there from Python 3.12 on only
    library = ctypes.CDLL(None, use_errno=True)
    with (DIRECTORY / name).open() as namespace:
        if library.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")
