"""Who may ask: API keys, the sessions of browsers that showed one, and how often one may guess. Pure; times are of one monotonic clock."""

import hashlib
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Sequence

SESSION_COOKIE = "meshserve_session"

_MAX_GUESSERS = 4096
_MAX_SESSIONS_ENDED = 4096
_FREE_GUESSES = 5
_GUESS_EVERY_S = 10.0


class KeyRing:
    """The keys that are good, as digests under a secret of this process: comparing takes the same time whatever is shown."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._secret = secrets.token_bytes(32)
        self._digests = [self._digest(key.encode()) for key in dict.fromkeys(keys)]

    def __bool__(self) -> bool:
        """Whether any key is asked for."""
        return bool(self._digests)

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._secret, digest_size=32).digest()

    def find(self, shown: bytes) -> int | None:
        """Which key this is. All are compared, whichever it is."""
        digest = self._digest(shown)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return matches.index(True) if any(matches) else None


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
