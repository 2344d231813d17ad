"""A process of its own for another peer's template and tokenizer: started when it is needed, asked in turn, replaced when it dies.

Why not a thread: reading a tokenizer of 9 MB holds Python's lock for a third of a second, in which no token moves; and a template that
doubles a string in a loop can be ended by nobody. The way there and back costs 30 us.
"""

import asyncio
import contextlib
import json
import marshal
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from meshserve.errors import InvalidRequest, MeshserveError, Overloaded, TokenizerFailed, from_wire
from meshserve.mesh.tasks import TaskOwner
from meshserve.roles.processor.text_program import HEAD

T = TypeVar("T")

_MAX_WAITING = 1024
_MAX_WAITING_BYTES = 64 * 1024 * 1024
_MAX_ANSWER_BYTES = 512 * 1024 * 1024
_STUCK_S = 300.0
"""A process that has not answered for so long is ended: its own limits of processor time end all that computes."""


@dataclass(slots=True, eq=False)
class _Question:
    frame: bytes
    answer: "asyncio.Future[bytes]"
    num_deaths: int = 0


def load_request(tokenizer: str, files: Mapping[str, bytes], template: str) -> bytes:
    """What a process is told first: a card's kind of tokenizer, the files by name, and the template where those have none."""
    return _framed(("load", tokenizer, dict(files), template))


class TextProcess:
    """Asked from the event loop. Answers come in the order of the questions."""

    def __init__(self, tasks: TaskOwner, load: bytes) -> None:
        self._tasks, self._load = tasks, load
        self._waiting: deque[_Question] = deque()
        self._waiting_bytes = 0
        self._child: _Child | None = None
        self._is_loaded = self._is_closed = False
        self._runner: asyncio.Task[None] | None = None
        self._asked_at = 0.0
        self.table = b""
        """What it said of the vocabulary when it was loaded."""

    @property
    def is_idle(self) -> bool:
        """Nobody waits for it."""
        return not self._waiting

    async def ask(self, *request: Any) -> bytes:
        """The answer. Raises the MeshserveError that it ends in; Overloaded if too many wait. Whoever waits sets the deadline."""
        frame = _framed(request)
        if len(self._waiting) >= _MAX_WAITING or self._waiting_bytes + len(frame) > _MAX_WAITING_BYTES:
            if self._child is not None and time.monotonic() - self._asked_at > _STUCK_S:
                self._child.kill()
            raise Overloaded("too many prompts wait to be made into tokens")
        question = _Question(frame, asyncio.get_running_loop().create_future())
        if not self._waiting:
            self._asked_at = time.monotonic()
        self._waiting.append(question)
        self._waiting_bytes += len(frame)
        if self._is_loaded and self._child is not None:
            self._child.send(frame)
        elif self._runner is None or self._runner.done():
            self._runner = self._tasks.spawn(self._run())
        return await question.answer

    async def close(self) -> None:
        """End it, for good. Whoever waits gets an error."""
        self._is_closed = True
        if self._child is not None:
            self._child.kill()
        if self._runner is not None:
            await asyncio.wait([self._runner])

    async def _run(self) -> None:
        """From the first question until no process is wanted. A death costs the question that it was at; the others are asked again."""
        reason: MeshserveError = Overloaded("this model's tokenizer had to make room for another")
        try:
            while self._waiting and not self._is_closed:
                child = self._child = await _to_its_end(_Child.start(), _Child.end)
                try:
                    await self._serve(child)
                finally:
                    self._child, self._is_loaded = None, False
                    code = await _to_its_end(child.end())
                self._blame(code)
        except MeshserveError as error:
            reason = error
        except OSError as error:
            reason = TokenizerFailed(f"no process could be started for the model's tokenizer: {error.strerror}")
        finally:
            self._fail_all(reason)

    async def _serve(self, child: "_Child") -> None:
        """Until it dies. Raises TokenizerFailed if it cannot even load the model's files."""
        if self._is_closed:  # meanwhile
            return
        child.send(self._load)
        try:
            answer, is_error = await _read_frame(child.reader)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise TokenizerFailed("reading the model's tokenizer took too much time or memory") from error
        if is_error:
            raise _error_of(answer)
        self.table = answer
        self._forget_cancelled()
        for question in self._waiting:
            child.send(question.frame)
        self._is_loaded = True
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self._answered(*await _read_frame(child.reader))

    def _answered(self, answer: bytes, is_error: bool) -> None:
        question = self._take()
        if question.answer.done():  # nobody waits for it any more
            return
        if is_error:
            question.answer.set_exception(_error_of(answer))
        else:
            question.answer.set_result(answer)

    def _blame(self, returncode: int) -> None:
        """It died at the first question that is left: of that one's making if it ran out of time, or if another did so too."""
        if not self._waiting:
            return
        question = self._waiting[0]
        question.num_deaths += 1
        is_time = returncode == -signal.SIGPROF
        if is_time or question.num_deaths > 1:
            reason = "takes too long" if is_time else "takes too much memory, or crashes"
            self._take()
            if not question.answer.done():
                question.answer.set_exception(InvalidRequest(f"the model's own chat template or tokenizer {reason} with this request"))

    def _forget_cancelled(self) -> None:
        for question in [question for question in self._waiting if question.answer.done()]:
            self._waiting.remove(question)
            self._waiting_bytes -= len(question.frame)

    def _take(self) -> _Question:
        question = self._waiting.popleft()
        self._waiting_bytes -= len(question.frame)
        self._asked_at = time.monotonic()
        return question

    def _fail_all(self, error: MeshserveError) -> None:
        while self._waiting:
            question = self._take()
            if not question.answer.done():
                question.answer.set_exception(error)


