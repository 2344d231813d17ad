"""Hosts that do not reach each other while both reach the others: rows 17 and 39. They are never paired, and nobody waits."""

import time
from dataclasses import dataclass

import pytest

from tests.harness import Host, Lan, wait_until
from tests.harness.pressure import allowance_s
from tests.harness.waiting import pace
from tests.lan.meshes import HTTP, LONG_PROMPT, READY_S, SLOW_PREFILL, LanMesh, text_of

FAILURE_TIMEOUT_S = 1.5
NUM_ASKED = 8


@dataclass
class Hosts:
    """Each with one peer: frontend and processor; router; two decode workers; prefill worker."""

    front: Host
    router: Host
    decode: Host
    other_decode: Host
    prefill: Host


PAIRS = {"processor_and_decode": ("front", "decode"), "decode_and_prefill": ("decode", "prefill")}
WAYS = ("both", "there", "back")


def block(hosts: Hosts, pair: str, way: str) -> None:
    one, other = (getattr(hosts, name) for name in PAIRS[pair])
    if way in ("both", "there"):
        one.block_towards(other)
    if way in ("both", "back"):
        other.block_towards(one)


def ends(hosts: Hosts, pair: str, way: str) -> tuple[Host, Host]:
    """Who dials that way, and who is dialled."""
    one, other = (getattr(hosts, name) for name in PAIRS[pair])
    return (one, other) if way == "there" else (other, one)


def block_dials(hosts: Hosts, pair: str, way: str) -> None:
    """Only new connections are kept out, as by a firewall that lets out and not in."""
    sender, target = ends(hosts, pair, way)
    target.block_ports(7800, 7899, only_from=sender)


def start(lan: Lan) -> Hosts:
    return Hosts(*(lan.add_host(name) for name in ("front", "router", "decode", "other", "prefill")))


def run(hosts: Hosts) -> LanMesh:
    mesh = LanMesh(hosts.front, hosts.front.run("--role", "frontend,processor"))
    router = hosts.router.run("--role", "router")
    mesh.decode = [host.run("--role", "decode", *SLOW_PREFILL) for host in (hosts.decode, hosts.other_decode)]
    mesh.prefill = [hosts.prefill.run("--role", "prefill")]
    router.wait_for_line("^2 decode, 1 prefill ready", READY_S)
    wait_until(lambda: hosts.front.get(f"{HTTP}/ready").status == 200, READY_S, "a request could be served")
    return mesh


def ask_all(mesh: LanMesh, longest_s: float) -> list[dict[str, object]]:
    """Some long prompts, one after the other, each answered in time. The receipts."""
    receipts = []
    for number in range(NUM_ASKED):
        began_at = time.monotonic()
        answer = mesh.complete(f"{number} {LONG_PROMPT}", max_tokens=4)
        assert text_of(answer)
        assert time.monotonic() - began_at < longest_s + allowance_s(began_at), answer["meshserve"]
        receipts.append(answer["meshserve"])
    return receipts


def is_paired(mesh: LanMesh, pair: str, receipt: dict[str, object]) -> bool:
    """Whether the two hosts served this request together."""
    decode, prefill = mesh.names(mesh.decode)[0], mesh.names(mesh.prefill)[0]
    peers = receipt["peers"]
    assert isinstance(peers, dict)
    return peers["decode"] == decode and (pair == "processor_and_decode" or peers["prefill"] == prefill)


def failed_attempts(receipt: dict[str, object]) -> list[object]:
    """Those of a request that came to nothing."""
    attempts = receipt["attempts"]
    assert isinstance(attempts, list)
    return [attempt for attempt in attempts if attempt["outcome"] != "done"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pair", PAIRS)
def test_row_17_hosts_that_do_not_reach_each_other_are_never_paired(lan: Lan, pair: str, way: str) -> None:
    hosts = start(lan)
    block(hosts, pair, way)
    mesh = run(hosts)
    receipts = ask_all(mesh, FAILURE_TIMEOUT_S)
    assert not any(is_paired(mesh, pair, receipt) for receipt in receipts)
    assert not any(failed_attempts(receipt) for receipt in receipts), list(map(failed_attempts, receipts))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pair", PAIRS)
def test_row_17_hosts_that_part_while_they_serve_are_not_paired_any_more(lan: Lan, pair: str, way: str) -> None:
    hosts = start(lan)
    mesh = run(hosts)
    mesh.wait_until_all_meet(5)
    ask_all(mesh, 3.0)
    block(hosts, pair, way)
    ask_all(mesh, FAILURE_TIMEOUT_S + 2.0)
    receipts = ask_all(mesh, FAILURE_TIMEOUT_S)
    assert not any(is_paired(mesh, pair, receipt) for receipt in receipts)


@pytest.mark.parametrize("way", ["there", "back"])
@pytest.mark.parametrize("pair", PAIRS)
def test_row_39_where_only_one_can_dial_the_other_nobody_waits(lan: Lan, pair: str, way: str) -> None:
    hosts = start(lan)
    block_dials(hosts, pair, way)
    mesh = run(hosts)
    receipts = ask_all(mesh, FAILURE_TIMEOUT_S)
    if pair == "decode_and_prefill":
        assert not any(is_paired(mesh, pair, receipt) for receipt in receipts)
    assert not any(failed_attempts(receipt) for receipt in receipts), list(map(failed_attempts, receipts))


PARTED_S = 8.0
"""Longer than connections live in which nothing arrives."""


@pytest.mark.full
@pytest.mark.parametrize("way", ["there", "back"])
@pytest.mark.parametrize("pair", PAIRS)
def test_row_39_where_only_one_can_dial_the_other_after_they_were_parted_nobody_waits(
    lan: Lan, pair: str, way: str
) -> None:
    hosts = start(lan)
    mesh = run(hosts)
    mesh.wait_until_all_meet(5)
    ask_all(mesh, 3.0)
    sender, target = ends(hosts, pair, way)
    sender.block_towards(target, both=True)
    pace(PARTED_S)
    block_dials(hosts, pair, way)
    sender.unblock()
    receipts = ask_all(mesh, FAILURE_TIMEOUT_S)
    if pair == "decode_and_prefill":
        assert not any(is_paired(mesh, pair, receipt) for receipt in receipts)
    assert not any(map(failed_attempts, receipts)), list(map(failed_attempts, receipts))
