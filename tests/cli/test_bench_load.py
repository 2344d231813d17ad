"""The load generator's loops against a scripted server on a real socket."""

import asyncio
import itertools
import os
import random
import signal
import time
from collections.abc import Sequence
from typing import Any

import pytest

from meshserve.cli.bench.arrivals import Level, constant_level, due_times
from meshserve.cli.bench.http_target import HttpSettings, HttpTarget
from meshserve.cli.bench.load import Load, Plan, Stop
from meshserve.cli.bench.prompts import Scale, Shape, Workload, parse_lengths
from meshserve.cli.bench.requests import Request
from meshserve.cli.bench.tally import Goal, Tally
from tests.cli.bench_server import Asked, Part, Script, Server, serving, tokens, whole
from tests.harness import run_async, until
from tests.harness.pressure import allowance_s

JOB = Request((("user", "hello"),), 2)


async def loaded(server: Server, plan: Plan, rate: float | None = None, workload: Workload | None = None, is_chat: bool = False) -> Tally:
    """One run on this server."""
    target = HttpTarget(server.url, HttpSettings("chat" if is_chat else "completions", "scripted", is_keeping_text=workload is not None))
    await target.open()
    tally = Tally(Goal())
    dues = None if rate is None else due_times(constant_level(rate), "constant", random.Random(0))
    jobs: Any = workload if workload is not None else itertools.repeat(JOB)
    load = Load(target, plan, jobs, dues, tally, workload.next_turn if workload is not None else None)
    try:
        await load.run()
    finally:
        await target.close()
    return tally


def run(script: Script, plan: Plan, rate: float | None = None) -> tuple[Tally, Server]:
    async def course() -> tuple[Tally, Server]:
        async with serving(script) as server:
            return await loaded(server, plan, rate), server

    return run_async(course())


class StallsOnce:
    """Answers at once, except for one second after its n-th request: what comes then waits until that second is over."""

    def __init__(self, number: int, stall_s: float = 1.0) -> None:
        self._left, self._stall_s = number, stall_s
        self._until = 0.0

    def __call__(self, asked: Asked) -> Sequence[Part]:
        now = asyncio.get_running_loop().time()
        self._left -= 1
        if self._left == 0:
            self._until = now + self._stall_s
        return tokens(2, first_s=max(0.0, self._until - now))


@pytest.mark.parametrize("max_open", [10_000, 4])
def test_an_open_loop_reports_a_stall_to_all_who_were_due_in_it(max_open: int) -> None:
    tally, _ = run(StallsOnce(100), Plan(num_requests=450, max_open=max_open), rate=250)
    ttft = tally.times["ttft"]
    assert tally.num_done == 450 and not tally.errors
    assert ttft.quantile_ms(0.999) >= 950
    # 250 were due in that second, and waited half of it on average; a closed loop would have seen one
    assert ttft.count * (1 - share_below(tally, 100)) >= 200
    assert bool(tally.num_delayed) is (max_open == 4)
    assert (tally.times["queue"].quantile_ms(0.999) >= 900) is (max_open == 4)


def share_below(tally: Tally, milliseconds: float) -> float:
    return max((share for value, share in tally.times["ttft"].steps() if value <= milliseconds), default=0.0)


def test_a_closed_loop_meets_the_same_stall_once_for_each_client() -> None:
    tally, _ = run(StallsOnce(200), Plan(clients=constant_level(1), num_requests=600))
    assert tally.times["ttft"].most_s >= 0.95 and share_below(tally, 100) > 0.98


def test_a_closed_loop_has_as_many_under_way_as_it_has_clients() -> None:
    tally, server = run(lambda asked: tokens(2, first_s=0.02), Plan(clients=constant_level(7), num_requests=60))
    assert tally.num_done == 60, tally.errors
    assert server.num_connections == 7
    assert 60 <= len(server.asked) <= 60 + 7


def test_a_ramp_brings_clients_as_time_goes_on() -> None:
    tally, server = run(lambda asked: tokens(2, first_s=0.005), Plan(clients=Level(1, 6, 0.5), duration_s=2.0))
    assert server.num_connections == 6 and tally.num_done > 20
    assert {asked.connection for asked in server.asked[:2]} == {1}


