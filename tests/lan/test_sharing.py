"""A decode worker that joins under load: its share of the requests from then on, by all policies and at all paces."""

import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from meshserve.routing.policies import POLICIES
from tests.harness import Lan, pace
from tests.lan.meshes import READY_S, LanMesh, start_aggregated

OPTIONS = ("--engine-opt", "profile=reference", "--engine-opt", "max_batch=4")
MAX_TOKENS = 8
NUM_SHORT = 12
NUM_CLIENTS = 18
"""Half as many again as three workers have in their batches."""
REQUESTS_PER_S = 15.0
JOINING_S = 5.0
FAIR_SHARE, LEAST_SHARE = 1 / 3, 0.8

Asking = Callable[[LanMesh, str, list[str]], list[str]]
"""Asks these prompts by a policy, and returns which worker answered each."""


def ask_at_once(mesh: LanMesh, policy: str, num_clients: int, prompts: list[str]) -> list[str]:
    chosen = {"receipt": True, "policy": policy}
    answers = mesh.complete_all(prompts, num_clients, MAX_TOKENS, meshserve=chosen)
    return [answer["meshserve"]["peers"]["decode"] for answer in answers]


def ask_one_at_a_time(mesh: LanMesh, policy: str, prompts: list[str]) -> list[str]:
    return ask_at_once(mesh, policy, 1, prompts)


def ask_by_the_clock(mesh: LanMesh, policy: str, prompts: list[str]) -> list[str]:
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        asked = []
        for prompt in prompts:
            asked.append(pool.submit(ask_at_once, mesh, policy, 1, [prompt]))
            pace(1 / REQUESTS_PER_S)
        return [worker for one in asked for worker in one.result()]


def ask_all_the_time(mesh: LanMesh, policy: str, prompts: list[str]) -> list[str]:
    return ask_at_once(mesh, policy, NUM_CLIENTS, prompts)


PACES = {"one_at_a_time": ask_one_at_a_time, "15_a_second": ask_by_the_clock, "saturated": ask_all_the_time}


def most_likely_share(num_chosen: int, num_asked: int) -> float:
    """The upper end of the 95 % interval of a share (Wilson's)."""
    share, z = num_chosen / num_asked, 1.96
    spread = z * math.sqrt(share * (1 - share) / num_asked + (z / (2 * num_asked)) ** 2)
    return (share + z * z / (2 * num_asked) + spread) / (1 + z * z / num_asked)


def share_of_the_third(lan: Lan, ask: Asking, policy: str, count: int) -> float:
    """Of `count` requests that come once the worker has been there for some seconds. All prompts differ from the first token on."""
    mesh = start_aggregated(lan, *OPTIONS)
    # the first ones are short: what the workers measure then is nothing like what they measure later
    lengths = itertools.chain([1] * NUM_SHORT, itertools.repeat(30))
    prompts = (f"{number:05} is what we ask. " * length for number, length in enumerate(lengths))

    def ask_more(num_prompts: int) -> list[str]:
        return ask(mesh, policy, list(itertools.islice(prompts, num_prompts)))

    assert set(ask_more(NUM_SHORT)) == set(mesh.names(mesh.decode))
    ask_more(30)
    third = lan.add_host().run("--role", "decode", *OPTIONS)
    name = third.ready(READY_S)["name"]
    mesh.frontend.wait_for_line("^3 decode", READY_S, third.started_at)
    joined_at = time.monotonic()
    while time.monotonic() < joined_at + JOINING_S:
        ask_more(30)
    asked = ask_more(count)
    share = most_likely_share(asked.count(name), count)
    print(f"{policy}: {asked.count(name)} of {count} requests, at most {share / FAIR_SHARE:.2f} of a fair share")
    return share


@pytest.mark.parametrize("asking", PACES)
def test_a_worker_that_joins_under_load_is_asked_as_often_as_the_others(lan: Lan, asking: str) -> None:
    assert share_of_the_third(lan, PACES[asking], "kv", 60) >= LEAST_SHARE * FAIR_SHARE


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("asking", PACES)
def test_of_600_requests_a_worker_that_joined_has_four_fifths_of_its_fair_share_by_all_policies(
    lan: Lan, asking: str, policy: str
) -> None:
    assert share_of_the_third(lan, PACES[asking], policy, 600) >= LEAST_SHARE * FAIR_SHARE
