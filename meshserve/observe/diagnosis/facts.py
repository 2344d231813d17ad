"""Input of the diagnosis, facts about a mesh and the network around it, and its output: findings."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from meshserve.config import FIRST_PORT
from meshserve.mesh.interfaces import LocalAddress
from meshserve.observe.variants import Serving
from meshserve.wire.hello import NetworkView, PortKnock

HERE = ""
"""In the place of an incarnation: this machine, where the doctor runs."""


@dataclass(frozen=True, slots=True)
class Multicast:
    """One question by multicast on one interface, and what came back."""

    interface: str
    address: str
    error: str | None = None
    """Why it could not be asked or listened to."""
    is_heard_back: bool = False
    others: frozenset[str] = frozenset()
    """Addresses of other machines that multicast came from."""


@dataclass(frozen=True, slots=True)
class PathMtu:
    """The longest packets between this machine and another one, in bytes."""

    interface: str
    """Of this machine, on the way there."""
    mtu: int
    """What this interface sends."""
    largest: int
    """Of those tried, the longest that got there."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A port in the range of peers at which a process of this machine listens."""

    address: str
    port: int
    security: str | None
    """`NULL` or `CURVE`; None: not ZeroMQ, so no peer."""


@dataclass(frozen=True, slots=True)
class Stranger:
    """A listener that is no member of the mesh: announced, named by `--peer`, or on this machine."""

    address: str
    port: int
    outcome: str
    """Of a connection to it."""
    security: str | None = None
    kind: str = ""
    """Why it refused our hello: `key`, or `mesh`, `protocol`, ... as in HandshakeRefused; empty if there was no answer to it."""
    reason: str = ""
    is_seed: bool = False

    @property
    def place(self) -> str:
        """For people."""
        return place(self.address, self.port)


@dataclass(frozen=True, slots=True)
class PeerFacts:
    """One peer of the mesh, a member or one that others tell of."""

    incarnation: str
    name: str
    """Empty if the peer never said hello."""
    addresses: tuple[str, ...]
    port: int
    roles: tuple[str, ...] = ()
    version: str = ""
    view: NetworkView | None = None
    """None: the peer could not be asked."""
    knocks: tuple[PortKnock, ...] | None = None
    """Outcomes of its own connection attempts to other peers; None: the peer could not be asked."""
    carries_large: bool | None = None
    clock_offset_s: float = 0.0
    """Of its wall clock to ours."""
    path: PathMtu | None = None
    """None: the path could not be measured."""
    serving: Serving | None = None
    announced: tuple[str, ...] = ()
    """Its addresses as mDNS tells of them; empty if mDNS does not."""
    is_alive: bool = True
    """It said hello to some peer, or announced itself just now; otherwise it is known by old hearsay only."""
    is_young: bool = False
    """It has just started: announcements may still be on their way."""

    @property
    def label(self) -> str:
        """For people."""
        return self.name or f"the peer at {self.place}"

    @property
    def place(self) -> str:
        """Its first address, for people."""
        return place(self.addresses[0] if self.addresses else "?", self.port)

    def advertised_in_vain(self) -> list[str]:
        """Addresses that it tells others and that its machine does not have, as it sees its machine itself now."""
        if self.view is None or not self.view.interfaces:
            return []
        return [address for address in self.addresses if address not in self.view.addresses and not is_loopback(address)]


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was found out; fields without a finding are empty."""

    mesh: str
    has_key: bool = False
    fingerprint: str = ""
    interface: str | None = None
    """`--interface`."""
    use_mdns: bool = True
    mdns: str = "on"
    """As this process found it: `on`, `off`, or why not."""
    interfaces: tuple[LocalAddress, ...] = ()
    multicast: tuple[Multicast, ...] = ()
    listeners: tuple[Listener, ...] = ()
    next_port: int | None = None
    """Where the next peer on this machine would listen."""
    peers: tuple[PeerFacts, ...] = ()
    knocks: tuple[PortKnock, ...] = ()
    """Of this process."""
    heard: frozenset[str] = frozenset()
    """Incarnations of this mesh that mDNS told this process of."""
    strangers: tuple[Stranger, ...] = ()
    other_meshes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of other meshes that mDNS tells of, with places of their peers."""

    def is_here(self, peer: PeerFacts) -> bool:
        """Whether the peer runs on this machine. Many machines have container bridges of one address, so all its addresses must be ours."""
        own = {local.address for local in self.interfaces}
        return bool(peer.addresses) and all(address in own or is_loopback(address) for address in peer.addresses)

    def on_one_machine(self, one: PeerFacts, other: PeerFacts) -> bool:
        """As far as their addresses tell."""
        if self.is_here(one) or self.is_here(other):
            return self.is_here(one) and self.is_here(other)
        return set(one.addresses) <= set(other.addresses) or set(other.addresses) <= set(one.addresses)

    def elsewhere(self) -> list[PeerFacts]:
        """Peers on other machines that are alive."""
        return [peer for peer in self.peers if peer.is_alive and not self.is_here(peer)]


def place(address: str, port: int) -> str:
    """HOST:PORT, for people."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def is_loopback(address: str) -> bool:
    """Whether only its own machine can reach it."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def is_within(address: str, networks: tuple[str, ...]) -> bool:
    """Whether an address can be reached from these networks without a router."""
    try:
        parsed = ipaddress.ip_address(address)
        return any(parsed in ipaddress.ip_network(network) for network in networks)
    except ValueError:
        return False


# --- findings

PORTS, MULTICAST_PORT = f"{FIRST_PORT}-{FIRST_PORT + 99}/tcp", "5353/udp"
"""What a firewall has to let in: for peers, and for mDNS."""


class Severity(StrEnum):
    """Of a finding."""

    ERROR = "error"
    """Peers do not see each other, or cannot work together."""
    WARNING = "warning"
    """It works in part, or by luck."""
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Finding:
    """One cause, what showed it, and what to do."""

    code: str
    """Stable, for scripts."""
    severity: Severity = field(kw_only=True)
    cause: str
    seen: str = ""
    advice: str = ""


error = partial(Finding, severity=Severity.ERROR)
warning = partial(Finding, severity=Severity.WARNING)
info = partial(Finding, severity=Severity.INFO)


def is_wrong(findings: Iterable[Finding]) -> bool:
    """Whether `doctor` exits with 1."""
    return any(finding.severity is not Severity.INFO for finding in findings)


def count(number: int, noun: str) -> str:
    """`1 peer`, `2 peers`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def names(texts: Iterable[str], most: int = 6) -> str:
    """A list for people: `a, b and 3 more`."""
    found = sorted(set(texts))
    shown = ", ".join(found[:most])
    return shown if len(found) <= most else f"{shown} and {len(found) - most} more"


def stale_address(peer: PeerFacts) -> Finding:
    """Of a peer that tells others of addresses that its machine does not have."""
    has = frozenset[str]() if peer.view is None else peer.view.addresses
    return error(
        "stale_address",
        f"{peer.label} advertises {', '.join(peer.advertised_in_vain())}, which its machine does not have",
        f"its machine has {names(address for address in has if not is_loopback(address)) or 'no address'}",
        "A peer follows its machine's addresses within seconds: ask again. If it stays, it was pinned to an address with "
        "--interface: name the interface instead, or start it anew.",
    )
