"""The handoff under real faults: workers killed and stopped, engines that hang or kill, clients that leave."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import Lan, Process, wait_until
from tests.harness.engines import HANG_MARK, KILL_MARK
from tests.harness.pressure import allowance_s
from tests.harness.records import Event, Record
from tests.lan.meshes import HTTP, READY_S, LanMesh, long_prompts, start_recorded, text_of, undisturbed

FAILURE_TIMEOUT_S = 1.5
TICK_S = 0.15
"""How much later than its deadline a failure may be noticed: the tick of membership, and a busy machine."""
NOTICED_S = 0.2
HEDGE_S = 0.02


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where all peers write their record."""
    return tmp_path / "record.jsonl"


def incarnation_of(mesh: LanMesh, process: Process) -> str:
    name = process.ready(READY_S)["name"]
    return next(str(peer["incarnation"]) for peer in mesh.peers() if peer["name"] == name)


def wait_for_event(path: Path, is_wanted: Callable[[Event], bool], what: str) -> Event:
    """The first such event, as soon as it is in the record."""

    def find() -> Event | None:
        return next(filter(is_wanted, Record(path).events), None)

    return wait_until(find, READY_S, what)


def disturb(mesh: LanMesh, prompts: list[str], num_begun: int, path: Path, fault: Callable[[], None]) -> tuple[float, list[str]]:
    """All prompts at once, and the fault when so many are being prefilled; returns when it came, and the texts."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(mesh.complete_all, prompts, len(prompts))
        wait_until(lambda: path.exists() and len(Record(path).of("prefill_begun")) >= num_begun, READY_S, "prompts are being prefilled")
        faulted_at = time.monotonic()
        fault()
        return faulted_at, [text_of(answer) for answer in running.result()]


def test_row_1_a_killed_prefill_worker_loses_none_of_fifty_tasks(lan: Lan, path: Path) -> None:
    mesh = start_recorded(lan, path, 2, 3, "--engine-opt", "prefill_tokens_per_s=20000")
    victim, prompts = incarnation_of(mesh, mesh.prefill[0]), long_prompts(50)
    workers = [incarnation_of(mesh, process) for process in mesh.prefill[1:]]
    killed_at, texts = disturb(mesh, prompts, 6, path, mesh.prefill[0].kill)
    record = Record(path)
    record.check()
    failed = [event for event in record.of("attempt_failed") if event.details["peer_failing"] == victim]
    assert failed and all(event.at_s - killed_at <= NOTICED_S + allowance_s(killed_at, event.at_s) for event in failed)
    for event in failed:
        again = next(claim for claim in record.of("claim") if claim.request == event.request and claim.at_s > event.at_s)
        waited = (killed_at, again.at_s)
        idle_s = min(idle_within(record.busy_s(worker), *waited) for worker in workers)
        assert idle_s <= NOTICED_S + HEDGE_S + allowance_s(*waited), f"a worker was idle for {idle_s:.3f} s while {event.request} waited"
    assert texts == undisturbed(lan, prompts)


def idle_within(busy: list[tuple[float, float]], start: float, end: float) -> float:
    """Seconds of a span in which nothing was busy."""
    idle_s, at = 0.0, start
    for began, ended in sorted(busy):
        if began > at:
            idle_s += max(0.0, min(began, end) - at)
        at = max(at, min(ended, end))
    return idle_s + max(0.0, end - at)


def test_row_2_a_stopped_prefill_worker_is_replaced_and_its_late_blocks_change_nothing(lan: Lan, path: Path) -> None:
    mesh = start_recorded(lan, path, 2, 2, "--engine-opt", "prefill_tokens_per_s=4000")
    victim, prompts = incarnation_of(mesh, mesh.prefill[0]), long_prompts(12)
    stopped_at, texts = disturb(mesh, prompts, 2, path, mesh.prefill[0].stop)
    mesh.prefill[0].resume()
    later = [text_of(answer) for answer in mesh.complete_all(prompts[:4], 4)]
    record = Record(path)
    record.check()
    failed = [event for event in record.of("attempt_failed") if event.details["peer_failing"] == victim]
    assert failed and all(event.at_s - stopped_at <= FAILURE_TIMEOUT_S + TICK_S + allowance_s(stopped_at, event.at_s) for event in failed)
    assert texts == undisturbed(lan, prompts) and later == texts[:4]


@pytest.mark.parametrize("repeats", [20, 2], ids=["long", "short"])
def test_row_3_what_a_hung_engine_has_goes_elsewhere_though_its_process_lives(lan: Lan, path: Path, repeats: int) -> None:
    hanging_engine = ("--engine", "tests.harness.engines:HangingEngine")
    mesh = start_recorded(lan, path, 1, 1, "--max-local-prefill-tokens", "0", prefill=hanging_engine)
    hanging = incarnation_of(mesh, mesh.prefill[0])
    prompt = f"{HANG_MARK} " + long_prompts(1, repeats)[0]
    alone = mesh.complete(prompt)
    mesh.prefill.append(lan.add_host().run("--role", "prefill", "--record", str(path)))
    mesh.wait_until_all_meet()
    prompts = [prompt, *(f"{number} {HANG_MARK} {text}" for number, text in enumerate(long_prompts(4, repeats)))]
    texts = [text_of(answer) for answer in mesh.complete_all(prompts[1:], 4)]
    record = Record(path)
    record.check()
    failed = [event for event in record.of("attempt_failed") if event.details["peer_failing"] == hanging]
    assert failed and all(event.details["outcome"] == "no longer named" for event in failed)
    for event in failed:
        begun = next(found for found in record.of("prefill_begun") if found.request == event.request and found.peer == hanging)
        assert event.at_s - begun.at_s <= FAILURE_TIMEOUT_S + TICK_S + allowance_s(begun.at_s, event.at_s)
    ends = {event.details["state"] for event in record.of("handoff_ended")}
    assert ends == {"local", "done"}, "locally when there was nobody else, elsewhere when there was"
    assert [text_of(alone), *texts] == undisturbed(lan, prompts)


def test_row_4_when_all_prefill_workers_die_decode_workers_prefill_themselves(lan: Lan, path: Path) -> None:
    mesh = start_recorded(lan, path, 2, 2, "--engine-opt", "prefill_tokens_per_s=20000")
    prompts = long_prompts(20)

    def kill_all() -> None:
        for process in mesh.prefill:
            process.kill()

    killed_at, texts = disturb(mesh, prompts, 2, path, kill_all)
    record = Record(path)
    record.check()
    local = [event for event in record.of("handoff_ended") if event.at_s > killed_at + NOTICED_S or event.details["state"] == "local"]
    assert local and all(event.at_s - killed_at <= NOTICED_S + allowance_s(killed_at, event.at_s) for event in local)
    assert texts == undisturbed(lan, prompts)


def test_row_5_a_decode_worker_killed_mid_transfer_is_routed_around(lan: Lan, path: Path) -> None:
    mesh = start_recorded(lan, path, 2, 1, "--bulk-limit", "0.5")
    names = {incarnation_of(mesh, process): process for process in mesh.decode}
    (prompt,) = long_prompts(1, repeats=150)  # several messages of KV, which the limit sets seconds apart
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(mesh.complete, prompt)
        block = wait_for_event(path, lambda event: event.event == "block", "a block came")
        killed_at = time.monotonic()
        names[block.peer].kill()
        answer = running.result()
    record = Record(path)
    record.check()
    freed = next(event for event in record.of("prefill_ended") if event.details["decode"] == block.peer)
    assert freed.at_s - killed_at <= FAILURE_TIMEOUT_S + allowance_s(killed_at, freed.at_s) and freed.details["outcome"] != "delivered"
    assert {attempt["role"] for attempt in answer["meshserve"]["attempts"] if "role" in attempt} == {"decode"}
    assert [text_of(answer)] == undisturbed(lan, [prompt])
    wait_until(lambda: all_free(mesh), READY_S, "all blocks are free")


def all_free(mesh: LanMesh) -> bool:
    """No worker holds or computes anything."""
    loads = [peer["load"] for peer in mesh.peers() if peer["load"]]
    return all(not any(load[name] for name in ("num_running", "num_waiting", "used_blocks", "num_tickets")) for load in loads)


def leave_after(mesh: LanMesh, prompt: str, max_tokens: int, is_streamed: bool, path: Path, kind: str, seen: int) -> float:
    """A client that asks, and closes its connection at the next event of this kind; returns when it closed."""
    body = {"model": "dummy", "prompt": prompt, "max_tokens": max_tokens, "stream": is_streamed, "ignore_eos": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    with mesh.front.connect("127.0.0.1", 8000) as connection:
        connection.sendall(head.encode() + data)
        wait_until(lambda: len(Record(path).of(kind)) > seen, READY_S, f"an event {kind}")
        return time.monotonic()


def num_events(path: Path, kind: str) -> int:
    """Of this kind, in the record so far."""
    return len(Record(path).of(kind)) if path.exists() else 0


def test_row_12_a_client_that_leaves_while_its_prefill_is_queued_has_it_struck_out(lan: Lan, path: Path) -> None:
    mesh = start_recorded(lan, path, 1, 1, "--engine-opt", "prefill_tokens_per_s=2000")
    prompts = long_prompts(4, repeats=30)
    for count, is_streamed in enumerate((False, True), 1):
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(mesh.complete, prompts.pop())
            wait_until(lambda count=count: num_events(path, "prefill_begun") == count, READY_S, "the first is being prefilled")  # type: ignore[misc]
            closed_at = leave_after(mesh, prompts.pop(), 8, is_streamed, path, "ticket", num_events(path, "ticket"))
            wait_until(lambda count=count: num_events(path, "struck") == count, READY_S, "its ticket was struck out")  # type: ignore[misc]
            struck_at = Record(path).of("struck")[-1].at_s
            assert struck_at - closed_at <= 0.1 + allowance_s(closed_at, struck_at)
            running.result()
    record = Record(path)
    record.check()
    assert not {event.request for event in record.of("struck")} & {event.request for event in record.of("prefill_begun")}


def test_row_13_a_client_that_leaves_midway_leaves_no_block_behind(lan: Lan, path: Path) -> None:
    pace = ("--engine-opt", "prefill_tokens_per_s=1500", "--engine-opt", "step_ms=20")
    mesh = start_recorded(lan, path, 1, 1, *pace)
    cases = [(kind, is_streamed) for kind in ("prefill_begun", "block", "tokens") for is_streamed in (False, True)]
    for prompt, (kind, is_streamed) in zip(long_prompts(len(cases), repeats=30), cases, strict=True):
        closed_at = leave_after(mesh, prompt, 500, is_streamed, path, kind, num_events(path, kind))
        wait_until(lambda: all_free(mesh), READY_S, "all blocks are free")
        assert time.monotonic() - closed_at <= 1.0 + allowance_s(closed_at), (kind, is_streamed)
    record = Record(path)
    record.check()
    assert [result.details["outcome"] for result in record.of("result")] == ["cancelled"] * len(cases)


def num_alive(processes: list[Process]) -> int:
    return sum(process.exit_code is None for process in processes)


@pytest.mark.parametrize("repeats", [20, 2], ids=["long", "short"])
def test_row_20_a_request_that_kills_its_worker_each_time_is_given_up_after_two(lan: Lan, path: Path, repeats: int) -> None:
    """A short prompt goes with its ticket, and kills before there is a claim."""
    mesh = start_recorded(lan, path, 2, 3, "--engine", "tests.harness.engines:KillingEngine", "--max-local-prefill-tokens", "0")
    body = {"model": "dummy", "prompt": f"{KILL_MARK} " + long_prompts(1, repeats)[0], "max_tokens": 4}
    response = mesh.front.post_json(f"{HTTP}/v1/completions", body, timeout_s=60.0)
    assert response.status == 502
    error = response.json()["error"]
    assert error["code"] == "gave_up" and "took down" in error["message"]
    wait_until(lambda: num_alive(mesh.prefill) == 1, READY_S, "two prefill workers are dead")  # what closes its sockets is not yet reaped
    assert num_alive(mesh.decode) == 2
    assert mesh.complete("And the others are served on.")["choices"]


def test_row_20_also_where_the_first_to_die_is_the_prefill_worker_and_then_a_decode_worker(lan: Lan, path: Path) -> None:
    mesh = start_recorded(lan, path, 3, 1, "--engine", "tests.harness.engines:KillingEngine")
    body = {"model": "dummy", "prompt": f"{KILL_MARK} " + long_prompts(1)[0], "max_tokens": 4}
    response = mesh.front.post_json(f"{HTTP}/v1/completions", body, timeout_s=60.0)
    assert response.status == 502 and response.json()["error"]["code"] == "gave_up"
    wait_until(lambda: (num_alive(mesh.prefill), num_alive(mesh.decode)) == (0, 2), READY_S, "one of each kind is dead")
    Record(path).check()
