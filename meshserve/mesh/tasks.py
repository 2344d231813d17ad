"""Tasks with an owner, which ends them."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

_log = logging.getLogger(__name__)


class TaskOwner:
    """Starts tasks that must not outlive it. A task that fails is logged in one line and ends alone."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    @property
    def num_running(self) -> int:
        """Tasks that have not ended."""
        return len(self._tasks)

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run this until it ends or the owner closes."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if self._is_closed:
            task.cancel()
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error(
                "a background task failed: %r", task.exception(), exc_info=task.exception() if _log.isEnabledFor(logging.DEBUG) else None
            )

    async def close(self) -> None:
        """Cancel what runs and wait for its end."""
        self._is_closed = True
        for task in list(self._tasks):
            task.cancel()
        while self._tasks:
            await asyncio.wait(list(self._tasks))
