"""The hello by which peers introduce themselves, and which decides on membership; and a peer's view of its network."""

import contextlib
import ipaddress
from collections.abc import Sequence
from typing import Annotated, Any

from meshserve.config import PROTOCOL_MAJOR, PROTOCOL_MINOR, ROLES
from meshserve.errors import ProtocolError
from meshserve.wire.card import KVLayout, ModelCard
from meshserve.wire.structs import FrozenMap, FrozenRow, Map, Meta, Row, field, replace

MAX_ADDRESSES = 32
MAX_HINTS = 512


_Label = Annotated[str, Meta(min_length=1, max_length=255)]
_ShortLabel = Annotated[str, Meta(min_length=1, max_length=64)]
_Labels = Annotated[tuple[_Label, ...], Meta(max_length=32)]
_Addresses = Annotated[tuple[_Label, ...], Meta(max_length=MAX_ADDRESSES)]
_Port = Annotated[int, Meta(ge=0, le=65_535)]


class PeerHint(FrozenMap, frozen=True):
    """Hearsay about a peer: where it may be reached. Only its own hello makes it a member."""

    incarnation: _ShortLabel
    addresses: _Addresses
    port: _Port


class PeerInfo(FrozenMap, frozen=True):
    """A peer as it describes itself."""

    incarnation: _ShortLabel
    """Random, new at every process start; what membership is keyed by."""
    name: _Label
    """A label for people."""
    mesh: _Label
    roles: _Labels
    """Empty for an observer."""
    addresses: _Addresses
    """IPv4 and IPv6 addresses of its interfaces, best first; empty for an observer."""
    port: _Port
    """First of its four ports."""
    version: _ShortLabel
    """Of the software, for people."""
    card: ModelCard | None = None
    """What its engine serves, if it has one."""
    layout: KVLayout | None = None
    """How its engine keeps KV, if it has one."""
    http: Annotated[str, Meta(max_length=255)] | None = None
    """URL of its HTTP side, if it has one."""
    is_draining: bool = field(default=False, name="draining")
    """The peer finishes its work and takes no more."""
    withdrawn: _Labels = ()
    """Roles that the peer cannot play now: its engine failed and is started again."""

    def can_play(self, role: str) -> bool:
        """Whether it has this role, and nothing keeps it from it."""
        return role in self.roles and role not in self.withdrawn

    @property
    def is_observer(self) -> bool:
        """Observers are neither listed nor dialled."""
        return not self.roles

    @property
    def hint(self) -> PeerHint:
        """What others may pass on about it."""
        return PeerHint(self.incarnation, self.addresses, self.port)


def with_room(workers: Sequence[PeerInfo], num_tokens: int) -> Sequence[PeerInfo]:
    """Those whose card takes requests of so many tokens; all if none does, since a worker's refusal says what is too long."""
    return [info for info in workers if info.card is not None and info.card.context_length >= num_tokens] or workers


class Hello(Map):
    """First message on a link, in both directions; sent again when something about the peer changed.

    The version must be looked at before the rest is read: :func:`protocol_of`.
    """

    peer: PeerInfo
    age_s: Annotated[float, Meta(ge=0, lt=1e10)]
    """Since the peer's start, on its own clock: tells which of two peers with one name is the later one."""
    hints: Annotated[tuple[PeerHint, ...], Meta(max_length=MAX_HINTS)]
    """Other members that the peer knows: gossip."""
    expected: str | None = None
    """Incarnation that the dialling peer means to reach; another one answers with a refusal."""
    link_number: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    """How many connections to the other the dialling peer has lost: the streams that it had opened over those are over."""

    def to_wire(self) -> Any:
        """With the protocol version, which all versions have in the same place."""
        return {**super().to_wire(), "protocol": [PROTOCOL_MAJOR, PROTOCOL_MINOR]}

    @classmethod
    def from_wire(cls, data: Any) -> "Hello":
        """As every message; a hello without a protocol version is refused too."""
        protocol_of(data)
        return super().from_wire(data)

    def _check(self) -> None:
        """A newer peer may have roles that are unknown here."""
        peer = self.peer
        if (peer.card is None) != (peer.layout is None):
            raise ProtocolError("malformed Hello: a model card and a KV layout go together")
        if peer.card is not None:
            peer.card._check()
        if peer.roles and not peer.addresses:
            raise ProtocolError("malformed Hello: no addresses")
        self.peer = replace(peer, roles=tuple(role for role in peer.roles if role in ROLES))


def protocol_of(data: Any) -> tuple[int, int]:
    """The protocol version of a hello whose other fields may be of another version. Raises ProtocolError if there is none."""
    version = data.get("protocol") if isinstance(data, dict) else None
    if not isinstance(version, list) or len(version) < 2 or not all(type(part) is int for part in version[:2]):
        raise ProtocolError("hello: no protocol version")
    return version[0], version[1]


# --- the network around a peer, as the peer reports it

MAX_LISTED = 512
_Listed = Annotated[tuple[str, ...], Meta(max_length=MAX_LISTED)]


class PortKnock(FrozenRow, frozen=True):
    """One attempt to connect to a peer's port."""

    target: Annotated[str, Meta(max_length=64)]
    """Incarnation."""
    address: Annotated[str, Meta(max_length=255)]
    port: int
    offset: Annotated[int, Meta(ge=0, le=2)]
    """From the peer's first port: calls, bulk, tickets."""
    outcome: str
    name: Annotated[str, Meta(max_length=255)] = ""
    """Of the target, if it said hello to the peer that knocks; else that peer only heard of it."""


class PortKnocks(Row):
    """The outcomes of a peer's knocks at all addresses that it knows."""

    knocks: Annotated[list[PortKnock], Meta(max_length=4096)]


class NetworkView(FrozenMap, frozen=True):
    """The network as one peer sees it."""

    interfaces: _Listed
    """Such as `192.168.1.10/24`."""
    mdns: Annotated[str, Meta(max_length=200)]
    """`on`, `off`, or why it does not work."""
    heard: _Listed
    """Incarnations of its mesh that mDNS told it of."""
    linked: _Listed
    clock_s: Annotated[float, Meta(gt=-1e12, lt=1e12)]
    """Of its wall clock."""

    @property
    def addresses(self) -> frozenset[str]:
        """Of its machine."""
        return frozenset(text.partition("/")[0] for text in self.interfaces)

    @property
    def networks(self) -> tuple[str, ...]:
        """That its machine is in, such as `192.168.1.0/24`."""
        found = []
        for text in self.interfaces:
            with contextlib.suppress(ValueError):
                found.append(str(ipaddress.ip_interface(text).network))
        return tuple(dict.fromkeys(found))
