"""Hosts, and the faults between them."""

import os
import socket
import sys
import time
from collections.abc import Callable

import pytest

from tests.harness import Host, Lan, Process, wait_until
from tests.harness.namespaces import DIRECTORY, PREFIX, ToolError, run_tool, sweep
from tests.harness.pressure import allowance_s

GROUP = "224.0.0.251"
PORT = 5353

LISTEN = """
import socket, struct
listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listener.bind(("", {port}))
listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("224.0.0.251") + socket.inet_aton("{address}"))
print("listening", flush=True)
while True:
    print("got", listener.recv(1000).decode(), flush=True)
"""

pytestmark = pytest.mark.lan


def listen(host: Host, port: int = PORT) -> Process:
    process = host.start(sys.executable, "-c", LISTEN.format(port=port, address=host.address))
    process.wait_for_line("^listening$", 5.0)
    return process


def send(host: Host, text: str, address: str, port: int = PORT) -> None:
    with host.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
        sender.sendto(text.encode(), (address, port))


def arrives(host: Host, listener: Process, address: str, port: int = PORT, within_s: float = 1.0) -> bool:
    """Whether a datagram arrives; sent again and again, as UDP promises nothing."""
    text = f"{time.monotonic_ns()}"

    def sent() -> bool:
        send(host, text, address, port)
        return listener.find_line(f"^got {text}$") is not None

    try:
        return wait_until(sent, within_s, "the datagram")
    except AssertionError:
        return False


def can_connect(host: Host, address: str, port: int, timeout_s: float = 0.2) -> bool:
    try:
        host.connect(address, port, timeout_s).close()
    except OSError:
        return False
    return True


