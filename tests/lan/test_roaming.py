"""Hosts whose addresses come late, change, or are many: rows 34 to 37."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.harness import Host, Lan, Process, wait_until
from tests.harness.pressure import allowance_s
from tests.harness.tunnel import Tunnel
from tests.harness.waiting import pace
from tests.lan.load import Load
from tests.lan.meshes import HTTP, LONG_PROMPT, READY_S, SLOW_PREFILL, LanMesh, start_aggregated, text_of

OTHER_ADDRESS = "10.77.200.200"


@contextmanager
def within(most_s: float) -> Iterator[None]:
    """The block takes less than so much time, apart from what the machine stalls."""
    began_at = time.monotonic()
    yield
    took_s = time.monotonic() - began_at
    assert took_s < most_s + allowance_s(began_at), f"{took_s:.2f} s"


def without_addresses(lan: Lan, *, with_link_local: bool = False) -> Host:
    """A host whose cable is in and that has no address yet, but for its fe80 one if that is asked for."""
    host = lan.add_host()
    host.remove_address(f"{host.address}/16")
    host.remove_address(f"{host.address6}/64")
    if not with_link_local:
        host.remove_address(f"{host.link_local6}/64")
    return host


def entry(mesh: LanMesh, process: Process) -> dict[str, str]:
    """What `/mesh/peers` says of one peer; empty if it is not listed."""
    name = process.ready(READY_S)["name"]
    return next((peer for peer in mesh.peers() if peer["name"] == name), {})


def test_row_34_a_peer_that_starts_before_its_network_joins_when_the_address_comes(lan: Lan) -> None:
    front, late = lan.add_host(), without_addresses(lan)
    frontend = front.run("--role", "frontend,processor,router")
    worker = late.run("--role", "decode")
    for process in (frontend, worker):
        process.ready(READY_S)
    late.add_address(f"{late.address}/16")
    with within(3.0):
        frontend.wait_for_line("^1 decode", READY_S)
    assert f"this host's addresses changed: now {late.address}" in worker.stderr_text


@pytest.mark.parametrize("is_make_first", [False, True], ids=["break_before_make", "make_before_break"])
@pytest.mark.parametrize("moving", ["worker", "frontend"])
def test_row_35_a_host_that_changes_its_address_is_back_under_the_same_incarnation(lan: Lan, moving: str, is_make_first: bool) -> None:
    mesh = start_aggregated(lan)
    mesh.wait_until_all_meet()
    host, process = (lan.hosts[1], mesh.decode[1]) if moving == "worker" else (lan.hosts[0], mesh.frontend)
    before = {peer["name"]: peer["incarnation"] for peer in mesh.peers()}
    steps: list[Callable[[], object]] = [lambda: host.remove_address(f"{host.address}/16"), lambda: host.add_address(f"{OTHER_ADDRESS}/16")]
    with Load(mesh) as load:
        wait_until(lambda: len(load.answers) > 10, READY_S, "requests are answered")
        for step in reversed(steps) if is_make_first else steps:
            step()
        with within(5.0):
            wait_until(lambda: OTHER_ADDRESS in process.stderr_text, READY_S, "the peer says so")
            wait_until(lambda: moved_to(mesh, process), READY_S, "the mesh reaches the new address")
            mesh.wait_until_all_meet()
    assert {peer["name"]: peer["incarnation"] for peer in mesh.peers()} == before
    assert all(text_of(mesh.complete(f"question {number}")) for number in range(8))
    load.check(lan)


def moved_to(mesh: LanMesh, process: Process) -> bool:
    peer = entry(mesh, process)
    return OTHER_ADDRESS in peer.get("addresses", ()) and peer["state"] == "alive"


@pytest.mark.parametrize("lost_s", [0.0, pytest.param(20.0, marks=pytest.mark.full)])
def test_row_36_a_peer_that_is_alone_asks_until_multicast_works(lan: Lan, lost_s: float) -> None:
    mesh = start_aggregated(lan)
    newcomer = lan.add_host()
    newcomer.block_multicast()
    worker = newcomer.run("--role", "decode")
    worker.wait_for_line("no other peer", READY_S)
    pace(max(0.0, worker.started_at + lost_s - time.monotonic()))
    newcomer.unblock()
    with within(12.0):
        mesh.frontend.wait_for_line("^3 decode", 15.0)


def test_an_fe80_only_link_is_enough(lan: Lan) -> None:
    front, host = without_addresses(lan, with_link_local=True), without_addresses(lan, with_link_local=True)
    frontend = front.run("--role", "frontend,processor,router")
    host.run("--role", "decode").ready(READY_S)
    frontend.wait_for_line("^1 decode", READY_S)
    assert front.post_json(f"{HTTP}/v1/completions", {"model": "dummy", "prompt": "hi"}).status == 200


def test_row_36_mdns_whose_port_is_taken_at_the_start_is_tried_again(lan: Lan) -> None:
    front, host = lan.add_host(), lan.add_host()
    frontend = front.run("--role", "frontend,processor,router")

    def take() -> socket.socket:
        taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        taken.bind(("", 5353))
        return taken

    with host.inside(take):
        worker = host.run("--role", "decode")
        worker.wait_for_line("mDNS does not work here", READY_S)
    with within(12.0):
        frontend.wait_for_line("^1 decode", 15.0)
    worker.wait_for_line("mDNS works now", READY_S)


def test_row_37_forty_addresses_before_the_right_one_do_not_matter(lan: Lan) -> None:
    front, host = lan.add_host(), lan.add_host()
    for crowded in (front, host):
        crowded.remove_address(f"{crowded.address}/16")
        for number in range(40):
            crowded.add_interface(f"a{number}", f"10.{100 + number}.{crowded.number}.1/24")
        crowded.add_address(f"{crowded.address}/16")
    frontend = front.run("--role", "frontend,processor,router")
    frontend.ready(READY_S)
    with within(5.0):
        host.run("--role", "decode").ready(READY_S)
        frontend.wait_for_line("^1 decode", READY_S)


@pytest.mark.parametrize("num_starts", [3, pytest.param(20, marks=pytest.mark.full)])
def test_row_37_kv_takes_the_lan_and_not_the_vpn_beside_it(lan: Lan, num_starts: int) -> None:
    front, decode, prefill = lan.add_host(), lan.add_host(), lan.add_host()
    # by its name it could be a second Ethernet port; by its kind it cannot
    with Tunnel({decode: "10.9.0.1/24", prefill: "10.9.0.2/24"}, "eth1") as vpn:
        for number in range(num_starts):
            mesh = LanMesh(front, front.run("--role", "frontend,processor,router"))
            mesh.decode = [decode.run("--role", "decode", *SLOW_PREFILL)]
            mesh.prefill = [prefill.run("--role", "prefill")]
            mesh.wait_until_ready()
            mesh.wait_until_all_meet()
            decode.connect("10.9.0.2", 7800).close()  # the VPN works
            before = vpn.num_bytes
            answer = mesh.complete(f"{number} {LONG_PROMPT}")
            assert answer["meshserve"]["peers"]["prefill"] and answer["meshserve"]["kv"]["bytes"] > 500_000
            assert vpn.num_bytes - before < 20_000
            for process in (*mesh.decode, *mesh.prefill, mesh.frontend):
                process.terminate()
                assert process.wait() == 0
