"""The stdout and stderr of a peer: nothing that happens to them blocks or breaks the peer.

A terminal may be stopped (Ctrl-S), a pipe full and never read, a disk full, a reader gone. So a thread writes to each of the
two, from a bounded queue; whoever prints or logs only appends to the queue. Making the descriptors non-blocking would need no
thread, but descriptors are shared: the shell and the other processes of the terminal would find theirs non-blocking too.
"""

import contextlib
import io
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_MAX_WAITING_BYTES = 1 << 20
"""Of one output: some ten thousand lines. What does not fit is lost, and counted."""
_STUCK_S = 2.0
"""After which an output that takes nothing is said to be stuck."""
_LAST_WORDS_S = 1.0
"""At the end of the process, for what still waits."""


class _Piece(NamedTuple):
    data: bytes
    num_lost_before: int
    """Pieces that were lost before this one, and that this one tells of."""


class QueuedOutput(io.RawIOBase):
    """Writes to a descriptor from a thread of its own. `write` never blocks and never fails; one call is one piece, such as a line."""

    def __init__(self, descriptor: int, on_trouble: Callable[[str], None], lost_line: Callable[[str], str]) -> None:
        """`on_trouble` is called from the thread, with the reason, when writing stops working: once until it works again.

        `lost_line` words what is written into the output itself, once it works again.
        """
        super().__init__()
        self._descriptor, self._on_trouble, self._lost_line = descriptor, on_trouble, lost_line
        self._waiting: deque[_Piece] = deque()
        self._num_bytes = self._num_lost = 0
        self._is_in_trouble = self._is_torn = False
        self._changed = threading.Condition()
        # a daemon: it may be in a write that never returns, which must not keep the process
        threading.Thread(target=self._write_forever, name=f"output-{descriptor}", daemon=True).start()

    def write(self, data: "ReadableBuffer", /) -> int:
        """Queue the piece, or count it as lost if too much waits already."""
        piece = bytes(data)
        with self._changed:
            if self._num_bytes + len(piece) > _MAX_WAITING_BYTES:
                self._num_lost += 1
            elif piece:
                self._waiting.append(_Piece(self._notice() + piece, self._num_lost))
                self._num_bytes += len(self._waiting[-1].data)
                self._num_lost = 0
                self._changed.notify_all()
        return len(piece)

    def _notice(self) -> bytes:
        line = self._lost_line(f"{self._num_lost} lines could not be written here") if self._num_lost else ""
        return f"{line}\n".encode(errors="backslashreplace") if line else b""

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """The descriptor below, for those who ask whether this is a terminal."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether the descriptor below is a terminal."""
        return os.isatty(self._descriptor)

    def wait_until_written(self, until_s: float) -> None:
        """Wait for the queue to be empty, at most until this time (monotonic)."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, max(0.0, until_s - time.monotonic()))

    def _write_forever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                piece = self._waiting[0]
            try:
                self._write_all(piece.data)
                self._is_in_trouble = False
            except OSError as error:
                self._say(error.strerror or type(error).__name__)
                with self._changed:
                    self._num_lost += 1 + piece.num_lost_before
            with self._changed:
                self._waiting.popleft()
                self._num_bytes -= len(piece.data)
                self._changed.notify_all()

    def _write_all(self, data: bytes) -> None:
        """Blocks. Raises OSError."""
        if self._is_torn:  # half a line of before stands there
            data = b"\n" + data
        whole = len(data)
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        while data:
            if not poll.poll(_STUCK_S * 1000):
                self._say("it takes no more, as if nobody read it")
                poll.poll()
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # somebody else made the shared descriptor non-blocking
                continue
            finally:
                self._is_torn = 0 < len(data) < whole

    def _say(self, reason: str) -> None:
        if not self._is_in_trouble:
            self._is_in_trouble = True
            self._on_trouble(reason)


@contextlib.contextmanager
def queued_outputs(say: Callable[[str, str], str]) -> Iterator[None]:
    """Until the end of the block, sys.stdout and sys.stderr are queued. What still waits then gets a moment.

    If one of the two cannot be written, the other says so. `say` makes the line of an event and its text for stderr.
    """
    before = sys.stdout, sys.stderr

    def on_stdout_trouble(reason: str) -> None:
        _print(sys.stderr, say("output_lost", f"cannot write to stdout: {reason}; this peer goes on without"))

    def on_stderr_trouble(reason: str) -> None:
        _print(sys.stdout, f"meshserve: cannot write to stderr: {reason}; this peer goes on without its log")

    opened = [
        _queued(sys.stdout, on_stdout_trouble, lambda text: f"meshserve: {text}"),
        _queued(sys.stderr, on_stderr_trouble, lambda text: say("output_lost", text)),
    ]
    sys.stdout, sys.stderr = (queued or old for queued, old in zip(opened, before, strict=True))
    try:
        yield
    finally:
        until_s = time.monotonic() + _LAST_WORDS_S
        for queued in filter(None, opened):
            queued.buffer.wait_until_written(until_s)  # type: ignore[attr-defined]
        sys.stdout, sys.stderr = before


def _queued(stream: TextIO | Any, on_trouble: Callable[[str], None], lost_line: Callable[[str], str]) -> io.TextIOWrapper | None:
    """None where there is no descriptor below: closed from the start, whose number then belongs to something else."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None
    raw = QueuedOutput(descriptor, on_trouble, lost_line)
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", write_through=True)  # type: ignore[arg-type]


def _print(stream: TextIO | None, line: str) -> None:
    if stream is not None:
        stream.write(f"{line}\n")
