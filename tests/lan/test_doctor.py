"""What `doctor` says of real faults, on hosts that all tests share: each test has a mesh of its own, and ends its faults."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import Host, Lan, Process, wait_until
from tests.harness.pressure import allowance_s
from tests.lan.meshes import READY_S

pytestmark = pytest.mark.lan

DOCTOR_S = 20.0
BUDGET_S = 8.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Three laptops."""
    with Lan() as lan:
        yield [lan.add_host() for _ in range(3)]
        assert not lan.tracebacks(), lan.tracebacks()[0]


@pytest.fixture(autouse=True)
def faults_end(hosts: list[Host]) -> Iterator[None]:
    """No test sees another's peers or faults."""
    yield
    for host in hosts:
        host.unblock()
        for process in host.processes:
            process.close()


def start(host: Host, roles: str, *options: str) -> Process:
    process = host.run("--role", roles, *options)
    process.ready(READY_S)
    return process


def peers_on(host: Host, *options: str) -> list[dict[str, Any]]:
    """What `peers` sees from there."""
    found: list[dict[str, Any]] = json.loads(host.meshserve("peers", "--json", *options).stdout or "[]")
    return found


def examine(host: Host, *options: str) -> dict[str, dict[str, Any]]:
    """The doctor's findings that are worse than information, by code; that it kept to its time, and to its exit code."""
    began_s = time.monotonic()
    done = host.meshserve("doctor", "--json", *options, deadline_s=DOCTOR_S)
    report = json.loads(done.stdout)
    wrong = [finding for finding in report["findings"] if finding["severity"] != "info"]
    assert done.exit_code == (1 if wrong else 0) and not done.stderr, done
    assert report["took_s"] <= BUDGET_S + allowance_s(began_s) and report["ok"] == (not wrong)
    assert all(finding["cause"] and finding["advice"] for finding in wrong)
    return {finding["code"]: finding for finding in wrong}


def settled(host: Host, code: str, words: str) -> dict[str, dict[str, Any]]:
    """The findings once this one is among them: peers that have just started, on a machine that may be busy, have not announced themselves
    to each other yet, and until they have, nobody can say where multicast is blocked."""

    def look() -> dict[str, dict[str, Any]]:
        found = examine(host)
        return found if words in found.get(code, {"cause": ""})["cause"] else {}

    return wait_until(look, 4 * DOCTOR_S, f"{code} with {words!r}")


@pytest.mark.full
def test_a_sound_mesh_has_nothing_wrong_wherever_it_is_looked_at_from(hosts: list[Host]) -> None:
    for host, roles in zip(hosts, ("frontend,processor,router", "decode", "prefill"), strict=True):
        start(host, roles)
    wait_until(lambda: len(peers_on(hosts[0])) == 3, READY_S, "all are there")
    wait_until(lambda: not examine(hosts[0]), READY_S, "every peer knows all others")
    text = hosts[1].meshserve("doctor", deadline_s=DOCTOR_S)
    assert text.exit_code == 0 and "every peer can connect to all others" in text.stdout and "\x1b" not in text.stdout


@pytest.mark.full
def test_nobody_there_is_said_with_what_to_try(hosts: list[Host]) -> None:
    found = examine(hosts[0], "--mesh", "nobody")
    assert set(found) == {"no_peers"} and "--peer" in found["no_peers"]["advice"]
    seeded = examine(hosts[0], "--mesh", "nobody", "--peer", hosts[1].address)
    assert set(seeded) == {"no_peers", "seed_silent"} and "nobody listens" in seeded["seed_silent"]["cause"]


def test_blocked_multicast_is_named_with_the_machine_where_it_is_blocked(hosts: list[Host]) -> None:
    start(hosts[0], "frontend,processor,router")
    start(hosts[1], "decode")
    hosts[2].block_multicast()
    start(hosts[2], "prefill", "--peer", hosts[0].address)
    found = settled(hosts[2], "multicast_blocked", "this machine")
    assert "--peer 10.77.0." in found["multicast_blocked"]["advice"]


@pytest.mark.full
def test_multicast_that_is_blocked_elsewhere_is_named_too(hosts: list[Host]) -> None:
    start(hosts[0], "frontend,processor,router")
    start(hosts[1], "decode")
    hosts[2].block_multicast()
    start(hosts[2], "prefill", "--peer", hosts[0].address)
    found = settled(hosts[0], "multicast_blocked", hosts[2].address)
    assert set(found) == {"multicast_blocked"}


def test_blocked_ports_are_named_with_the_peer_behind_them(hosts: list[Host]) -> None:
    hosts[1].block_ports(7800, 7899)
    start(hosts[0], "frontend,processor,router")
    worker = start(hosts[1], "decode")
    start(hosts[2], "prefill")
    found = examine(hosts[2])
    assert set(found) == {"port_blocked"} and worker.ready()["name"] in found["port_blocked"]["cause"]
    assert "no answer" in found["port_blocked"]["seen"] and "7800-7899/tcp" in found["port_blocked"]["advice"]


@pytest.mark.full
def test_one_blocked_port_of_the_four_is_named(hosts: list[Host]) -> None:
    hosts[1].block_ports(7801, 7801)
    start(hosts[0], "frontend,processor,router")
    start(hosts[1], "decode")
    found = examine(hosts[0])
    assert set(found) == {"port_blocked"} and "port 7801 (bulk)" in found["port_blocked"]["cause"]


