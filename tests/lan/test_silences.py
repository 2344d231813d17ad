"""Hosts that nothing is heard of for a while: links that are down, laptops asleep, packets lost."""

import random
import time

import pytest

from tests.harness import Lan, wait_until
from tests.harness.pressure import allowance_s
from tests.harness.waiting import pace
from tests.lan.load import LONG, Load
from tests.lan.meshes import READY_S, LanMesh, start_aggregated, start_disaggregated

FAILURE_TIMEOUT_S = 1.5
TICKS_S = 0.3
"""The router looks at intervals who is silent, and a last sign of life may have been under way."""
BACK_S = 5.0


def assert_suspected_since(mesh: LanMesh, began_s: float) -> None:
    """The router knows within the failure timeout that one decode worker of two is silent."""
    mesh.frontend.wait_for_line("^1 decode", READY_S, began_s)
    noticed_s = next(
        line.at
        for line in mesh.frontend.stdout
        if line.at >= began_s and line.text.startswith("1 decode")
    )
    assert noticed_s - began_s <= FAILURE_TIMEOUT_S + TICKS_S + allowance_s(began_s, noticed_s)


def assert_back_since(mesh: LanMesh, began_s: float, before: dict[str, str]) -> None:
    """The worker is used again, and all call each other, each under the incarnation that it had."""
    mesh.frontend.wait_for_line("^2 decode", READY_S, began_s)
    mesh.wait_until_all_meet()
    took_s = time.monotonic() - began_s
    print(f"back within {took_s:.2f} s")
    assert took_s <= BACK_S + allowance_s(began_s)
    assert incarnations(mesh) == before


def incarnations(mesh: LanMesh) -> dict[str, str]:
    return {peer["name"]: peer["incarnation"] for peer in mesh.peers()}


def assert_used(mesh: LanMesh, name: str) -> None:
    """Requests are routed to this worker."""
    answers = [mesh.complete(f"{number} is asked afterwards") for number in range(8)]
    assert name in {answer["meshserve"]["peers"]["decode"] for answer in answers}


@pytest.mark.parametrize("down_s", [3.0, pytest.param(30.0, marks=pytest.mark.full)])
def test_row_16_a_link_that_was_down_is_routed_around_and_used_again_once_it_is_up(
    lan: Lan, down_s: float
) -> None:
    mesh = start_aggregated(lan)
    mesh.wait_until_all_meet()
    before, host = incarnations(mesh), lan.hosts[1]
    with Load(mesh) as load:
        began_s = time.monotonic()
        host.link_down()
        assert_suspected_since(mesh, began_s)
        pace(max(0.0, down_s - (time.monotonic() - began_s)))
        up_s = time.monotonic()
        host.link_up()
        assert_back_since(mesh, up_s, before)
    assert_used(mesh, mesh.names(mesh.decode)[1])
    assert load.longest_s <= FAILURE_TIMEOUT_S + 1.0 + allowance_s(began_s)
    load.check(lan)


@pytest.mark.full
@pytest.mark.parametrize(
    "is_deaf", [False, True], ids=["processes_stopped", "and_no_packet_answered"]
)
def test_row_31_a_host_that_slept_for_a_minute_rejoins_by_itself(lan: Lan, is_deaf: bool) -> None:
    mesh = start_aggregated(lan)
    mesh.wait_until_all_meet()
    before, host = incarnations(mesh), lan.hosts[1]
    with Load(mesh) as load:
        began_s = time.monotonic()
        if is_deaf:
            host.drop_packets(100)
        mesh.decode[1].stop()
        assert_suspected_since(mesh, began_s)
        wait_until(lambda: len(mesh.peers()) == 2, READY_S, "the sleeping worker is dead")
        pace(max(0.0, 60.0 - (time.monotonic() - began_s)))
        host.unblock()
        woken_s = time.monotonic()
        mesh.decode[1].resume()
        assert_back_since(mesh, woken_s, before)
    assert_used(mesh, mesh.names(mesh.decode)[1])
    load.check(lan)


LOSS_PERCENT, BURST_S, BETWEEN_BURSTS_S = 2.0, 1.0, 4.0


WATCHED_S = 600.0


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_row_32_lost_packets_and_bursts_of_silence_kill_nobody(lan: Lan) -> None:
    mesh = start_disaggregated(lan, "--log-level", "info")
    before, rng = incarnations(mesh), random.Random(32)
    for host in lan.hosts:
        host.drop_packets(LOSS_PERCENT)
    num_bursts, began_s = 0, time.monotonic()
    with Load(mesh, 3, 0.3, LONG) as load:
        while time.monotonic() - began_s < WATCHED_S:
            pace(BETWEEN_BURSTS_S * rng.uniform(0.5, 1.5))
            host = rng.choice(lan.hosts)
            host.drop_packets(100)
            pace(BURST_S)
            host.unblock()
            host.drop_packets(LOSS_PERCENT)
            num_bursts += 1
        for host in lan.hosts:
            host.unblock()
    processes = (mesh.frontend, *mesh.decode, *mesh.prefill)
    silent = sum(process.stderr_text.count("silent") for process in processes)
    print(f"\n{num_bursts} bursts; suspected {silent} times")
    assert not [
        line.text for process in processes for line in process.stderr if "died" in line.text
    ]
    wait_until(lambda: incarnations(mesh) == before, READY_S, "all are there as before")
    assert any(receipt["peers"]["prefill"] for receipt in load.receipts)
    load.check(lan)
