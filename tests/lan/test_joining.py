"""How peers find each other, how fast, and whom they leave alone."""

import statistics
import time

import pytest

from tests.harness import Host, Lan, Process, wait_until
from tests.harness.pressure import allowance_s
from tests.lan.meshes import HTTP, READY_S, start_aggregated

JOIN_S = 1.0


def routed_after_s(frontend: Process, started_at: float, count: int) -> float:
    """Seconds from a worker's process start until the router can choose it."""
    frontend.wait_for_line(f"^{count} decode", READY_S, started_at)
    return next(line.at for line in frontend.stdout if line.at >= started_at and line.text.startswith(f"{count} decode")) - started_at


@pytest.mark.parametrize("count", [4, pytest.param(10, marks=pytest.mark.full)])
def test_a_decode_worker_can_be_routed_to_within_a_second_of_its_start(lan: Lan, count: int) -> None:
    front, host = lan.add_host(), lan.add_host()
    frontend = front.run("--role", "frontend,processor,router")
    for role in ("decode", "prefill", "prefill"):
        host.run("--role", role).ready(READY_S)
    frontend.wait_for_line("^1 decode, 2 prefill", READY_S)
    times_s: list[float] = []
    allowances_s: list[float] = []
    for _ in range(count):
        worker = host.run("--role", "decode")
        times_s.append(routed_after_s(frontend, worker.started_at, 2))
        allowances_s.append(allowance_s(worker.started_at))
        ended_at = time.monotonic()
        worker.terminate()
        assert worker.wait() == 0
        frontend.wait_for_line("^1 decode", READY_S, ended_at)
    print(f"routed to after {statistics.median(times_s):.3f} s (median of {count}, longest {max(times_s):.3f} s)")
    assert statistics.median(took_s - more_s for took_s, more_s in zip(times_s, allowances_s, strict=True)) <= JOIN_S


def knows(host: Host, count: int) -> bool:
    return len(host.get(f"{HTTP}/mesh/peers").json()) == count


def test_row_28_with_multicast_blocked_one_peer_option_joins_the_whole_mesh(lan: Lan) -> None:
    mesh = start_aggregated(lan)
    newcomer = lan.add_host()
    newcomer.block_multicast()
    worker = newcomer.run("--role", "decode", "--peer", lan.hosts[1].address)
    worker.ready(READY_S)
    ready_at = time.monotonic()
    wait_until(lambda: len(mesh.peers()) == 4, 2.0, "the whole mesh knows the newcomer")
    assert routed_after_s(mesh.frontend, worker.started_at, 3) < ready_at - worker.started_at + 2.0 + allowance_s(ready_at)


def test_two_meshes_on_one_lan_never_mix(lan: Lan) -> None:
    one, other = lan.add_host(), lan.add_host()
    frontends = [host.run("--role", "frontend,processor,router", "--mesh", name) for host, name in ((one, "one"), (other, "other"))]
    for host, name in ((other, "one"), (one, "other")):
        host.run("--role", "decode", "--mesh", name)
    for frontend in frontends:
        frontend.wait_for_line("^1 decode, 0 prefill", READY_S)
    for host, name in ((one, "one"), (other, "other")):
        assert {peer["mesh"] for peer in host.get(f"{HTTP}/mesh/peers").json()} == {name}
        assert knows(host, 2)


def test_peers_find_each_other_over_ipv6_alone(lan: Lan) -> None:
    front, host = lan.add_host(), lan.add_host()
    frontend = front.run("--role", "frontend,processor,router", "--interface", front.address6)
    worker = host.run("--role", "decode", "--interface", host.address6)
    assert worker.ready(READY_S)["address"] == f"tcp://[{host.address6}]:7800"
    frontend.wait_for_line("^1 decode", READY_S)
    assert front.post_json(f"{HTTP}/v1/completions", {"model": "dummy", "prompt": "hi"}).status == 200


def test_peers_of_one_name_are_told_apart(lan: Lan) -> None:
    front, host = lan.add_host(), lan.add_host()
    frontend = front.run("--role", "frontend,processor,router")
    for _ in range(2):
        host.run("--role", "decode", "--name", "twin").ready(READY_S)
    frontend.wait_for_line("^2 decode", READY_S)
    names = [peer["name"] for peer in front.get(f"{HTTP}/mesh/peers").json() if peer["roles"] == ["decode"]]
    assert sorted(name.partition("~")[0] for name in names) == ["twin", "twin"] and len(set(names)) == 2