@pytest.mark.full
@pytest.mark.parametrize("is_told", [True, False], ids=["with --peer", "without"])
def test_a_wrong_interface_is_named(hosts: list[Host], is_told: bool) -> None:
    if "wrong0" not in hosts[1].command("ip", "link").stdout:
        hosts[1].add_interface("wrong0", "10.99.0.1/24")
    start(hosts[0], "frontend,processor,router")
    start(hosts[2], "prefill")
    start(hosts[1], "decode", "--interface", "wrong0", *(("--peer", hosts[0].address) if is_told else ()))
    found = examine(hosts[0] if is_told else hosts[1])
    assert "advertises 10.99.0.1" in found["wrong_interface"]["cause"] and "10.77.0.0/16" in found["wrong_interface"]["seen"]
    assert "--interface" in found["wrong_interface"]["advice"]


@pytest.mark.full
@pytest.mark.parametrize("seen_from", [0, 2])
def test_packets_that_go_one_way_only_are_named_with_their_way(hosts: list[Host], seen_from: int) -> None:
    hosts[0].block_towards(hosts[1])
    names = [
        start(host, roles).ready()["name"] for host, roles in zip(hosts, ("frontend,processor,router", "decode", "prefill"), strict=True)
    ]
    found = examine(hosts[seen_from])
    assert f"those of {names[0]} do not reach {names[1]}" in found["one_way"]["cause"], found


@pytest.mark.full
def test_a_firewall_that_only_lets_out_is_one_way_too(hosts: list[Host]) -> None:
    names = [
        start(host, roles).ready()["name"] for host, roles in zip(hosts, ("frontend,processor,router", "decode", "prefill"), strict=True)
    ]
    wait_until(lambda: not examine(hosts[2]), READY_S, "every peer knows all others")
    hosts[1].block_ports(7800, 7899, only_from=hosts[0])
    found = examine(hosts[2])
    assert set(found) == {"one_way"} and f"{names[0]} cannot connect to {names[1]}, though" in found["one_way"]["cause"]


@pytest.mark.full
def test_a_path_that_loses_long_messages_is_named(hosts: list[Host]) -> None:
    start(hosts[0], "frontend,processor,router")
    worker = start(hosts[1], "decode")
    wait_until(lambda: not examine(hosts[0]), READY_S, "every peer knows all others")
    hosts[1].drop_long_packets(1600)
    found = examine(hosts[0])
    assert set(found) == {"mtu"} and worker.ready()["name"] in found["mtu"]["cause"] and "MTU" in found["mtu"]["advice"]
    hosts[1].unblock()
    hosts[1].drop_long_packets(1400)  # shorter than what a single packet may be
    found = examine(hosts[0])
    assert set(found) == {"mtu"} and f"packets of 1400 bytes get to {worker.ready()['name']}" in found["mtu"]["seen"]
    assert "mtu 1400`" in found["mtu"]["advice"]


@pytest.mark.full
def test_other_keys_and_missing_keys_are_named(hosts: list[Host]) -> None:
    keys = [str(host.home / "mesh.key") for host in hosts[:2]]
    for host, path in zip(hosts, keys, strict=False):
        host.meshserve("key", "new", path)
    start(hosts[0], "frontend,processor,router", "--key-file", keys[0])
    start(hosts[1], "decode", "--key-file", keys[1])
    start(hosts[2], "prefill")
    found = examine(hosts[0], "--key-file", keys[0])
    assert hosts[1].address in found["key_differs"]["cause"] and "meshserve key show" in found["key_differs"]["advice"]
    assert hosts[2].address in found["key_absent"]["cause"]
    without = examine(hosts[2])
    assert hosts[0].address in without["key_missing"]["cause"] and "--key-file" in without["key_missing"]["advice"]
    (front,) = peers_on(hosts[0], "--key-file", keys[0])
    reasons = {entry["who"]: entry["reason"] for entry in front["refused"]}
    assert reasons[hosts[1].address] == "its key is not this mesh's"
    assert reasons[hosts[2].address] == "it has no key, and this mesh has one"


@pytest.mark.full
def test_other_meshes_are_named(hosts: list[Host]) -> None:
    start(hosts[0], "all")
    start(hosts[1], "decode", "--mesh", "defualt")
    start(hosts[2], "decode", "--mesh", "lab")
    found = examine(hosts[0])
    assert set(found) == {"other_mesh"} and "'defualt'" in found["other_mesh"]["cause"]
    lost = examine(hosts[2], "--mesh", "lap")
    assert {"other_mesh", "no_peers"} <= set(lost) and lost["other_mesh"]["severity"] == "error"


@pytest.mark.full
def test_a_network_without_ipv4_is_looked_at_too() -> None:
    with Lan() as lan:
        hosts = [lan.add_host() for _ in range(2)]
        for host in hosts:
            host.command("ip", "-4", "address", "flush", "dev", "eth0")
        start(hosts[0], "frontend,processor,router")
        start(hosts[1], "decode")
        wait_until(lambda: len(peers_on(hosts[0])) == 2, READY_S, "all are there")
        wait_until(lambda: not examine(hosts[0]), READY_S, "every peer knows all others")
        text = hosts[0].meshserve("doctor", deadline_s=DOCTOR_S).stdout
        assert "multicast arrives from 1 other machine: f" in text, text
        hosts[0].block_multicast()
        wait_until(lambda: "multicast_deaf" in examine(hosts[0]), READY_S, "blocked multicast is named")
        assert not lan.tracebacks(), lan.tracebacks()[0]


def test_two_peers_of_one_name_are_named(hosts: list[Host]) -> None:
    start(hosts[0], "frontend,processor,router")
    for host in hosts[1:]:
        start(host, "decode", "--name", "twin")
    found = examine(hosts[0])
    assert set(found) == {"same_name"} and "2 peers have the name twin" in found["same_name"]["cause"]
