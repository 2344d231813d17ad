"""Pages and names: which web pages may ask this frontend, and under which host names it may be asked. Pure."""

import ipaddress
from collections.abc import Mapping, Sequence

Headers = Mapping[bytes, bytes]

_PREFLIGHT_S = b"600"
_ANY = "*"
_EXPOSED = b"x-request-id, retry-after"


class Origins:
    """The CORS policy: off for all but those who were named."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(origin.encode() for origin in allowed)
        self._is_any = _ANY in allowed

    def __bool__(self) -> bool:
        """Whether any page may ask."""
        return bool(self._allowed)

    def allows(self, origin: bytes) -> bool:
        """Whether pages of this origin may ask."""
        return self._is_any or origin in self._allowed

    def headers(self, origin: bytes | None) -> list[tuple[bytes, bytes]]:
        """Of every response: it depends on who asks, so that caches must not mix them up."""
        vary = [(b"vary", b"Origin")]
        if origin is None or not self.allows(origin):
            return vary
        return [*vary, (b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]

    def preflight_headers(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """Of the answer to a browser that asks whether it may ask, besides `headers`. No cookies: pages of others come with a key."""
        if not self.allows(headers.get(b"origin", b"")):
            return []
        asked = headers.get(b"access-control-request-headers", b"authorization, content-type")
        methods = (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS")
        return [methods, (b"access-control-allow-headers", asked), (b"access-control-max-age", _PREFLIGHT_S)]


def is_preflight(method: str, headers: Headers) -> bool:
    """A browser's question before a request (Fetch standard, section 4.8)."""
    return method == "OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers


def is_same_origin(scheme: str, headers: Headers) -> bool:
    """The request comes from a page of this very server. Without a word of the browser's about it, it does not."""
    site = headers.get(b"sec-fetch-site")
    origin = headers.get(b"origin")
    if origin is not None and origin != scheme.encode() + b"://" + headers.get(b"host", b""):
        return False
    return site == b"same-origin" if site is not None else origin is not None


def is_cross_site(headers: Headers) -> bool:
    """The browser says that another site's page sent it."""
    return headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site")


def is_name_of_loopback(host: bytes, allowed: Sequence[str]) -> bool:
    """Whether a `Host` header can be trusted not to be a stranger's name that was pointed at 127.0.0.1 (DNS rebinding).

    Addresses are none of anybody's names, and a name without a dot or under `localhost` or `internal` is no website's.
    """
    name = host.decode("latin-1").lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    name = name.rstrip(".")
    if "." not in name or name in allowed or name.endswith((".localhost", ".internal")):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether what is bound here can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
