"""The router on real hosts: what it knows of caches, several routers, none at all, and sessions."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.harness import Lan, Process, wait_until
from tests.harness.waiting import pace
from tests.lan.meshes import HTTP, READY_S, LanMesh, long_prompts, start_aggregated, start_disaggregated, text_of

BLOCK_SIZE = 16


def share_cached(answers: list[dict[str, Any]]) -> float:
    """Of the full blocks of all prompts, those that were reported as cached."""
    tokens: list[dict[str, int]] = [answer["meshserve"]["tokens"] for answer in answers]
    num_full = sum((found["prompt"] - 1) // BLOCK_SIZE for found in tokens)
    return sum(found["cached"] for found in tokens) / BLOCK_SIZE / num_full


def test_the_same_prompts_again_are_cached_and_receipts_say_why_each_worker_was_chosen(lan: Lan) -> None:
    mesh = start_disaggregated(lan)
    mesh.wait_until_all_meet()
    prompts = long_prompts(12)
    first = mesh.complete_all(prompts, 4)
    second = []
    for prompt in prompts:
        pace(0.1)  # as people ask: right after an answer its worker still counts as busy, and a copy elsewhere may be the cheaper way
        second.append(mesh.complete(prompt))
    assert [text_of(answer) for answer in first] == [text_of(answer) for answer in second]
    assert share_cached(first) <= 0.1 and share_cached(second) >= 0.9
    for before, after in zip(first, second, strict=True):
        receipt = after["meshserve"]
        assert receipt["candidates"][0]["peer"] == receipt["peers"]["decode"]
        assert len(receipt["candidates"]) == 2 and all(found["reason"] for found in receipt["candidates"])
        assert before["meshserve"]["prefill_candidates"][0]["peer"] == before["meshserve"]["peers"]["prefill"]
    reasons = [answer["meshserve"]["candidates"][0]["reason"] for answer in second]
    assert sum("holds" in reason for reason in reasons) >= 10, reasons


def start_routed(lan: Lan) -> tuple[LanMesh, list[Process]]:
    """Frontend and processor on one host, a router on each of two others beside a decode worker."""
    front, *hosts = (lan.add_host() for _ in range(3))
    mesh = LanMesh(front, front.run("--role", "frontend,processor"))
    routers = [host.run("--role", "router") for host in hosts]
    mesh.decode = [host.run("--role", "decode") for host in hosts]
    for process in [mesh.frontend, *routers, *mesh.decode]:
        process.ready(READY_S)
    for router in routers:
        router.wait_for_line("^2 decode", READY_S)
    mesh.wait_for_peers(5)
    mesh.wait_until_all_meet(5)
    return mesh, routers


def routers_of(answers: list[dict[str, Any]]) -> set[str | None]:
    return {answer["meshserve"]["peers"]["router"] for answer in answers}


def test_row_15_the_router_dies_the_other_is_used_and_without_any_the_workers_take_turns_until_one_returns(lan: Lan) -> None:
    mesh, routers = start_routed(lan)
    names = set(mesh.names(routers))
    assert routers_of(mesh.complete_all(long_prompts(8), 4)) == names
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(mesh.complete_all, long_prompts(60, 5), 8)
        pace(0.05)
        routers[0].kill()
        assert len(under_way.result()) == 60  # each of them was asserted to be answered
    (survivor,) = mesh.names(routers[1:])
    assert routers_of(mesh.complete_all(long_prompts(8), 4)) == {survivor}
    routers[1].kill()
    answers = mesh.complete_all(long_prompts(8), 4)
    assert routers_of(answers) == {None}
    assert {answer["meshserve"]["policy"] for answer in answers} == {"round-robin (no router)"}
    assert {answer["meshserve"]["peers"]["decode"] for answer in answers} == set(mesh.names(mesh.decode))
    assert "there is no router" in answers[0]["meshserve"]["candidates"][0]["reason"]
    returned = lan.hosts[1].run("--role", "router")
    name = returned.ready(READY_S)["name"]
    wait_until(lambda: routers_of([mesh.complete("anything")]) == {name}, READY_S, "the router that returned is used")


def test_a_router_that_is_stopped_costs_no_request(lan: Lan) -> None:
    mesh, routers = start_routed(lan)
    routers[0].stop()
    answers = mesh.complete_all(long_prompts(12, 5), 4)
    assert len(answers) == 12
    assert routers_of(answers) == set(mesh.names(routers[1:]))
    routers[0].resume()


def test_two_routers_know_of_each_others_choices(lan: Lan) -> None:
    """Sixteen prompts at once, asked of two routers in turn: without word of each other's reservations both would begin with one worker."""
    mesh, _ = start_routed(lan)
    answers = mesh.complete_all(long_prompts(16), 16)
    shares = Counter(answer["meshserve"]["peers"]["decode"] for answer in answers)
    assert max(shares.values()) <= 10, shares


def test_a_session_stays_with_its_worker_where_that_costs_nothing(lan: Lan) -> None:
    mesh = start_aggregated(lan)
    for headers, fields in (({"x-session-id": "s1"}, {}), ({}, {"user": "alice"})):
        body = {"model": "dummy", "max_tokens": 2, "meshserve": {"receipt": True}, **fields}
        receipts = []
        for turn in range(6):
            answer = mesh.front.http("POST", f"{HTTP}/v1/completions", {**body, "prompt": f"turn {turn}"}, headers)
            receipts.append(answer.json()["meshserve"])
            pace(0.1)  # as somebody who reads the answer; before, its worker still counts as busy
        assert len({receipt["peers"]["decode"] for receipt in receipts}) == 1
        assert "session" in receipts[-1]["candidates"][0]["reason"]
