"""Trusted proxies: the address of their client, and the protocol that the client used. Pure."""

import ipaddress
from collections.abc import Sequence

from meshserve.errors import UsageError

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_SCHEMES = ("http", "https")


class TrustedProxies:
    """Addresses of trusted proxies, from `--forwarded-allow-ips`."""

    def __init__(self, text: str) -> None:
        """`text` has addresses and networks with commas between them, or `*` for all. Raises
        UsageError.
        """
        named = [part.strip() for part in text.split(",") if part.strip()]
        self._is_any = "*" in named
        self._networks = [_network(name) for name in named if name != "*"]

    def trusts(self, address: str) -> bool:
        """Whether this address is that of a trusted proxy."""
        if self._is_any or not self._networks:
            return self._is_any
        found = _address(address)
        return found is not None and any(found in network for network in self._networks)

    def client(self, peer: str, forwarded: Sequence[bytes]) -> str:
        """Address of the client of the proxy `peer`, from all its `X-Forwarded-For`.

        Each proxy adds at the end who came to it, so the last one that is no trusted proxy is the
        client: what stands before, the client may have made up. What is no address ends the search.
        """
        hops = [hop.strip() for hop in b",".join(forwarded).decode("latin-1").split(",")]
        for hop in reversed(hops):
            found = _address(_without_port(hop))
            if found is None:
                return peer
            peer = str(found)
            if not self.trusts(peer):
                return peer
        return peer


def scheme_of(forwarded: Sequence[bytes], own: str) -> str:
    """How the client came to the nearest proxy, by its `X-Forwarded-Proto`; `own` if that says
    nothing.
    """
    named = b",".join(forwarded).decode("latin-1").lower().split(",")[-1].strip()
    return named if named in _SCHEMES else own


def plain_address(address: str) -> str:
    """An IPv4 address as such, also where a socket for both families shows it as one of IPv6."""
    return address.removeprefix("::ffff:") if "." in address else address


def _without_port(hop: str) -> str:
    """Some proxies add the client's port."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(plain_address(text))
    except ValueError:
        return None


def _network(text: str) -> _Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise UsageError(
            f"--forwarded-allow-ips: {text!r} is neither an address nor a network, nor *"
        ) from error
