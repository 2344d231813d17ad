"""Links between hosts that are rebooted, left, or told lies: rows 26, 38 and 42."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import Lan, wait_until
from tests.harness.waiting import pace
from tests.lan.meshes import READY_S, LanMesh, start_aggregated, text_of, undisturbed
from tests.lan.streams import Stream


def counter(mesh: LanMesh, name: str) -> int:
    """Of all peers together."""
    return sum(peer["counters"].get(name, 0) for peer in mesh.peers())


@pytest.mark.parametrize(
    "watched_s",
    [15.0, pytest.param(600.0, marks=(pytest.mark.full, pytest.mark.timeout(1200)))],
)
def test_row_38_a_host_that_is_rebooted_at_the_same_address_keeps_its_links(lan: Lan, watched_s: float) -> None:
    mesh = start_aggregated(lan, "--failure-timeout", "1.5")
    rebooted = lan.hosts[1]
    rebooted.link_down()  # it falls silent: nobody is told that its processes end
    mesh.decode[1].kill()
    mesh.frontend.wait_for_line("^1 decode", READY_S)
    wait_until(lambda: len(mesh.peers()) == 2, READY_S, "the old incarnation is given up")
    rebooted.link_up()
    mesh.decode[1] = rebooted.run("--role", "decode")
    mesh.wait_until_ready()
    mesh.wait_until_all_meet()
    before = {peer["name"]: peer["incarnation"] for peer in mesh.peers()}
    lost, began_at = counter(mesh, "links_lost"), time.monotonic()
    while time.monotonic() - began_at < watched_s:
        assert text_of(mesh.complete("a question"))
        pace(0.5)
    assert {peer["name"]: peer["incarnation"] for peer in mesh.peers()} == before
    assert counter(mesh, "links_lost") == lost


@pytest.mark.parametrize("num_leavers", [4, pytest.param(15, marks=pytest.mark.full)])
def test_row_42_peers_that_leave_stay_gone(lan: Lan, num_leavers: int) -> None:
    mesh = start_aggregated(lan)
    host = lan.add_host()
    for _ in range(num_leavers):
        began_at = time.monotonic()
        leaver = host.run("--role", "decode")
        mesh.frontend.wait_for_line("^3 decode", READY_S, began_at)
        left_at = time.monotonic()
        leaver.terminate()
        assert leaver.wait() == 0
        mesh.frontend.wait_for_line("^2 decode", READY_S, left_at)
    pace(3.0)  # in which late hellos and outcomes of dials come in
    gone = [line.text for line in mesh.frontend.stdout if line.text.startswith("3 decode")]
    assert len(gone) == num_leavers, "nobody rose again"
    assert len(mesh.peers()) == 3



FORGER = """
import concurrent.futures, socket, sys, threading, zeroconf

own, num_peers, kind = sys.argv[1], int(sys.argv[2]), "_meshserve._tcp.local."
network, names, are_all_there = zeroconf.Zeroconf([own]), set(), threading.Event()

def found(zeroconf, service_type, name, state_change):
    names.add(name)
    if len(names) == num_peers:
        are_all_there.set()

browser = zeroconf.ServiceBrowser(network, kind, handlers=[found])
assert are_all_there.wait(10)
forged = []
for name in names:
    info = network.get_service_info(kind, name)
    text = {key: value for key, value in info.properties.items() if key != b"a"}
    forged.append(zeroconf.ServiceInfo(
        kind, name, info.port, properties=text, server=info.server,
        addresses=[socket.inet_aton(own)],
    ))
with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(lambda info: network.register_service(info, cooperating_responders=True), forged))
    print("forged", flush=True)
    list(pool.map(network.unregister_service, forged))
print("withdrawn", flush=True)
"""
"""Announces every peer of the mesh at an address of its own, and then takes all their records back."""


@pytest.mark.full
def test_row_26_forged_records_and_goodbyes_cost_no_stream(lan: Lan) -> None:
    mesh = start_aggregated(lan, "--engine-opt", "step_ms=10")
    mesh.wait_until_all_meet()
    before = {peer["name"]: peer["incarnation"] for peer in mesh.peers()}
    lost, forger = counter(mesh, "links_lost"), lan.add_host()
    prompts = [f"stream {number}" for number in range(4)]
    streams = [Stream(mesh, prompt, 600) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        forging = forger.start(sys.executable, "-c", FORGER, forger.address, "3")
        for words in ("^forged", "^withdrawn"):
            forging.wait_for_line(words, READY_S)
            assert text_of(mesh.complete(f"a question once it was {words}"))
        assert not any(stream.done() for stream in running)
        for stream in running:
            stream.result()
    assert not any(stream.receipt["migrations"] for stream in streams)
    assert [stream.text for stream in streams] == undisturbed(lan, prompts, 600, ignore_eos=True)
    assert {peer["name"]: peer["incarnation"] for peer in mesh.peers()} == before
    assert counter(mesh, "links_lost") == lost
