"""A real terminal of any size: tmux, whose screen can be typed to, resized and read."""

import contextlib
import os
import shlex
import shutil
import signal
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.processes import Completed, Process, child_environment, run_command
from tests.harness.spawning import ROOT
from tests.harness.waiting import wait_until

ANSWER_S = 5.0


def has_tmux() -> bool:
    """Whether it is installed."""
    return shutil.which("tmux") is not None


class Screen:
    """One command on a terminal of its own; a context manager that ends both."""

    def __init__(self, command: Sequence[str], width: int, height: int, directory: Path) -> None:
        """Start `command`; what it writes is kept in `directory` too, byte by byte."""
        self._name = f"meshserve-{uuid.uuid4().hex[:8]}"
        self._raw, self._code = directory / f"{self._name}.raw", directory / f"{self._name}.code"
        configuration = directory / f"{self._name}.conf"
        configuration.write_text("set -g exit-empty off\nset -g remain-on-exit on\nset -g status off\n")
        self._server = Process(["tmux", "-L", self._name, "-f", str(configuration), "-D"], env={"TERM": "screen-256color"})
        # a command that would start a server of its own, such as `start-server`, would race with ours
        wait_until(lambda: self._tmux("show-options", "-g").exit_code == 0, ANSWER_S, "tmux is up")
        assignments = [f"{key}={value}" for key, value in child_environment().items() if key in ("PATH", "HOME", "PYTHONUNBUFFERED")]
        line = (
            shlex.join(["cd", str(ROOT)])
            + " && "
            + shlex.join(["env", "-i", "TERM=screen-256color", "LANG=C.UTF-8", *assignments, *command])
        )
        # the pipe must be there before the first byte is
        held = f"tmux -L {self._name} wait-for go && {line}; echo $? > {shlex.quote(str(self._code))}"
        self._check("new-session", "-d", "-x", str(width), "-y", str(height), held)
        self._check("pipe-pane", "-o", f"cat > {shlex.quote(str(self._raw))}")
        self._check("wait-for", "-S", "go")

    def _tmux(self, *arguments: str) -> Completed:
        return run_command(["tmux", "-u", "-L", self._name, *arguments], ANSWER_S)

    def _check(self, *arguments: str) -> str:
        done = self._tmux(*arguments)
        assert done.exit_code == 0, done
        return done.stdout

    def lines(self) -> list[str]:
        """What stands on the screen, from the top."""
        return self._check("capture-pane", "-p").split("\n")

    def text(self) -> str:
        """The same in one piece."""
        return "\n".join(self.lines())

    def raw(self) -> bytes:
        """All that was written to it so far."""
        return self._raw.read_bytes()

    def wait_for(self, words: str, deadline_s: float = 10.0) -> list[str]:
        """Until the words stand there; returns the lines.

        Raises:
            AssertionError: they did not come within `deadline_s` seconds; the message shows the screen.
        """
        try:
            wait_until(lambda: words in self.text(), deadline_s, f"{words!r} on the screen")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from None
        return self.lines()

    def press(self, *keys: str) -> None:
        """Keys by tmux's names: `q`, `Down`, `Enter`, `C-c`."""
        self._check("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        """As a window is."""
        self._check("resize-window", "-x", str(width), "-y", str(height))

    def wait_for_end(self, deadline_s: float = 10.0) -> int:
        """The command's exit code.

        Raises:
            AssertionError: it still runs after `deadline_s` seconds.
        """
        # by the shell's word: tmux now and then misses that a command has ended
        return int(wait_until(lambda: self._code.read_text().strip() if self._code.exists() else "", deadline_s, "the command ended"))

    def close(self) -> None:
        """End the terminal, and what runs in it."""
        descendants = list(_descendants(self._server.pid))
        self._tmux("kill-server")
        self._server.close()
        for pid in descendants:
            _end(pid)

    def __enter__(self) -> Self:
        """Return the screen itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it."""
        self.close()


def _descendants(pid: int) -> Iterator[int]:
    for task in Path("/proc", str(pid), "task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            yield child
            yield from _descendants(child)


def _end(pid: int) -> None:
    """Orphans become children of the test process, which has to wait for them."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0], ANSWER_S, f"process {pid} ended")
