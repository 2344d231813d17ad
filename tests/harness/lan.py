"""A private LAN on one machine: a network namespace per host, all on one bridge, and the faults that can befall them.

Faults sit between a host and the switch, not in the host's own firewall: a lost packet is then lost silently, as on a real network,
where a firewall would make the sender's call fail.
"""

import contextlib
import itertools
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from tests.harness import fetch
from tests.harness.namespaces import add_namespace, inside, namespace_name, remove_namespace, run_tool, sweep
from tests.harness.processes import Completed, Process, meshserve_command, run_command

T = TypeVar("T")

BRIDGE = "br0"
INTERFACE = "eth0"
MAX_HOSTS = 250
HTTP_TIMEOUT_S = 60.0

# IPv6 finds its neighbours by ICMPv6 multicast: without that, unicast would stop too
MULTICAST_RULES = (
    "udp dport 5353 drop",
    "udp sport 5353 drop",
    "ip daddr 224.0.0.0/4 drop",
    "ip6 daddr ff00::/8 meta l4proto != ipv6-icmp drop",
)


class Host:
    """A machine of a `Lan`: a network namespace with `lo`, and `eth0` on the switch. `Lan.add_host` makes it."""

    def __init__(self, lan: "Lan", name: str, number: int) -> None:
        """Make the namespace and plug it in.

        Raises:
            ToolError: the right to do so is missing.
        """
        self.name, self.number = name, number
        self.address = f"10.77.{number // 250}.{number % 250 + 1}"
        self.address6 = f"fd77::{number + 1:x}"
        self.link_local6 = f"fe80::77:{number + 1:x}"
        self.netns = namespace_name(lan.number, name)
        self.home = lan.directory / name
        self.home.mkdir()
        self._lan = lan
        self._port = f"port{number}"
        self._mac = f"02:77:00:00:{number // 256:02x}:{number % 256:02x}"
        self._fault_numbers = itertools.count()
        self._undo: list[Callable[[], object]] = []
        self.processes: list[Process] = []
        add_namespace(self.netns)
        self._plug_in(number)

    def run(self, *arguments: str, env: Mapping[str, str] | None = None) -> Process:
        """Start `meshserve run ARGUMENTS` on this host; the LAN ends it at the latest."""
        return self.start(*meshserve_command("run", *arguments), env=env)

    def start(self, *command: str, env: Mapping[str, str] | None = None) -> Process:
        """Start any command on this host, with a home directory of the host's own; the LAN ends it at the latest."""
        process = Process(command, netns=self.netns, env=self._environment(env))
        self.processes.append(process)
        return process

    def command(self, *command: str, deadline_s: float = 10.0, env: Mapping[str, str] | None = None) -> Completed:
        """Run a command on this host to its end.

        Raises:
            AssertionError: it was still running after `deadline_s` seconds.
        """
        return run_command(command, deadline_s, self.netns, self._environment(env))

    def meshserve(self, *arguments: str, deadline_s: float = 10.0, env: Mapping[str, str] | None = None) -> Completed:
        """Run `meshserve ARGUMENTS` on this host to its end, as `command` does."""
        return self.command(*meshserve_command(*arguments), deadline_s=deadline_s, env=env)

    def inside(self, action: Callable[[], T]) -> T:
        """Run `action` in a thread inside this host; sockets that it makes stay there. What it raises is raised here."""
        return inside(self.netns, action)

    def link_down(self) -> None:
        """Pull the cable out of the switch."""
        self._lan.ip(f"link set {self._port} down")

    def link_up(self) -> None:
        """Put the cable back."""
        self._lan.ip(f"link set {self._port} up")

    def block_multicast(self) -> None:
        """Let no multicast and nothing of mDNS in or out, as guest networks and some access points do."""
        self._drop_both_ways(MULTICAST_RULES)

    def block_towards(self, other: "Host", both: bool = False) -> None:
        """Let nothing from this host reach `other`; nor the reverse, if `both`."""
        other._drop_from(self, self._undo)
        if both:
            self._drop_from(other, self._undo)

    def block_ports(self, first: int, last: int, only_from: "Host | None" = None) -> None:
        """Let no TCP connection to these ports of this host come about (or none of one host's), as a firewall that drops silently."""
        sender = f"ether saddr {only_from._mac} " if only_from else ""
        self._filter(self.netns, INTERFACE, [f"{sender}tcp dport {first}-{last} tcp flags & (syn | ack) == syn drop"], self._undo)

    def add_interface(self, name: str, address: str) -> None:
        """Another interface, in a network of its own that no other host is in; `address` has its prefix, as in 10.99.0.1/24."""
        # Linux answers for each of its addresses on every interface unless told otherwise, which no router in between would let happen
        self.inside(lambda: Path("/proc/sys/net/ipv4/conf/all/arp_ignore").write_text("1"))
        _ip(
            self.netns,
            f"link add {name} type veth peer name {name}x",
            f"address add {address} dev {name}",
            f"link set {name} up",
            f"link set {name}x up",
        )

    def add_address(self, address: str, interface: str = INTERFACE) -> None:
        """One more IPv4 or IPv6 address, with its prefix as in 10.77.9.9/16, at once usable."""
        _ip(self.netns, f"address add {address} dev {interface}{' nodad' if ':' in address else ''}")

    def remove_address(self, address: str, interface: str = INTERFACE) -> None:
        """An address of this host is gone; `address` has its prefix."""
        # otherwise the kernel takes all other addresses of the same network with it, which no desktop system lets it do
        self.inside(lambda: Path("/proc/sys/net/ipv4/conf/all/promote_secondaries").write_text("1"))
        _ip(self.netns, f"address del {address} dev {interface}")

    def drop_long_packets(self, most_bytes: int) -> None:
        """Lose, in each direction, what is longer than `most_bytes`, as a path does whose MTU its ends do not know. With 1600 single
        packets get through and bursts do not, as the kernel hands those over in one piece: so long messages take seconds."""
        self._drop_both_ways([f"meta length > {most_bytes} drop"])

    def drop_packets(self, percent: float) -> None:
        """Lose `percent` of all packets at random, in each direction."""
        share = round(percent * 100)
        # nft takes no comparison that is always true
        self._drop_both_ways([f"numgen random mod 10000 < {share} drop" if share < 10000 else "drop"])

    def flip_one_bit(self, port: int) -> None:
        """Change one bit, once, deep inside a run of data that comes in for this TCP port, as a switch with bad memory does.

        A veth pair verifies no checksums, so TCP takes what a real network's TCP would take once in some ten million broken packets.
        """
        # only what is long: libzmq sends the header of a message, and what follows it, in pieces of 8 KiB
        which = f"tcp dport {port} meta length > 9000 limit rate 1/day burst 1 packets"
        self._filter(self.netns, INTERFACE, [f"{which} @th,1600,8 set @th,1600,8 ^ 0x04"], self._undo)

    def reset_connections(self, port: int) -> None:
        """Break the TCP connections to this port of this host, as a firewall does that forgot them. New ones come about."""
        run_tool("ip", "netns", "exec", self.netns, "ss", "-K", "state", "established", "sport", "=", f":{port}")

    def limit_rate(self, bytes_per_s: int, burst_kb: int = 64) -> None:
        """Let at most `bytes_per_s` through in each direction, behind a queue of 50 ms.

        `burst_kb` is let through at once after a pause. At 1 Gbit/s less than 128 gives a rate that is too low (0.7 Gbit/s with 64), as the
        kernel's timers come late by more than the bucket lasts.
        """
        for netns, device in ((self.netns, INTERFACE), (self._lan.netns, self._port)):
            tc = ("tc", "-n", netns, "qdisc")
            # a bucket has to hold at least one segment as large as the kernel hands over
            limit = ("rate", f"{bytes_per_s * 8}bit", "burst", f"{burst_kb}kb", "latency", "50ms")
            run_tool(*tc, "replace", "dev", device, "root", "tbf", *limit)
            self._undo.append(lambda tc=tc, device=device: run_tool(*tc, "delete", "dev", device, "root"))  # type: ignore[misc]

    def neighbour_lines(self) -> list[str]:
        """Lines of `ip -batch` that tell another host which hardware has this host's addresses."""
        places = (self.address, self.address6, self.link_local6)
        return [
            f"neighbour replace {address} lladdr {self._mac} dev {INTERFACE} nud permanent"
            for address in places
        ]

    def unblock(self) -> None:
        """End every fault that was asked of this host, except a cable that is out."""
        while self._undo:
            self._undo.pop()()

    def connect(self, host: str, port: int, timeout_s: float = HTTP_TIMEOUT_S) -> socket.socket:
        """Open a TCP connection from this host.

        Raises:
            OSError: nobody answered, or refused.
        """
        return fetch.connect(self.netns, host, port, timeout_s)

    def get(self, url: str, timeout_s: float = HTTP_TIMEOUT_S) -> fetch.Response:
        """GET `url` from this host.

        Raises:
            OSError: no connection, or silence for `timeout_s` seconds.
        """
        return self.http("GET", url, timeout_s=timeout_s)

    def post_json(self, url: str, body: Any, timeout_s: float = HTTP_TIMEOUT_S) -> fetch.Response:
        """POST `body` as JSON to `url` from this host; errors as `get`."""
        return self.http("POST", url, body, timeout_s=timeout_s)

    def http(
        self, method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout_s: float = HTTP_TIMEOUT_S
    ) -> fetch.Response:
        """Send one request from this host, a `body` other than bytes as JSON, and return the whole response; errors as `get`."""
        return fetch.request(self.netns, method, url, body, headers, timeout_s)

    def stream(
        self, method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout_s: float = HTTP_TIMEOUT_S
    ) -> fetch.Lines:
        """Like `http`, as a context manager that gives the response's lines as they arrive; leaving it hangs up."""
        return fetch.stream(self.netns, method, url, body, headers, timeout_s)

    def async_client(self, timeout_s: float = HTTP_TIMEOUT_S) -> httpx.AsyncClient:
        """Return an asynchronous client whose connections come from this host, for many requests at once."""
        return fetch.async_client(self.netns, timeout_s)

    def close(self) -> None:
        """End its processes and remove it."""
        for process in self.processes:
            process.close()
        remove_namespace(self.netns)

    def _plug_in(self, number: int) -> None:
        self._lan.ip(
            f"link add {self._port} type veth peer name {INTERFACE} address {self._mac} netns {self.netns}",
            f"link set {self._port} addrgenmode none",
            f"link set {self._port} master {BRIDGE} up",
        )
        # addresses by hand, as the kernel's own would be tested for duplicates for a second or two before they can be used
        _ip(
            self.netns,
            f"link set {INTERFACE} addrgenmode none",
            f"address add {self.address}/16 brd + dev {INTERFACE}",
            f"link set {INTERFACE} up",
            f"address add {self.address6}/64 dev {INTERFACE} nodad",
            f"address add {self.link_local6}/64 dev {INTERFACE} nodad",
            f"route add 224.0.0.0/4 dev {INTERFACE}",
            f"route add default dev {INTERFACE}",
        )

    def _drop_from(self, sender: "Host", undo: list[Callable[[], object]]) -> None:
        # who has which address must stay known, or the other direction would end with this one
        rules = ["ether type ip drop", "ether type ip6 meta l4proto != ipv6-icmp drop"]
        self._filter(self.netns, INTERFACE, [f"ether saddr {sender._mac} {rule}" for rule in rules], undo)

    def _drop_both_ways(self, rules: Sequence[str]) -> None:
        self._filter(self.netns, INTERFACE, rules, self._undo)
        self._filter(self._lan.netns, self._port, rules, self._undo)

    def _filter(self, netns: str, device: str, rules: Sequence[str], undo: list[Callable[[], object]]) -> None:
        table = f"netdev fault_{self._port}_{next(self._fault_numbers)}"
        hook = f"type filter hook ingress device {device} priority 0"
        lines = [f"table {table} {{", "chain faults {", hook, *rules, "}", "}", ""]
        run_tool("ip", "netns", "exec", netns, "nft", "-f", "-", script="\n".join(lines))
        undo.append(lambda: run_tool("ip", "netns", "exec", netns, "nft", "delete", "table", *table.split()))

    def _environment(self, extra: Mapping[str, str] | None) -> dict[str, str]:
        # what a peer remembers of its mesh is its host's own, and never the developer's
        homes = {name: str(self.home) for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
        return {**homes, **(extra or {})}


class Lan:
    """A switch and the hosts on it; a context manager that removes them all, whatever happened in between.

    Nothing is made in the machine's own network: the switch is a namespace too, so any number of LANs can be there at once.
    """

    _numbers = itertools.count()

    def __init__(self) -> None:
        """Make the switch, after removing what test processes that died have left.

        Raises:
            ToolError: the right to make namespaces is missing.
        """
        self.number = next(Lan._numbers)
        self.hosts: list[Host] = []
        self.netns = namespace_name(self.number, "switch")
        sweep()
        self.directory = Path(tempfile.mkdtemp(prefix="meshserve-lan-"))
        try:
            add_namespace(self.netns)
            # with nobody to query for listeners, a bridge that snoops may stop forwarding multicast
            self.ip(f"link add {BRIDGE} type bridge mcast_snooping 0", f"link set {BRIDGE} addrgenmode none up")
        except BaseException:
            self.close()
            raise

    def add_host(self, name: str | None = None) -> Host:
        """Add a host, by default `host0`, `host1` and so on.

        Raises:
            ToolError: the right to do so is missing, or there is one of that name.
        """
        number = len(self.hosts)
        assert number < MAX_HOSTS, "a LAN is full"
        name = name or f"host{number}"
        try:
            host = Host(self, name, number)
        except BaseException:
            remove_namespace(namespace_name(self.number, name))
            raise
        self.hosts.append(host)
        return host

    def introduce_all(self) -> None:
        """Tell each host the hardware addresses of all others; needed beyond some thirty hosts.

        The kernel's table of neighbours has 1,024 places (gc_thresh3) for all namespaces together:
        when it is full, packets are lost. Permanent entries are not counted.
        """
        for host in self.hosts:
            others = [other for other in self.hosts if other is not host]
            _ip(host.netns, *(line for other in others for line in other.neighbour_lines()))

    def tracebacks(self) -> list[str]:
        """What its processes printed to stderr, of those that printed a traceback."""
        outputs = [process.stderr_text for host in self.hosts for process in host.processes]
        return [text for text in outputs if "Traceback" in text]

    def ip(self, *lines: str) -> None:
        """Run lines of `ip -batch` on the switch.

        Raises:
            ToolError: one of them failed.
        """
        _ip(self.netns, *lines)

    def close(self) -> None:
        """End every process and remove every host and the switch. May be called again."""
        with contextlib.ExitStack() as stack:
            # one that fails to go must not keep the others
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            stack.callback(remove_namespace, self.netns)
            for host in self.hosts:
                stack.callback(host.close)

    def __enter__(self) -> Self:
        """Return the LAN itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove it."""
        self.close()


def _ip(netns: str, *lines: str) -> None:
    run_tool("ip", "-n", netns, "-batch", "-", script="".join(f"{line}\n" for line in lines))
