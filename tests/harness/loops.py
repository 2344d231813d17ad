"""Coroutines in tests: an event loop of their own, and nothing left in it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

from tests.harness.waiting import until

T = TypeVar("T")

GRACE_S = 1.0


def run_async(coroutine: Coroutine[Any, Any, T], deadline_s: float = 120.0) -> T:
    """Run `coroutine` on a uvloop event loop of its own and return its result.

    Raises:
        TimeoutError: it took longer than `deadline_s` seconds.
        AssertionError: tasks were still running one second after it ended, or an error reached only the loop itself.
    """
    strays: list[dict[str, Any]] = []
    with asyncio.Runner(debug=False, loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: strays.append(context))
        result = runner.run(_supervised(coroutine, deadline_s))
    assert not strays, f"errors that nobody awaited: {strays}"
    return result


async def _supervised(coroutine: Coroutine[Any, Any, T], deadline_s: float) -> T:
    async with asyncio.timeout(deadline_s):
        result = await coroutine
    try:
        await until(lambda: not _other_tasks(), GRACE_S, "every task ended")
    except AssertionError:
        left = [str(task.get_coro()) for task in _other_tasks()]
        raise AssertionError(f"{len(left)} tasks still running: {left}") from None
    return result


def _other_tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}
