"""What a peer finds out for others about the network around it."""

from typing import Annotated

from meshserve.wire.message import FrozenMap, FrozenRow, Meta, Row

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
    """What a peer's knocks at all addresses that it knows met."""

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
