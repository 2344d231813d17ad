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
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshserve.errors import InvalidRequest, MeshserveError, Overloaded, TokenizerFailed, from_wire
from meshserve.mesh.tasks import TaskOwner
from meshserve.roles.processor.text_program import HEAD

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
        self._process: Process | None = None
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
            self._end_if_stuck()
            raise Overloaded("too many prompts wait to be made into tokens")
        question = _Question(frame, asyncio.get_running_loop().create_future())
        if not self._waiting:
            self._asked_at = time.monotonic()
        self._waiting.append(question)
        self._waiting_bytes += len(frame)
        if self._is_loaded and self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(ConnectionError, RuntimeError):  # it has just died, and will be replaced
                self._process.stdin.write(frame)
        elif self._runner is None or self._runner.done():
            self._runner = self._tasks.spawn(self._run())
        return await question.answer

    async def close(self) -> None:
        """End it, for good. Whoever waits gets an error."""
        self._is_closed = True
        if self._process is not None:
            _kill(self._process)
        if self._runner is not None:
            await asyncio.wait([self._runner])

    def _end_if_stuck(self) -> None:
        if self._process is not None and time.monotonic() - self._asked_at > _STUCK_S:
            _kill(self._process)

    async def _run(self) -> None:
        """From the first question until no process is wanted. A death costs the question that it was at; the others are asked again."""
        reason: MeshserveError = Overloaded("this model's tokenizer had to make room for another")
        try:
            while self._waiting and not self._is_closed:
                process = self._process = await _start()
                try:
                    await self._serve(process)
                finally:
                    self._process, self._is_loaded = None, False
                    await _end(process)
                self._blame(process.returncode or 0)
        except MeshserveError as error:
            reason = error
        except OSError as error:
            reason = TokenizerFailed(f"no process could be started for the model's tokenizer: {error.strerror}")
        finally:
            self._fail_all(reason)

    async def _serve(self, process: Process) -> None:
        """Until it dies. Raises TokenizerFailed if it cannot even load the model's files."""
        assert process.stdin is not None and process.stdout is not None
        if self._is_closed:  # meanwhile
            return
        process.stdin.write(self._load)
        try:
            self.table = await _read_answer(process.stdout)
        except asyncio.IncompleteReadError as error:
            raise TokenizerFailed("reading the model's tokenizer took too much time or memory") from error
        self._forget_cancelled()
        process.stdin.writelines([question.frame for question in self._waiting])
        self._is_loaded = True
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self._answered(*await _read_frame(process.stdout))

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


async def _start() -> Process:
    """With nothing of this process but its modules: the environment may hold keys."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"}
    command = (sys.executable, "-P", "-m", "meshserve.roles.processor.text_program")
    return await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment)


async def _end(process: Process) -> None:
    _kill(process)
    await process.wait()
    process._transport.close()  # type: ignore[attr-defined]  # else its pipes stay open until they are garbage


def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


async def _read_frame(stream: asyncio.StreamReader) -> tuple[bytes, bool]:
    length, is_error = HEAD.unpack(await stream.readexactly(HEAD.size))
    if length > _MAX_ANSWER_BYTES:
        raise TokenizerFailed("the process of the model's tokenizer gave a senseless answer")
    return await stream.readexactly(length), bool(is_error)


async def _read_answer(stream: asyncio.StreamReader) -> bytes:
    answer, is_error = await _read_frame(stream)
    if is_error:
        raise _error_of(answer)
    return answer


def _error_of(answer: bytes) -> MeshserveError:
    try:
        return from_wire(json.loads(answer))
    except ValueError:
        return TokenizerFailed("the process of the model's tokenizer gave a senseless answer")
