"""Waiting and event loops."""

import asyncio
import time

import pytest

from tests.harness import pace_async, run_async, until, until_awaited, wait_until


def test_the_first_true_answer_is_returned() -> None:
    answers = iter([0, None, "", 7])
    assert wait_until(lambda: next(answers), 1.0, "seven") == 7


def test_a_deadline_names_what_was_waited_for() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: the moon"):
        wait_until(lambda: False, 0.05, "the moon")
    assert time.monotonic() - start < 1.0


def test_an_asynchronous_wait_lets_other_tasks_run() -> None:
    async def both() -> int:
        async with asyncio.TaskGroup() as tasks:
            setter = tasks.create_task(pace_async(0.03))
            assert await until(setter.done, 1.0, "the other task")

        async def five() -> int:
            return 5

        return await until_awaited(five, 1.0, "five")

    assert run_async(both()) == 5


def test_an_asynchronous_deadline_names_what_was_waited_for() -> None:
    with pytest.raises(AssertionError, match="the moon"):
        run_async(until(lambda: None, 0.05, "the moon"))


def test_a_cancelled_pause_leaves_no_timer() -> None:
    async def cancel() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await pace_async(60.0)

    run_async(cancel())


def test_a_task_that_is_left_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.harness.loops.GRACE_S", 0.05)
    kept = []

    async def forget() -> None:
        kept.append(asyncio.create_task(pace_async(60.0)))

    with pytest.raises(AssertionError, match="pace_async"):
        run_async(forget())


def test_an_error_that_nobody_awaits_fails_the_test() -> None:
    async def stumble() -> None:
        asyncio.get_running_loop().call_soon(lambda: [][0])
        await pace_async(0.01)

    with pytest.raises(AssertionError, match="IndexError"):
        run_async(stumble())


def test_a_coroutine_that_hangs_is_ended_by_its_deadline() -> None:
    with pytest.raises(TimeoutError):
        run_async(pace_async(60.0), deadline_s=0.02)
