"""Real child processes: started, watched, stopped and killed, and never left behind."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from tests.harness.output import Line, Output
from tests.harness.spawning import ROOT, Child, can_fork, fork
from tests.harness.waiting import wait_until

T = TypeVar("T")

ALL_ROLES = (
    *("run", "--role", "all", "--interface", "127.0.0.1", "--no-mdns"),
    *("--http", "127.0.0.1:0"),
)
"""Arguments of `meshserve` for one peer with all roles, on loopback."""
CLOSE_S = 5.0
_STOP_S = 5.0


class Completed(NamedTuple):
    """A command that has ended."""

    exit_code: int
    stdout: str
    stderr: str


def meshserve_command(*arguments: str) -> list[str]:
    """Return the command line that runs meshserve's command `arguments` with this interpreter."""
    return [sys.executable, "-m", "meshserve", *arguments]


def in_namespace(netns: str | None, command: Sequence[str]) -> list[str]:
    """Return the command line that runs `command` in the network namespace `netns`; its pid is that of `command`."""
    return list(command) if netns is None else ["ip", "netns", "exec", netns, *command]


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without its MESHSERVE_ variables, with `extra` on top."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MESHSERVE_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **(extra or {})}


def _started(command: list[str], netns: str | None, env: Mapping[str, str] | None) -> "subprocess.Popen[bytes] | Child":
    if can_fork(command, env):
        return fork(command, netns, child_environment(env))
    return subprocess.Popen(
        in_namespace(netns, command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=child_environment(env),
        # `-m meshserve` finds the package of this very checkout, whatever else is installed
        cwd=ROOT,
        start_new_session=True,
    )


def run_command(
    arguments: Sequence[str], deadline_s: float = 10.0, netns: str | None = None, env: Mapping[str, str] | None = None
) -> Completed:
    """Run a command to its end, in the network namespace `netns` if one is named; any exit code is returned.

    Raises:
        AssertionError: it was still running after `deadline_s` seconds; it has been killed.
    """
    with Process(arguments, netns=netns, env=env) as process:
        exit_code = process.wait(deadline_s)
        return Completed(exit_code, process.stdout_text, process.stderr_text)


class Process:
    """A child process in a session of its own, with both outputs read as they come."""

    def __init__(self, command: Sequence[str], netns: str | None = None, env: Mapping[str, str] | None = None) -> None:
        """Start `command`, in the network namespace `netns` if one is named, with `env` added to the environment."""
        self.command = list(command)
        self._child = _started(self.command, netns, env)
        self.started_at = time.monotonic()
        self._is_closed = False
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        self._output = Output(self._child.stdout, self._child.stderr)

    @property
    def pid(self) -> int:
        """The process id, also that of its session and group."""
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, the negative signal number if a signal ended it, None while it runs."""
        return self._child.poll()

    @property
    def stdout(self) -> list[Line]:
        """The lines of stdout so far, each with its time of arrival."""
        return self._output.stdout

    @property
    def stderr(self) -> list[Line]:
        """The lines of stderr so far, each with its time of arrival."""
        return self._output.stderr

    @property
    def stdout_text(self) -> str:
        """What stdout has said so far."""
        return "\n".join(line.text for line in self.stdout)

    @property
    def stderr_text(self) -> str:
        """What stderr has said so far."""
        return "\n".join(line.text for line in self.stderr)

    def ready(self, deadline_s: float = 10.0) -> dict[str, str]:
        """Wait for the line `ready name=NAME roles=ROLE,ROLE ...` and return its fields.

        Raises:
            AssertionError: no such line within `deadline_s` seconds, or the process ended before it.
        """
        match = self.wait_for_line(r"^ready (name=.*)$", deadline_s)
        return dict(field.split("=", 1) for field in match[1].split())

    def find_line(self, pattern: str, since: float = 0.0) -> re.Match[str] | None:
        """Return the first match of `pattern` in a line that arrived at `since` (monotonic) or later, or None."""
        return self._output.find(pattern, since)

    def wait_for_line(self, pattern: str, deadline_s: float, since: float = 0.0) -> re.Match[str]:
        """Wait for a line of either output, at `since` (monotonic) or later, that `pattern` is found in.

        Raises:
            AssertionError: no such line within `deadline_s` seconds, or the process ended without it.
        """

        what = f"a line like {pattern!r}"

        def find() -> re.Match[str] | None:
            # asked before the search, so that the last lines of one that has just ended are searched too
            has_ended = self._has_ended()
            match = self.find_line(pattern, since)
            assert match or not has_ended, f"ended before {what}"
            return match

        return self._explained(lambda: wait_until(find, deadline_s, what))

    def kill(self) -> None:
        """Send SIGKILL to the process, though not to its children."""
        self._child.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        """Send SIGSTOP, and wait until each of its threads stands still; its sockets stay open."""
        self._child.send_signal(signal.SIGSTOP)
        wait_until(lambda: all(state in "TZX" for state in _thread_states(self.pid)), _STOP_S, "every thread is stopped")

    def resume(self) -> None:
        """Send SIGCONT: it goes on from where it was stopped."""
        self._child.send_signal(signal.SIGCONT)

    def interrupt(self) -> None:
        """Send SIGINT, as Ctrl-C does."""
        self._child.send_signal(signal.SIGINT)

    def terminate(self) -> None:
        """Send SIGTERM, which asks for a drain."""
        self._child.terminate()

    def wait(self, deadline_s: float = 10.0) -> int:
        """Wait for the end and return the exit code; its output is complete then.

        Raises:
            AssertionError: it was still running after `deadline_s` seconds.
        """
        self._explained(lambda: wait_until(lambda: self.exit_code is not None, deadline_s, "the process ended"))
        self._output.join(1.0)
        return int(self._child.returncode or 0)

    def close(self) -> None:
        """Kill the process and whatever is left of its session's group, and close its outputs. May be called again."""
        # once reaped, its number may belong to others
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._child.wait(CLOSE_S)
        self._reap_group()
        self._output.close()

    def __enter__(self) -> Self:
        """Return the process itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it."""
        self.close()

    def _reap_group(self) -> None:
        # the children of a dead child are ours where the test process adopts orphans; elsewhere init takes them
        end = time.monotonic() + CLOSE_S
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < end:
                wait_until(lambda: os.waitpid(-self.pid, os.WNOHANG)[0], CLOSE_S, "the children of a killed process ended")

    def _has_ended(self) -> bool:
        if self.exit_code is None:
            return False
        self._output.join(1.0)
        return True

    def _explained(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._describe()}") from None

    def _describe(self) -> str:
        state = "running" if self.exit_code is None else f"exit code {self.exit_code}"
        return f"{shlex.join(self.command)} (pid {self.pid}, {state})\n{self._output.tail()}"


def _thread_states(pid: int) -> Iterator[str]:
    """As proc(5) has them; none of a process that has ended."""
    for path in Path("/proc", str(pid), "task").glob("*/stat"):
        with contextlib.suppress(OSError):  # a thread may end meanwhile
            yield path.read_text().rpartition(")")[2].split()[0]
