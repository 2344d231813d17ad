"""How peers introduce themselves: the hello that decides who is a member."""

from dataclasses import dataclass, replace
from typing import Any

from meshserve.config import PROTOCOL_MAJOR, PROTOCOL_MINOR, ROLES
from meshserve.errors import ProtocolError
from meshserve.wire.card import ModelCard
from meshserve.wire.layout import KVLayout

MAX_ADDRESSES = 32
MAX_HINTS = 512


def _text(data: dict[str, Any], key: str, max_length: int = 255) -> str:
    value = data.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= max_length:
        raise ProtocolError(f"hello: {key} is missing or malformed")
    return value


def _texts(data: dict[str, Any], key: str, most: int) -> tuple[str, ...]:
    value = data.get(key)
    if not isinstance(value, list) or len(value) > most or not all(isinstance(item, str) and 0 < len(item) <= 255 for item in value):
        raise ProtocolError(f"hello: {key} is missing or malformed")
    return tuple(value)


def _port(data: dict[str, Any]) -> int:
    value = data.get("port")
    if type(value) is not int or not 0 <= value <= 65_535:
        raise ProtocolError("hello: port is missing or malformed")
    return value


@dataclass(frozen=True, slots=True)
class PeerHint:
    """Hearsay about a peer: where it may be reached. Only its own hello makes it a member."""

    incarnation: str
    addresses: tuple[str, ...]
    port: int

    def to_wire(self) -> dict[str, Any]:
        """Plain data for :meth:`from_wire`."""
        return {"incarnation": self.incarnation, "addresses": list(self.addresses), "port": self.port}

    @classmethod
    def from_wire(cls, data: Any) -> "PeerHint":
        """Raises ProtocolError for missing or malformed fields."""
        if not isinstance(data, dict):
            raise ProtocolError("a peer hint is a map")
        return cls(_text(data, "incarnation", 64), _texts(data, "addresses", MAX_ADDRESSES), _port(data))


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """All that a peer says of itself."""

    incarnation: str
    """Random, new at every process start; what membership is keyed by."""
    name: str
    """A label for people."""
    mesh: str
    roles: tuple[str, ...]
    """Empty for an observer."""
    addresses: tuple[str, ...]
    """IPv4 and IPv6 addresses of its interfaces, best first; empty for an observer."""
    port: int
    """First of its four ports."""
    version: str
    """Of the software, for people."""
    card: ModelCard | None = None
    """What its engine serves, if it has one."""
    layout: KVLayout | None = None
    """How its engine keeps KV, if it has one."""
    http: str | None = None
    """URL of its HTTP side, if it has one."""
    is_draining: bool = False
    """It finishes what it has and takes no new work."""
    withdrawn: tuple[str, ...] = ()
    """Of its roles, those that it cannot play now: its engine failed and is started again."""

    def can_play(self, role: str) -> bool:
        """Whether it has this role, and nothing keeps it from it."""
        return role in self.roles and role not in self.withdrawn

    @property
    def is_observer(self) -> bool:
        """Observers are listed nowhere and dialled by nobody."""
        return not self.roles

    @property
    def hint(self) -> PeerHint:
        """What others may pass on about it."""
        return PeerHint(self.incarnation, self.addresses, self.port)

    def draining(self) -> "PeerInfo":
        """The same peer, taking no new work from now on."""
        return replace(self, is_draining=True)

    def to_wire(self) -> dict[str, Any]:
        """Plain data for :meth:`from_wire`."""
        return {
            "incarnation": self.incarnation,
            "name": self.name,
            "mesh": self.mesh,
            "roles": list(self.roles),
            "addresses": list(self.addresses),
            "port": self.port,
            "version": self.version,
            "card": self.card.to_wire() if self.card else None,
            "layout": self.layout.to_wire() if self.layout else None,
            "http": self.http,
            "draining": self.is_draining,
            "withdrawn": list(self.withdrawn),
        }

    @classmethod
    def from_wire(cls, data: Any) -> "PeerInfo":
        """Unknown fields and unknown roles are ignored; missing or malformed fields raise ProtocolError."""
        if not isinstance(data, dict):
            raise ProtocolError("a peer is a map")
        roles = tuple(role for role in _texts(data, "roles", 32) if role in ROLES)
        card, layout = data.get("card"), data.get("layout")
        if (card is None) != (layout is None):
            raise ProtocolError("hello: a model card and a KV layout go together")
        http = data.get("http")
        if http is not None and (not isinstance(http, str) or len(http) > 255):
            raise ProtocolError("hello: http is malformed")
        return cls(
            _text(data, "incarnation", 64),
            _text(data, "name"),
            _text(data, "mesh"),
            roles,
            _texts(data, "addresses", MAX_ADDRESSES),
            _port(data),
            _text(data, "version", 64),
            ModelCard.from_wire(card) if card is not None else None,
            KVLayout.from_wire(layout) if layout is not None else None,
            http,
            data.get("draining") is True,
            _texts(data, "withdrawn", 32) if "withdrawn" in data else (),
        )


@dataclass(frozen=True, slots=True)
class Hello:
    """First message on a link, in both directions; sent again when something about the peer changed."""

    peer: PeerInfo
    age_s: float
    """Since the peer's start, on its own clock: tells which of two peers with one name is the later one."""
    hints: tuple[PeerHint, ...] = ()
    """Other members that it knows: gossip."""
    expected: str | None = None
    """Incarnation that the dialling peer means to reach; another one answers with a refusal."""
    is_reset: bool = False
    """The dialling peer lost its connection to the other: what it had asked for there, nobody waits for any more."""
    major: int = PROTOCOL_MAJOR
    minor: int = PROTOCOL_MINOR

    def to_wire(self) -> dict[str, Any]:
        """Plain data for :meth:`from_wire`."""
        return {
            "protocol": [self.major, self.minor],
            "peer": self.peer.to_wire(),
            "age_s": self.age_s,
            "expected": self.expected,
            "reset": self.is_reset,
            "hints": [hint.to_wire() for hint in self.hints[:MAX_HINTS]],
        }

    @classmethod
    def from_wire(cls, data: Any) -> "Hello":
        """Raises ProtocolError for missing or malformed fields. The version must be looked at first: :func:`protocol_of`."""
        major, minor = protocol_of(data)
        age_s, hints, expected = data.get("age_s"), data.get("hints"), data.get("expected")
        if not isinstance(age_s, (int, float)) or not 0 <= age_s < 1e10:
            raise ProtocolError("hello: age_s is missing or malformed")
        if not isinstance(hints, list) or len(hints) > MAX_HINTS or not (expected is None or isinstance(expected, str)):
            raise ProtocolError("hello: hints or expected are malformed")
        return cls(
            PeerInfo.from_wire(data.get("peer")),
            float(age_s),
            tuple(map(PeerHint.from_wire, hints)),
            expected,
            data.get("reset") is True,
            major,
            minor,
        )


def protocol_of(data: Any) -> tuple[int, int]:
    """The protocol version of a hello whose other fields may be of another version. Raises ProtocolError if there is none."""
    version = data.get("protocol") if isinstance(data, dict) else None
    if not isinstance(version, list) or len(version) < 2 or not all(type(part) is int for part in version[:2]):
        raise ProtocolError("hello: no protocol version")
    return version[0], version[1]
