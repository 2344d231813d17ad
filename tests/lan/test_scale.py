"""Many peers at once."""

import functools
import time

import pytest

from bench.scale import measure
from meshserve.config import MeshConfig
from tests.harness import Host, Lan, wait_until
from tests.harness.pressure import allowance_s
from tests.lan.meshes import HTTP

pytestmark = pytest.mark.full


def knows(host: Host, num_peers: int) -> bool:
    """Whether the frontend on this host lists so many peers."""
    return len(host.get(f"{HTTP}/mesh/peers").json()) == num_peers


@pytest.mark.parametrize(("num_peers", "most_s"), [(20, 5.0), (50, 10.0)])
def test_row_19_peers_that_start_at_once_all_know_all(
    lan: Lan, num_peers: int, most_s: float
) -> None:
    hosts = [lan.add_host() for _ in range(num_peers)]
    lan.introduce_all()
    peers = [host.run("--role", "frontend" if number % 4 else "frontend,decode") for number, host in enumerate(hosts)]
    for peer in peers:
        peer.ready(60.0)
    lines = [line for peer in peers for line in peer.stdout]
    ready_at = max(line.at for line in lines if line.text.startswith("ready"))
    for host in hosts:  # one after the other: nobody leaves, so who knows all goes on knowing all
        wait_until(functools.partial(knows, host, num_peers), 2 * most_s, "one knows all")
    took_s = time.monotonic() - ready_at
    print(f"all of {num_peers} know all within {took_s:.2f} s of the last ready")
    assert took_s <= most_s + allowance_s(ready_at)


@pytest.mark.parametrize(("num_peers", "cpu_percent"), [(10, 1.0), (50, 4.0)])
def test_an_idle_peer_costs_little_however_many_others_there_are(num_peers: int, cpu_percent: float) -> None:
    idle = measure(num_peers, 20.0)
    print(idle)
    assert idle.met_s <= 10.0, "all know all"
    assert idle.cpu_percent_max <= cpu_percent
    assert idle.pings_per_s <= (num_peers - 1) / MeshConfig().heartbeat_interval_s * 0.6 + 1, "of two peers one pings"
    assert idle.hellos_per_s < 1.0, "gossip has come to rest"
    assert idle.rss_mb_max <= 60.0