def listening(host: Host, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    return host.inside(lambda: socket.create_server(("", 0), family=family))


def namespaces(*labels: object) -> list[str]:
    return [path.name for path in DIRECTORY.glob("-".join([PREFIX, *map(str, labels), "*"]))]


def test_hosts_reach_each_other_by_both_protocols_at_once_and_themselves(lan: Lan) -> None:
    a, b = lan.add_host("a"), lan.add_host("b")
    with listening(b) as four, listening(b, socket.AF_INET6) as six:
        assert can_connect(a, b.address, four.getsockname()[1])
        assert can_connect(a, b.address6, six.getsockname()[1])
        assert can_connect(b, "127.0.0.1", four.getsockname()[1])
        assert not can_connect(a, "127.0.0.1", four.getsockname()[1])


def test_a_command_runs_inside_under_its_own_pid_with_a_home_of_its_own(lan: Lan) -> None:
    a = lan.add_host()
    done = a.command("sh", "-c", "echo $$; echo $HOME; ip -o -4 address show eth0")
    _, home, address = done.stdout.split("\n")
    assert home == str(a.home)
    assert f" {a.address}/" in address
    process = a.start("sh", "-c", "echo $$; exec sleep 60")
    assert int(process.wait_for_line(r"^\d+$", 2.0)[0]) == process.pid


def test_multicast_reaches_the_other_host(lan: Lan) -> None:
    a, b = lan.add_host(), lan.add_host()
    assert arrives(a, listen(b), GROUP)


def test_blocked_multicast_is_lost_while_unicast_goes_on(lan: Lan) -> None:
    a, b = lan.add_host(), lan.add_host()
    mdns, other = listen(b), listen(b, 9000)
    assert arrives(a, mdns, GROUP)
    b.block_multicast()
    assert not arrives(a, mdns, GROUP, within_s=0.1)
    assert not arrives(a, other, GROUP, 9000, within_s=0.1)
    assert arrives(a, other, b.address, 9000)
    b.unblock()
    a.block_multicast()
    assert not arrives(a, mdns, GROUP, within_s=0.1)
    with listening(b, socket.AF_INET6) as six:
        assert can_connect(a, b.address6, six.getsockname()[1])
    a.unblock()
    assert arrives(a, mdns, GROUP)


def test_a_cable_that_is_out_stops_everything_and_comes_back(lan: Lan) -> None:
    a, b = lan.add_host(), lan.add_host()
    with listening(b) as four, listening(b, socket.AF_INET6) as six:
        b.link_down()
        assert not can_connect(a, b.address, four.getsockname()[1], 0.1)
        b.link_up()
        assert can_connect(a, b.address, four.getsockname()[1], 2.0)
        assert can_connect(a, b.address6, six.getsockname()[1], 2.0)


def test_one_direction_can_be_blocked(lan: Lan) -> None:
    a, b, c = (lan.add_host() for _ in range(3))
    at_a, at_b, at_c = (listen(host, 9000) for host in (a, b, c))
    a.block_towards(b)
    assert not arrives(a, at_b, b.address, 9000, 0.1)
    assert arrives(b, at_a, a.address, 9000)
    assert arrives(a, at_c, c.address, 9000)
    a.unblock()
    assert arrives(a, at_b, b.address, 9000)


def test_two_hosts_can_be_cut_off_from_each_other_and_still_reach_a_third(lan: Lan) -> None:
    a, b, c = (lan.add_host() for _ in range(3))
    at_a, at_b, at_c = (listen(host) for host in (a, b, c))
    a.block_towards(b, both=True)
    assert not arrives(a, at_b, GROUP, within_s=0.1)
    assert not arrives(b, at_a, GROUP, within_s=0.1)
    assert arrives(a, at_c, GROUP)
    assert arrives(b, at_c, GROUP)


def test_lost_packets_are_lost_silently_and_in_the_share_asked_for(lan: Lan) -> None:
    a, b = lan.add_host(), lan.add_host()
    at_b = listen(b, 9000)
    assert arrives(a, at_b, b.address, 9000)
    b.drop_packets(100)
    assert not arrives(a, at_b, b.address, 9000, 0.1)
    b.unblock()
    a.drop_packets(50)
    before = len(at_b.stdout)
    for _ in range(500):
        send(a, "half", b.address, 9000)
    a.unblock()
    assert arrives(a, at_b, b.address, 9000)
    assert 150 < len(at_b.stdout) - before < 350


def test_a_limited_rate_is_kept(lan: Lan) -> None:
    a, b = lan.add_host(), lan.add_host()
    with listening(b) as server, a.connect(b.address, server.getsockname()[1]) as out:
        inward, _ = server.accept()
        a.limit_rate(1_000_000)
        with inward:
            began_s = time.monotonic()
            took_s = transfer_s(out, inward, 400_000)
            # the bucket lets the first 64 KB through at once
            assert 0.2 < took_s < 1.5 + allowance_s(began_s)
            a.unblock()
            began_s = time.monotonic()
            assert transfer_s(out, inward, 400_000) < 0.2 + allowance_s(began_s)


def transfer_s(out: socket.socket, inward: socket.socket, size_bytes: int) -> float:
    start = time.monotonic()
    out.settimeout(5.0)
    inward.settimeout(5.0)
    received, sent = 0, 0
    while received < size_bytes:
        if sent < size_bytes:
            sent += out.send(bytes(min(16384, size_bytes - sent)))
        received += len(inward.recv(65536))
    return time.monotonic() - start


def test_a_killed_process_refuses_and_a_stopped_one_is_silent(lan: Lan) -> None:
    a, b = lan.add_host(), lan.add_host()
    code = "import socket; s = socket.create_server(('', 9000)); print('up', flush=True)\nwhile 1: s.accept()[0].sendall(b'hi')"
    process = b.start(sys.executable, "-c", code)
    process.wait_for_line("up", 5.0)
    assert greeting(a, b) == b"hi"
    process.stop()
    with pytest.raises(TimeoutError):
        greeting(a, b)
    process.resume()
    assert greeting(a, b) == b"hi"
    process.kill()
    process.wait(2.0)
    with pytest.raises(ConnectionRefusedError):
        greeting(a, b)


def greeting(a: Host, b: Host) -> bytes:
    with a.connect(b.address, 9000, 0.2) as connection:
        return connection.recv(10)


def test_two_lans_do_not_see_each_other(lan: Lan) -> None:
    with Lan() as other:
        a, b, elsewhere = lan.add_host("a"), lan.add_host("b"), other.add_host("b")
        assert elsewhere.address == a.address, "the same addresses, and no clash"
        at_b, at_elsewhere = listen(b), listen(elsewhere)
        assert arrives(a, at_b, GROUP)
        assert not arrives(a, at_elsewhere, GROUP, within_s=0.1)


def test_a_lan_is_gone_after_a_failure_with_all_that_ran_in_it() -> None:
    with pytest.raises(RuntimeError), Lan() as lan:
        host = lan.add_host()
        process = host.start("sleep", "60")
        process.stop()
        # one that left its session is found in the namespace
        host.command("sh", "-c", "setsid sleep 60 >/dev/null 2>&1 </dev/null &")
        assert len(namespaces(os.getpid(), lan.number)) == 2
        raise RuntimeError
    assert namespaces(os.getpid(), lan.number) == []
    assert process.exit_code is not None
    assert not lan.directory.exists()


def test_a_name_can_be_used_once(lan: Lan) -> None:
    lan.add_host("a")
    with pytest.raises((ToolError, FileExistsError)):
        lan.add_host("a")
    assert lan.add_host("b").command("true").exit_code == 0


def test_what_a_dead_test_process_left_is_swept_and_what_a_live_one_has_is_kept() -> None:
    with Process(["true"]) as dead:
        dead.wait()
    # a prefix of its own, as another suite would sweep it too
    prefix = f"swept{os.getpid()}"
    leftover, kept = f"{prefix}-{dead.pid}-0-switch", f"{prefix}-{os.getppid()}-0-switch"
    run_tool("ip", "netns", "add", leftover)
    run_tool("ip", "netns", "add", kept)
    try:
        assert sweep(prefix) == [leftover]
        assert not (DIRECTORY / leftover).exists()
        assert (DIRECTORY / kept).exists()
    finally:
        run_tool("ip", "netns", "delete", kept)


def test_the_machines_own_network_is_not_touched() -> None:
    before = run_tool("ip", "-o", "link"), run_tool("nft", "list", "ruleset")
    with Lan() as lan:
        lan.add_host().block_multicast()
        assert (run_tool("ip", "-o", "link"), run_tool("nft", "list", "ruleset")) == before


def test_what_fails_inside_is_raised_outside(lan: Lan) -> None:
    action: Callable[[], int] = [].index  # type: ignore[assignment]
    with pytest.raises(TypeError):
        lan.add_host().inside(action)
