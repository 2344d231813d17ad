"""This host's addresses: their kinds, what is advertised, and in which order others are dialled."""

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.config import MeshConfig
from meshserve.errors import UsageError
from meshserve.mesh.discovery import pack_addresses, unpack_addresses
from meshserve.mesh.interfaces import AddressWatch, InterfaceKind, LocalAddress, choose_addresses, dialling_order, local_addresses
from meshserve.mesh.mesh import Mesh
from tests.harness import run_async, until
from tests.harness.namespaces import leave_network
from tests.harness.rights import missing_right

LAN = LocalAddress("wlan0", "192.168.1.5", 24)
CONTAINERS = LocalAddress("docker0", "172.17.0.1", 16, InterfaceKind.VIRTUAL)
VPN = LocalAddress("wg0", "100.64.0.5", 10, InterfaceKind.TUNNEL)
LOOPBACK = LocalAddress("lo", "127.0.0.1", 8, InterfaceKind.LOOPBACK)
FE80 = LocalAddress("wlan0", "fe80::5", 64)
CABLE = LocalAddress("eth0", "fe80::6", 64)


@pytest.mark.parametrize(
    ("found", "advertised"),
    [
        ([VPN, CONTAINERS, LAN], ("192.168.1.5", "172.17.0.1", "100.64.0.5")),
        ([LOOPBACK, LAN], ("192.168.1.5",)),
        ([LOOPBACK], ("127.0.0.1",)),
        ([], ("127.0.0.1",)),
        # an fe80 address is of use only where there is no other
        ([FE80, LAN], ("192.168.1.5",)),
        ([CABLE, FE80, LAN], ("192.168.1.5", "fe80::6")),
        ([LocalAddress("eth0", "2001:db8::1", 64), LAN], ("192.168.1.5", "2001:db8::1")),
        ([LocalAddress("eth0", "10.0.0.1", 8, has_carrier=False), LAN], ("192.168.1.5", "10.0.0.1")),
    ],
)
def test_the_lan_is_advertised_first_and_a_vpn_last(found: list[LocalAddress], advertised: tuple[str, ...]) -> None:
    assert choose_addresses(None, [*found]).advertised == advertised


def test_a_pinned_interface_may_get_its_address_later_and_one_that_is_not_there_is_refused() -> None:
    assert choose_addresses("eth7", [LAN], ["eth7", "wlan0"]).bind_hosts == ("127.0.0.1",)
    assert choose_addresses("wlan0", [LAN, FE80]).bind_hosts == ("192.168.1.5", "fe80::5%wlan0")
    with pytest.raises(UsageError, match="no interface or address 'eth8'; its interfaces are: eth7, wlan0"):
        choose_addresses("eth8", [LAN], ["eth7"])


@pytest.mark.parametrize(
    ("told", "order"),
    [
        (["100.64.0.9", "8.8.8.8", "10.9.9.9", "192.168.1.9"], ["192.168.1.9", "10.9.9.9", "8.8.8.8", "100.64.0.9"]),
        # every host with containers has this address: it leads to this very host
        (["172.17.0.1", "192.168.1.9"], ["192.168.1.9", "172.17.0.1"]),
        (["fe80::9", "10.9.9.9"], ["10.9.9.9", "fe80::9%wlan0", "fe80::9%eth0"]),
        (["fe80::9%eth0"], ["fe80::9%eth0"]),
        (["kitchen.local", "10.9.9.9"], ["10.9.9.9", "kitchen.local"]),
    ],
)
def test_addresses_in_a_shared_lan_are_dialled_first(told: list[str], order: list[str]) -> None:
    assert list(dialling_order(told, [LOOPBACK, LAN, CONTAINERS, VPN, FE80, CABLE])) == order


@given(st.lists(st.ip_addresses().map(str), unique=True, max_size=12))
def test_addresses_are_all_dialled_once_and_packed_in_their_order(told: list[str]) -> None:
    needs_scope = [address for address in told if ":" in address and ip_address(address).is_link_local]
    assert sorted(dialling_order(told, [LAN, VPN])) == sorted(set(told) - set(needs_scope))
    assert unpack_addresses(pack_addresses(tuple(told))) == tuple(told)


@given(st.binary(max_size=200))
def test_whatever_is_announced_as_addresses_is_read_as_some(data: bytes) -> None:
    assert pack_addresses(unpack_addresses(data)) == data[: len(pack_addresses(unpack_addresses(data)))]


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def inside_a_new_network(action: Callable[[], None]) -> None:
    """Run this in a network with nothing but its loopback, in a thread that ends with it."""
    if missing_right() is not None and not os.environ.get("CI"):
        pytest.skip("no right to make a network namespace")

    def run() -> None:
        leave_network()
        action()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result(30.0)


def test_the_kind_of_an_interface_is_not_in_its_name() -> None:
    kinds: dict[str, InterfaceKind] = {}

    def look() -> None:
        ip("link add tun0 type veth peer name tun0x")
        ip("link add eth0 type bridge")
        ip("link set tun0x master eth0")
        ip("tuntap add mode tun name wlan0")
        ip("tuntap add mode tap name wlan1")
        for number, name in enumerate(("tun0", "eth0", "wlan0", "wlan1")):
            ip(f"address add 10.0.{number}.1/24 dev {name}")
            ip(f"link set {name} up")
        kinds.update((local.interface, local.kind) for local in local_addresses())

    inside_a_new_network(look)
    assert kinds == {
        "lo": InterfaceKind.LOOPBACK,
        "tun0": InterfaceKind.LAN,
        "eth0": InterfaceKind.VIRTUAL,
        "wlan0": InterfaceKind.TUNNEL,
        "wlan1": InterfaceKind.TUNNEL,
    }


def test_an_address_counts_once_it_is_known_to_be_the_only_one_and_its_coming_and_going_are_noticed() -> None:
    async def course() -> None:
        num_noticed = 0

        def on_change() -> None:
            nonlocal num_noticed
            num_noticed += 1

        def is_there() -> bool:
            return any(local.address == "2001:db8::7" for local in local_addresses())

        ip("link add eth0 type veth peer name eth0x")
        ip("link set eth0x up")
        ip("link set eth0 up")
        watch = AddressWatch(on_change)
        try:
            ip("address add 2001:db8::7/64 dev eth0")
            assert not is_there()  # the kernel asks for a second or two whether another host has it
            await until(is_there, 10.0, "the address can be used")
            await until(lambda: num_noticed, 5.0, "its coming is noticed")
            num_noticed = 0
            ip("address del 2001:db8::7/64 dev eth0")
            await until(lambda: num_noticed, 5.0, "its going is noticed")
            assert not is_there()
        finally:
            watch.close()

    inside_a_new_network(lambda: run_async(course()))


def test_an_address_that_changes_while_a_peer_starts_is_noticed() -> None:
    async def course() -> None:
        mesh = Mesh(MeshConfig(roles=("decode",), use_mdns=False))
        await mesh.start()
        try:
            ip("address del 10.1.0.2/16 dev eth0")
            ip("address add 10.1.0.3/16 dev eth0")
            assert mesh.own.addresses == ("10.1.0.2",)
            await mesh.join()
            await until(lambda: mesh.own.addresses == ("10.1.0.3",), 10.0, "the peer says where it is now")
        finally:
            await mesh.close()

    def on_a_host() -> None:
        ip("link set lo up")
        ip("link add eth0 type veth peer name eth0x")
        ip("link set eth0x up")
        ip("address add 10.1.0.2/16 dev eth0")
        ip("link set eth0 addrgenmode none")
        ip("link set eth0 up")
        run_async(course())

    inside_a_new_network(on_a_host)
