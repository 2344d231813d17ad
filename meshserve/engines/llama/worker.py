"""The thread that owns llama.cpp's model and context, and nothing else: plain data in, plain data out."""

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from meshserve.engines.core.sampling import Sampler
from meshserve.engines.llama.context import LlamaContext
from meshserve.engines.llama.slots import Move, Operation, Release, Share
from meshserve.errors import BlockRefused, EngineFailed, MeshserveError, StartupFailed
from meshserve.wire.generation import TokenLogprobs

_log = logging.getLogger(__name__)

_LEAVE_TIMEOUT_S = 5.0

Sample = tuple[int, TokenLogprobs | None]
"""A token, or END, and its log probabilities."""


@dataclass(slots=True)
class Rows:
    """A step as llama.cpp sees it, row for row."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    wants_logits: list[bool] = field(default_factory=list)

    def add(self, tokens: Sequence[int], first_position: int, sequence: int, wants_logits: bool) -> None:
        """Tokens of one sequence that follow each other; logits are wanted after the last one, or after none."""
        count = len(tokens)
        self.tokens += tokens
        self.positions += range(first_position, first_position + count)
        self.sequences += [sequence] * count
        self.wants_logits += [False] * (count - 1) + [wants_logits]


@dataclass(slots=True)
class StepWork:
    """One step: what comes before it, its rows, what is sampled and exported after it."""

    operations: list[Operation]
    rows: Rows
    samplers: list[tuple[int, Sampler, int]] = field(default_factory=list)
    """Row, sampler, position in the output."""
    exports: list[tuple[int, int, int]] = field(default_factory=list)
    """Sequence, first position, number of tokens of each block that is complete with the step."""


@dataclass(slots=True)
class StepOutput:
    """What came of it, in the same order."""

    sampled: list[Sample | Exception]
    payloads: list[bytes | Exception]
    duration_s: float


@dataclass(slots=True)
class WriteWork:
    """One block to be taken in."""

    operations: list[Operation]
    sequence: int
    first_position: int
    num_tokens: int
    payload: bytes


class EngineThread:
    """Runs work one after the other. Results come back on the event loop that started it; a failure ends the thread and all its work."""

    def __init__(self, load: Callable[[], LlamaContext], on_failure: Callable[[MeshserveError], None]) -> None:
        self._load, self._on_failure = load, on_failure
        self._loop = asyncio.get_running_loop()
        self._work: SimpleQueue[tuple[Any, Callable[[Any], None]] | None] = SimpleQueue()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._is_closing = False
        self.context: LlamaContext | None = None
        self._thread = threading.Thread(target=self._run, name="llama", daemon=True)

    async def start(self) -> None:
        """Load the model. Raises what `load` raises: StartupFailed."""
        atexit.register(self._leave)
        self._thread.start()
        await self._started

    def submit(self, work: StepWork | WriteWork, on_done: Callable[[Any], None]) -> None:
        """Do this next; `on_done` gets a StepOutput, or None or an error for a block."""
        self._work.put((work, on_done))

    async def close(self, timeout_s: float) -> None:
        """End the step that runs, and the thread with its context. A thread that hangs in the library is left behind after `timeout_s`."""
        self._is_closing = True
        if self.context is not None:
            self.context.abort()
        self._work.put(None)
        if self._thread.is_alive():
            try:
                await asyncio.wait_for(self._ended.wait(), timeout_s)
            except TimeoutError:
                _log.error("the engine's thread hangs, and is left behind")
                return
        atexit.unregister(self._leave)

    def _leave(self) -> None:
        """The interpreter ends without a close: a thread that is in the library while its memory goes would crash the process."""
        self._is_closing = True
        if self.context is not None:
            self.context.abort()
        self._work.put(None)
        self._thread.join(_LEAVE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            context = self.context = self._load()
        except BaseException as exc:
            self._tell(self._fail_start, exc)
            self._tell(self._ended.set)
            return
        self._tell(self._begin)
        try:
            while (item := self._work.get()) is not None and not self._is_closing:
                work, on_done = item
                self._tell(on_done, _do_step(context, work) if isinstance(work, StepWork) else _write(context, work))
        except BaseException as exc:  # whatever ends the thread ends the engine
            if not self._is_closing:
                _log.debug("the engine's thread ends", exc_info=True)
                error = exc if isinstance(exc, MeshserveError) else EngineFailed(f"the engine's thread ended: {exc!r}")
                self._tell(self._on_failure, error)
        finally:
            model = context.model
            context.close()
            model.close()
            self._tell(self._ended.set)

    def _tell(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            _log.debug("the event loop is closed")

    def _begin(self) -> None:
        if not self._started.done():
            self._started.set_result(None)

    def _fail_start(self, exc: BaseException) -> None:
        error = exc if isinstance(exc, MeshserveError) else StartupFailed(f"the model cannot be loaded: {exc}")
        if not self._started.done():
            self._started.set_exception(error)


def _operate(context: LlamaContext, operations: list[Operation]) -> None:
    for operation in operations:
        if isinstance(operation, Share):
            context.share(*operation)
        elif isinstance(operation, Move):
            _move(context, *operation)
        elif isinstance(operation, Release):
            context.release_removed()
        else:
            context.remove(*operation)


def _move(context: LlamaContext, sequences: tuple[int, ...], first_position: int, num_tokens: int) -> None:
    payload, end = context.export_block(sequences[0], first_position, num_tokens), first_position + num_tokens
    for sequence in sequences:
        context.remove(sequence, first_position, end)
    context.import_block(sequences[0], first_position, num_tokens, payload)
    for sequence in sequences[1:]:
        context.share(sequences[0], sequence, first_position, end)


def _do_step(context: LlamaContext, work: StepWork) -> StepOutput:
    began_s = time.monotonic()
    _operate(context, work.operations)
    rows = work.rows
    if rows.tokens and not context.decode(rows.tokens, rows.positions, rows.sequences, rows.wants_logits):
        raise EngineFailed("the KV cache is full though blocks were free: accounting of cells is broken")
    sampled: list[Sample | Exception] = []
    for row, sampler, position in work.samplers:
        try:
            sampled.append(sampler.sample(context.logits(row), position))
        except Exception as exc:
            sampled.append(exc)
    payloads = [_export(context, *export) for export in work.exports]
    return StepOutput(sampled, payloads, time.monotonic() - began_s)


def _export(context: LlamaContext, sequence: int, first_position: int, num_tokens: int) -> bytes | Exception:
    try:
        return context.export_block(sequence, first_position, num_tokens)
    except BlockRefused as error:
        return error


def _write(context: LlamaContext, work: WriteWork) -> MeshserveError | None:
    _operate(context, work.operations)
    try:
        context.import_block(work.sequence, work.first_position, work.num_tokens, work.payload)
    except MeshserveError as error:
        return error if isinstance(error, BlockRefused) else BlockRefused(error.message)
    return None
