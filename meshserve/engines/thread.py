"""A thread that owns an engine's model: work goes in, results come back on the event loop."""

import asyncio
import atexit
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from meshserve.errors import EngineFailed, MeshserveError, StartupFailed

_log = logging.getLogger(__name__)

_LEAVE_TIMEOUT_S = 5.0


class Abortable(Protocol):
    """A model that computes."""

    def abort(self) -> None:
        """End the work that runs now, soon. Called from another thread."""


M = TypeVar("M", bound=Abortable)
T = TypeVar("T")


class EngineThread(Generic[M]):
    """Runs work one after the other. A failure ends the thread and all its work: `on_failure` is told on the event loop that made it.

    `load` is entered and left in the thread: it gives the model, and frees it.
    """

    def __init__(self, load: Callable[[], AbstractContextManager[M]], on_failure: Callable[[MeshserveError], None]) -> None:
        self._load, self._on_failure = load, on_failure
        self._loop = asyncio.get_running_loop()
        self._work: SimpleQueue[tuple[Callable[[M], Any], Callable[[Any], None]] | None] = SimpleQueue()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._is_closing = False
        self._model: M | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def start(self) -> None:
        """Load the model. Raises what loading raises, as StartupFailed, and that where the system gives no thread."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise StartupFailed(f"the system gives the engine no thread ({error}): end other programs, or raise its limits") from error
        atexit.register(self._leave)
        await self._started

    def submit(self, work: Callable[[M], T], on_done: Callable[[T], None]) -> None:
        """Call `work` with the model next, in the thread; `on_done` gets the result. What `work` raises is a failure."""
        self._work.put((work, on_done))

    async def close(self, timeout_s: float) -> None:
        """End the work that runs, and the thread with its model. A thread that hangs in a library is left behind after `timeout_s`."""
        self._stop()
        if self._thread.is_alive():
            try:
                await asyncio.wait_for(self._ended.wait(), timeout_s)
            except TimeoutError:
                _log.error("the engine's thread hangs, and is left behind")
                return
        atexit.unregister(self._leave)

    def _leave(self) -> None:
        """The interpreter ends without a close: a thread that is in a library while its memory goes would crash the process."""
        self._stop()
        self._thread.join(_LEAVE_TIMEOUT_S)

    def _stop(self) -> None:
        self._is_closing = True
        if self._model is not None:
            self._model.abort()
        self._work.put(None)

    def _run(self) -> None:
        try:
            with self._load() as model:
                self._model = model
                self._tell(self._begin)
                while (item := self._work.get()) is not None and not self._is_closing:
                    work, on_done = item
                    self._tell(on_done, work(model))
        except BaseException as exc:  # whatever ends the thread ends the engine
            self._tell(self._fail, exc)
        finally:
            self._tell(self._ended.set)

    def _tell(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            _log.debug("the event loop is closed")

    def _begin(self) -> None:
        if not self._started.done():  # else whoever waited for it was cancelled
            self._started.set_result(None)

    def _fail(self, exc: BaseException) -> None:
        if not self._started.done():
            self._started.set_exception(exc if isinstance(exc, MeshserveError) else StartupFailed(f"the model cannot be loaded: {exc}"))
        elif not self._is_closing:
            _log.debug("the engine's thread ends", exc_info=exc)
            self._on_failure(exc if isinstance(exc, MeshserveError) else EngineFailed(f"the engine's thread ended: {exc!r}"))
