"""Workers that end and are started again: at the same address, at another one, and all in turn."""

import time
from typing import Any

import pytest

from tests.harness import Host, Lan, Process, wait_until
from tests.harness.pressure import allowance_s
from tests.lan.load import LONG, Load
from tests.lan.meshes import READY_S, SLOW_PREFILL, LanMesh, long_prompts, text_of

USABLE_S = 2.0
OTHER_ADDRESS = "10.77.200.200"
PATIENT = ("--failure-timeout", "20")
"""No peer is suspected for silence while a test runs: its successor ends the old incarnation."""


def incarnation_of(mesh: LanMesh, name: str) -> str:
    found: str = next(peer["incarnation"] for peer in mesh.peers() if peer["name"] == name)
    return found


def successor(mesh: LanMesh, ended: str) -> dict[str, Any] | None:
    """The worker that has the place and the name of the one that ended.

    None while it cannot be called, or the one that ended is still listed.
    """
    peers = mesh.peers()
    front = next(peer for peer in peers if "frontend" in peer["roles"])
    if (
        len(peers) != 3
        or front["num_reached"] != 2
        or any(peer["incarnation"] == ended for peer in peers)
    ):
        return None
    return next((peer for peer in peers if peer["name"] == "worker"), None)


def start_named(lan: Lan, *options: str) -> LanMesh:
    """Like `start_aggregated`; the decode worker on the second host is called "worker"."""
    front, host = lan.add_host(), lan.add_host()
    mesh = LanMesh(front, front.run("--role", "frontend,processor,router", *options))
    mesh.decode = [
        front.run("--role", "decode", *options),
        host.run("--role", "decode", "--name", "worker", *options),
    ]
    mesh.wait_until_ready()
    mesh.wait_until_all_meet()
    return mesh


@pytest.mark.parametrize("is_silent", [False, True], ids=["killed", "rebooted"])
def test_row_10_a_worker_that_restarts_under_its_name_and_port_is_another_incarnation(
    lan: Lan, is_silent: bool
) -> None:
    mesh = start_named(lan, *PATIENT)
    host, before = lan.hosts[1], mesh.decode[1].ready(READY_S)
    ended, prompts = incarnation_of(mesh, "worker"), long_prompts(8)
    mesh.complete_all(prompts, 4)
    if is_silent:  # nobody is told that the worker ends
        host.link_down()
    mesh.decode[1].kill()
    host.link_up()
    mesh.decode[1] = host.run("--role", "decode", "--name", "worker", *PATIENT)
    assert mesh.decode[1].ready(READY_S)["address"] == before["address"]
    ready_s = time.monotonic()
    worker = wait_until(lambda: successor(mesh, ended), READY_S, "the old incarnation is gone")
    assert time.monotonic() - ready_s < USABLE_S + allowance_s(ready_s)
    receipts = [mesh.complete(prompt)["meshserve"] for prompt in prompts]
    check_forgotten(receipts, worker["name"])


def check_forgotten(receipts: list[dict[str, Any]], name: str) -> None:
    """No request met the worker that ended, and none counted on a block of it.

    The prompts differ from the first token on.
    """
    assert name in {receipt["peers"]["decode"] for receipt in receipts}
    for receipt in receipts:
        assert not receipt["attempts"] and not receipt["migrations"], receipt
        assert [
            found["overlap_blocks"] for found in receipt["candidates"] if found["peer"] == name
        ] == [0], receipt
        assert receipt["peers"]["decode"] != name or receipt["tokens"]["cached"] == 0, receipt


@pytest.mark.parametrize(
    "is_silent", [False, pytest.param(True, marks=pytest.mark.full)], ids=["killed", "unplugged"]
)
def test_row_11_a_worker_that_comes_back_at_another_address_is_usable_within_two_seconds(
    lan: Lan, is_silent: bool
) -> None:
    mesh = start_named(lan)
    host, ended = lan.hosts[1], incarnation_of(mesh, "worker")
    if is_silent:
        host.link_down()
    mesh.decode[1].kill()
    if not is_silent:
        wait_until(lambda: len(mesh.peers()) == 2, READY_S, "the worker is known to be dead")
    host.remove_address(f"{host.address}/16")
    host.remove_address(f"{host.address6}/64")
    host.add_address(f"{OTHER_ADDRESS}/16")
    host.link_up()
    mesh.decode[1] = host.run("--role", "decode", "--name", "worker")
    assert OTHER_ADDRESS in mesh.decode[1].ready(READY_S)["address"]
    ready_s = time.monotonic()
    numbers = iter(range(1000))
    wait_until(lambda: serves(mesh, next(numbers)), READY_S, "the worker serves")
    assert time.monotonic() - ready_s < USABLE_S + allowance_s(ready_s)
    worker = wait_until(lambda: successor(mesh, ended), READY_S, "the old endpoint is dropped")
    assert worker["address"] == f"tcp://{OTHER_ADDRESS}:7800"


def serves(mesh: LanMesh, number: int) -> bool:
    """Whether the worker answers a question.

    Its name has a suffix while the old incarnation may live.
    """
    answer = mesh.complete(f"{number} is a question")
    assert text_of(answer)
    return bool(answer["meshserve"]["peers"]["decode"].startswith("worker"))


class Workers:
    """The workers of a mesh, each on a host of its own, and how to start them again."""

    def __init__(self, lan: Lan, num_decode: int, num_prefill: int) -> None:
        front = lan.add_host()
        self.mesh = LanMesh(front, front.run("--role", "frontend,processor,router"))
        self._hosts: dict[int, tuple[Host, tuple[str, ...]]] = {}
        for role, count, running in (
            ("decode", num_decode, self.mesh.decode),
            ("prefill", num_prefill, self.mesh.prefill),
        ):
            for _ in range(count):
                running.append(
                    self._run(
                        lan.add_host(), ("--role", role, *SLOW_PREFILL[: 2 * (role == "decode")])
                    )
                )
        self.mesh.wait_until_ready()
        self.mesh.wait_until_all_meet()

    def _run(self, host: Host, options: tuple[str, ...]) -> Process:
        process = host.run(*options)
        self._hosts[process.pid] = host, options
        return process

    def restart(self, running: list[Process]) -> None:
        """Drain the oldest of these, and start another one on its host.

        Returns once that one is used.
        """
        began_s, ending = time.monotonic(), running.pop(0)
        ending.terminate()
        assert ending.wait(30.0) == 0
        running.append(self._run(*self._hosts.pop(ending.pid)))
        self.mesh.frontend.wait_for_line(
            rf"^{len(self.mesh.decode)} decode, {len(self.mesh.prefill)} prefill ready",
            READY_S,
            began_s,
        )


@pytest.mark.parametrize(
    ("num_decode", "num_prefill", "num_rounds"),
    [(2, 1, 1), pytest.param(3, 2, 5, marks=pytest.mark.full)],
    ids=["once", "five_times"],
)
def test_row_18_a_rolling_restart_of_every_worker_under_load_costs_no_request(
    lan: Lan, num_decode: int, num_prefill: int, num_rounds: int
) -> None:
    workers = Workers(lan, num_decode, num_prefill)
    mesh = workers.mesh
    with Load(mesh, 6, 0.1, LONG) as load:
        for _ in range(num_rounds):
            for running in (mesh.decode, mesh.prefill):
                for _ in range(len(running)):
                    workers.restart(running)
    assert any(receipt["peers"]["prefill"] for receipt in load.receipts)
    load.check(lan)
