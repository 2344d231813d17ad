"""Who may ask: API keys, sessions of browsers, limits on guessing, and the pages and host names that are let in. Pure.

Times are of one monotonic clock.
"""

import hashlib
import hmac
import ipaddress
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence

Headers = Mapping[bytes, bytes]

OWNER_BYTES = 16
SESSION_COOKIE = "meshserve_session"

_MAX_GUESSERS = 4096
_MAX_SESSIONS_ENDED = 4096
_FREE_GUESSES = 5
_GUESS_EVERY_S = 10.0
_PREFLIGHT_S = b"600"
_EXPOSED = b"x-request-id, retry-after"


class KeyRing:
    """The keys that are good, as digests under a secret of this process: comparing takes the same time whatever is shown."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._secret = secrets.token_bytes(32)
        self._digests = [self._digest(key.encode()) for key in dict.fromkeys(keys)]

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._secret, digest_size=32).digest()

    def find(self, shown: bytes) -> int | None:
        """Which key this is. All are compared, whichever it is."""
        digest = self._digest(shown)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return matches.index(True) if any(matches) else None


def owner_of(secret: bytes, key: str) -> bytes:
    """Whose what is kept for a client with this key is, as peers are told: 16 bytes that say nothing about the key."""
    return hmac.digest(secret, key.encode(), "sha256")[:OWNER_BYTES]


class Sessions:
    """What a browser holds instead of a key: which key was shown and until when, signed with a secret of this process."""

    def __init__(self, lifetime_s: float) -> None:
        self._lifetime_s = lifetime_s
        self._secret = secrets.token_bytes(32)
        self._ended: OrderedDict[str, float] = OrderedDict()

    def begin(self, key: int, now_s: float) -> str:
        """A token for a cookie."""
        claim = f"{key}.{int(now_s + self._lifetime_s)}.{secrets.token_hex(8)}"
        return f"{claim}.{self._sign(claim)}"

    def find(self, token: str, now_s: float) -> int | None:
        """The key that was shown for it; None if it is forged, over or ended."""
        claim, _, signature = token.rpartition(".")
        if not hmac.compare_digest(self._sign(claim).encode(), signature.encode()) or token in self._ended:
            return None
        key, until_s, _ = claim.split(".")
        return int(key) if now_s < int(until_s) else None

    def end(self, token: str, now_s: float) -> None:
        """It is good no more. Only what was good is remembered, and only while it would be."""
        if self.find(token, now_s) is None:
            return
        self._ended[token] = now_s + self._lifetime_s
        while len(self._ended) > _MAX_SESSIONS_ENDED or next(iter(self._ended.values())) < now_s:
            self._ended.popitem(last=False)

    def _sign(self, claim: str) -> str:
        return hmac.new(self._secret, claim.encode(), hashlib.sha256).hexdigest()


class Guesses:
    """Wrong keys by address: a few are free, then one in a while. Those who guessed longest ago are forgotten first."""

    def __init__(self) -> None:
        self._debts_s: OrderedDict[str, float] = OrderedDict()
        """By address: when all of its guesses will have been waited for."""

    def wait_s(self, address: str, now_s: float) -> float:
        """Until it may guess again; 0 if it may now."""
        debt_s = self._debts_s.get(address, now_s) - now_s
        return max(0.0, debt_s - (_FREE_GUESSES - 1) * _GUESS_EVERY_S)

    def was_wrong(self, address: str, now_s: float) -> None:
        """One more wrong guess."""
        self._debts_s[address] = max(now_s, self._debts_s.get(address, now_s)) + _GUESS_EVERY_S
        self._debts_s.move_to_end(address)
        while len(self._debts_s) > _MAX_GUESSERS:
            self._debts_s.popitem(last=False)

    def was_right(self, address: str) -> None:
        """It knows a key."""
        self._debts_s.pop(address, None)


# --- pages and names


class Origins:
    """The CORS policy: off for all but those who were named. `http://localhost:*` names all ports of a host."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(origin.encode() for origin in allowed)
        self._hosts = frozenset(origin.removesuffix(":*").encode() for origin in allowed if origin.endswith(":*"))
        """With their schemes."""
        self._is_any = "*" in allowed

    def allows(self, origin: bytes) -> bool:
        """Whether pages of this origin may ask."""
        return self._is_any or origin in self._allowed or (bool(self._hosts) and _without_port(origin) in self._hosts)

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


def _without_port(origin: bytes) -> bytes:
    host, colon, port = origin.rpartition(b":")
    return host if colon and port.isdigit() else origin


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
    name = name_of(host)
    if "." not in name or name in allowed or name.endswith((".localhost", ".internal")):
        return True
    if host.decode("latin-1").lower() in allowed:  # with its port
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def name_of(host: bytes) -> str:
    """The name or address in a `Host` header, without port."""
    name = host.decode("latin-1").lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return name.rstrip(".")


def is_loopback(host: str) -> bool:
    """Whether what is bound here can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
