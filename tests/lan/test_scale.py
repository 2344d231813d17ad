"""Many peers at once."""

import time

import pytest

from bench.scale import measure
from meshserve.config import MeshConfig
from tests.harness import Lan, wait_until
from tests.harness.pressure import allowance_s
from tests.lan.meshes import HTTP

pytestmark = pytest.mark.full


def test_twenty_peers_on_twenty_hosts_know_each_other_within_five_seconds(lan: Lan) -> None:
    hosts = [lan.add_host() for _ in range(20)]
    peers = [host.run("--role", "frontend" if number % 4 else "frontend,decode") for number, host in enumerate(hosts)]
    for peer in peers:
        peer.ready(30.0)
    ready_at = time.monotonic()
    for host in hosts:  # one after the other: nobody leaves, so who knows all goes on knowing all
        wait_until(lambda host=host: len(host.get(f"{HTTP}/mesh/peers").json()) == 20, 15.0, "one knows all")  # type: ignore[misc]
    took_s = time.monotonic() - ready_at
    print(f"all of 20 know all within {took_s:.2f} s of the last ready")
    assert took_s <= 5.0 + allowance_s(ready_at)


@pytest.mark.parametrize(("num_peers", "cpu_percent"), [(10, 1.0), (50, 4.0)])
def test_an_idle_peer_costs_little_however_many_others_there_are(num_peers: int, cpu_percent: float) -> None:
    idle = measure(num_peers, 20.0)
    print(idle)
    assert idle.met_s <= 10.0, "all know all"
    assert idle.cpu_percent_max <= cpu_percent
    assert idle.pings_per_s <= (num_peers - 1) / MeshConfig().heartbeat_interval_s * 0.6 + 1, "of two peers one pings"
    assert idle.hellos_per_s < 1.0, "gossip has come to rest"
    assert idle.rss_mb_max <= 60.0