def test_the_warm_up_is_asked_and_left_out() -> None:
    tally, server = run(lambda asked: tokens(2), Plan(clients=constant_level(2), num_requests=30, num_warmup=12))
    assert tally.num_done == 30 and len(server.asked) == 42
    tally, server = run(lambda asked: tokens(2, first_s=0.01), Plan(clients=constant_level(1), duration_s=0.3, warmup_s=0.2))
    assert tally.num_done < len(server.asked) and tally.window_s == pytest.approx(0.3)


def test_what_takes_too_long_is_an_error_and_the_run_goes_on() -> None:
    slow = itertools.count()

    def script(asked: Asked) -> Sequence[Part]:
        return [] if next(slow) % 10 == 0 else tokens(2)

    tally, _ = run(script, Plan(clients=constant_level(2), num_requests=40, timeout_s=0.4))
    assert tally.errors == {"timeout": 4} and tally.num_done == 36


def test_a_server_that_refuses_everything_is_not_hammered() -> None:
    tally, server = run(lambda asked: [(0, whole(503, b"{}"))], Plan(clients=constant_level(2), duration_s=0.5))
    assert tally.num_done == 0 and tally.errors.keys() == {"HTTP 503"} and len(server.asked) <= 2 * 0.5 / 0.05 + 4


@pytest.mark.parametrize("rate", [None, 50.0, 0.01])
def test_ctrl_c_ends_the_load_with_what_there_is(rate: float | None) -> None:
    plan = Plan(clients=constant_level(2) if rate is None else None, num_requests=100_000)

    async def course() -> tuple[Tally, Load]:
        async with serving(lambda asked: tokens(2, first_s=0.01)) as server:
            target = HttpTarget(server.url, HttpSettings("completions", "scripted"))
            await target.open()
            tally = Tally(Goal())
            dues = None if rate is None else itertools.chain([0.0, 0.0, 0.0], due_times(constant_level(rate), "constant", random.Random(0)))
            load = Load(target, plan, itertools.repeat(JOB), dues, tally)
            with Stop() as stop:
                stop.watch(load)
                running = asyncio.create_task(load.run())
                await until(lambda: tally.num_done >= 3, 10.0, "three answers")
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.wait_for(running, 60.0)
            assert stop.is_asked and signal.getsignal(signal.SIGINT) is signal.default_int_handler
            await target.close()
            return tally, load

    tally, load = run_async(course())
    assert load.is_stopped and load.num_open == 0 and load.num_left <= 2
    assert 0 < tally.window_s < 20 and tally.num_done >= 3 and not tally.errors and tally.requests_per_s > 0


def test_a_load_that_was_stopped_before_it_began_asks_nothing() -> None:
    async def course() -> None:
        async with serving(lambda asked: tokens(2)) as server:
            target = HttpTarget(server.url, HttpSettings("completions", "scripted"))
            await target.open()
            load = Load(target, Plan(clients=constant_level(1), duration_s=60.0), itertools.repeat(JOB), None, Tally(Goal()))
            load.stop()
            await asyncio.wait_for(load.run(), 60.0)
            await target.close()
            assert not server.asked

    run_async(course())


def test_what_was_due_and_could_not_be_sent_in_time_is_counted() -> None:
    tally, _ = run(lambda asked: tokens(2, first_s=5.0), Plan(duration_s=0.5, max_open=10, timeout_s=0.7), rate=100)
    assert tally.errors == {"timeout": 10} and tally.num_delayed == 1 and 35 <= tally.num_unsent <= 41


def test_each_turn_of_a_conversation_carries_the_answers_before_it() -> None:
    workload = Workload(Shape(parse_lengths("40"), parse_lengths("3"), num_turns=3), Scale(1.0), 1)

    async def course() -> list[Asked]:
        async with serving(lambda asked: tokens(3)) as server:
            await loaded(server, Plan(clients=constant_level(1), num_requests=9), workload=workload, is_chat=True)
            return server.asked

    asked = run_async(course())
    sizes = [len(one.body["messages"]) for one in asked]
    assert sizes[:9] == [1, 3, 5] * 3
    assert asked[1].body["messages"][1] == {"role": "assistant", "content": " t0 t1 t2"}
    assert asked[2].body["messages"][:3] == asked[1].body["messages"]


def test_arrivals_come_when_they_are_due() -> None:
    began_s = time.monotonic()
    tally, _ = run(lambda asked: tokens(2), Plan(num_requests=100), rate=200)
    late_s = allowance_s(began_s)
    assert tally.num_done == 100
    assert 0.3 <= tally.window_s <= 0.7 + late_s
    assert tally.times["queue"].quantile_ms(0.5) < 5 + late_s * 1000
