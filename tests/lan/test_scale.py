"""Many peers at once."""

import time

import pytest

from tests.harness import Lan, wait_until
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
    assert took_s <= 5.0
