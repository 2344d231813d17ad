"""The demo's peers: real `meshserve run` processes, which end with the demo whatever happens."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field

from meshserve.errors import StartupFailed

_STOP_TIMEOUT_S = 5.0
_STDERR_LINES = 20


@dataclass(slots=True)
class Child:
    """One peer of the demo."""

    name: str
    roles: str
    process: asyncio.subprocess.Process | None = None
    ready_s: float | None = None
    """From its start to its ready line."""
    fields: dict[str, str] = field(default_factory=dict)
    """Of its ready line."""
    stderr: deque[str] = field(default_factory=lambda: deque(maxlen=_STDERR_LINES))


class Children:
    """Starts, watches and stops them."""

    def __init__(self, common: list[str]) -> None:
        self._common = common
        self.all: list[Child] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.workers_line = ""
        """The router's last word on who is ready."""

    async def start(self, name: str, roles: str, *options: str) -> Child:
        """Start one; :meth:`wait_ready` says when it serves."""
        child = Child(name, roles)
        self.all.append(child)
        command = [sys.executable, "-m", "meshserve", "run", "--role", roles, "--name", name, *self._common, *options]
        child.process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # an interrupt is for the demo, which then stops them in order
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        began_s = time.monotonic()
        assert child.process.stdout is not None and child.process.stderr is not None
        self._tasks.append(asyncio.create_task(self._read_stdout(child, child.process.stdout, began_s)))
        self._tasks.append(asyncio.create_task(self._read_stderr(child, child.process.stderr)))
        return child

    async def _read_stdout(self, child: Child, stream: asyncio.StreamReader, began_s: float) -> None:
        while line := (await stream.readline()).decode(errors="replace").rstrip():
            if line.startswith("ready "):
                child.fields = dict(part.split("=", 1) for part in line.split()[1:])
                child.ready_s = time.monotonic() - began_s
            elif " ready: " in line:
                self.workers_line = line

    async def _read_stderr(self, child: Child, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            child.stderr.append(line.decode(errors="replace").rstrip())

    def check(self) -> None:
        """Raises StartupFailed if one has ended that should not have."""
        for child in self.all:
            if child.process is not None and child.process.returncode is not None:
                words = child.stderr[-1] if child.stderr else f"exit code {child.process.returncode}"
                raise StartupFailed(f"the demo's peer {child.name} ended: {words.removeprefix('meshserve: ')}")

    async def stop(self) -> None:
        """Drain all of them at once; those that will not go are killed."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._gone()
        except (TimeoutError, asyncio.CancelledError):
            self._signal(signal.SIGKILL)
            await self._gone()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _signal(self, number: signal.Signals) -> None:
        for child in self.all:
            if child.process is not None and child.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.process.pid, number)

    async def _gone(self) -> None:
        await asyncio.gather(*(child.process.wait() for child in self.all if child.process is not None))