def _framed(request: tuple[Any, ...]) -> bytes:
    # marshal takes 13 ms for 8 MB of text there and back, JSON 47; it is only ever read by a child of this very program
    data = marshal.dumps(request)
    return HEAD.pack(len(data), 0) + data


class _Child:
    """A running process and the stream to it, which ends with it."""

    def __init__(self, process: "subprocess.Popen[bytes]", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._process, self.reader, self._writer = process, reader, writer

    @classmethod
    async def start(cls) -> "_Child":
        """Raises OSError. Not to be cancelled half-way: :func:`_to_its_end`."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.to_thread(_spawn, theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(process, *await asyncio.open_unix_connection(sock=ours))

    def send(self, frame: bytes) -> None:
        """Never blocks; if it has just died, nothing happens."""
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._writer.write(frame)

    def kill(self) -> None:
        """At once."""
        self._process.kill()

    async def end(self) -> int:
        """Kill it if it lives, and give back what it held. Its exit code, or less than 0 for the signal that ended it."""
        self._process.kill()
        self._writer.transport.abort()
        return await asyncio.to_thread(self._process.wait)


def _spawn(connection: socket.socket) -> "subprocess.Popen[bytes]":
    """With nothing of this process but its modules: the environment may hold keys.

    By a thread and not by the event loop, whose own way is a fork with Python's hooks in a process of many threads.
    """
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"}
    command = (sys.executable, "-P", "-m", "meshserve.roles.processor.text_program")
    return subprocess.Popen(command, stdin=connection.fileno(), stdout=connection.fileno(), stderr=subprocess.DEVNULL, env=environment)


async def _to_its_end(work: Coroutine[Any, Any, T], undo: Callable[[T], Coroutine[Any, Any, Any]] | None = None) -> T:
    """The result of work that must not stop half-way; if this is cancelled meanwhile, the work is undone by `undo`."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        done = await task
        if undo is not None:
            await undo(done)
        raise


async def _read_frame(stream: asyncio.StreamReader) -> tuple[bytes, bool]:
    length, is_error = HEAD.unpack(await stream.readexactly(HEAD.size))
    if length > _MAX_ANSWER_BYTES:
        raise TokenizerFailed("the process of the model's tokenizer gave a senseless answer")
    return await stream.readexactly(length), bool(is_error)


def _error_of(answer: bytes) -> MeshserveError:
    try:
        return from_wire(json.loads(answer))
    except ValueError:
        return TokenizerFailed("the process of the model's tokenizer gave a senseless answer")
