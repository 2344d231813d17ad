"""What a child process writes, line by line, each with the moment it arrived."""

import contextlib
import os
import re
import selectors
import threading
import time
from typing import IO, NamedTuple

READ_SIZE_BYTES = 65536


class Line(NamedTuple):
    """One line of output, and when it was read on this process's monotonic clock."""

    at: float
    text: str


class Output:
    """Both outputs of a child, read by one thread into `stdout` and `stderr` until they end or `close` is called.

    Lines keep their order within one output; nothing is promised between the two.
    """

    def __init__(self, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        """Take over both pipes; `close` closes them."""
        self.stdout: list[Line] = []
        self.stderr: list[Line] = []
        self._pipes = {stdout: self.stdout, stderr: self.stderr}
        self._partial = {stdout: b"", stderr: b""}
        # a grandchild may keep a pipe open for ever: the end of the pipe alone would not end the thread
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._read, name="child-output")
        self._thread.start()

    def find(self, pattern: str, since: float = 0.0) -> re.Match[str] | None:
        """Return the first match of `pattern` in a line that arrived at `since` (monotonic) or later, stderr after stdout."""
        for line in [*self.stdout, *self.stderr]:
            if line.at >= since and (match := re.search(pattern, line.text)):
                return match
        return None

    def tail(self, num_lines: int = 30) -> str:
        """Return the last lines of both outputs, for a message about a failure."""
        parts = []
        for title, lines in (("stdout", self.stdout), ("stderr", self.stderr)):
            parts.append(f"--- {title}, last {min(num_lines, len(lines))} of {len(lines)} lines")
            parts += [line.text for line in lines[-num_lines:]]
        return "\n".join(parts)

    def join(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for both outputs to end."""
        self._thread.join(timeout_s)

    def close(self) -> None:
        """End the thread and close every pipe. May be called again."""
        if self._wake_write < 0:
            return
        os.close(self._wake_write)
        self._wake_write = -1
        self._thread.join()
        os.close(self._wake_read)
        for pipe in self._pipes:
            pipe.close()

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            for pipe in self._pipes:
                selector.register(pipe, selectors.EVENT_READ, pipe)
            while len(selector.get_map()) > 1:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    if not self._take(key.data):
                        selector.unregister(key.data)

    def _take(self, pipe: IO[bytes]) -> bool:
        chunk = b""
        with contextlib.suppress(OSError):
            chunk = os.read(pipe.fileno(), READ_SIZE_BYTES)
        now = time.monotonic()
        *lines, rest = (self._partial[pipe] + chunk).split(b"\n")
        if not chunk and rest:
            lines, rest = [rest], b""
        self._partial[pipe] = rest
        self._pipes[pipe].extend(Line(now, line.decode(errors="replace")) for line in lines)
        return bool(chunk)
