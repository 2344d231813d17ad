"""Peers that are known by hearsay: addresses of `--peer`, mDNS, what members tell. Whom to dial, when, and how many. Pure.

Anyone on the LAN can tell of any number of peers, and many are told of that ended long ago. So dials are few at a time:
for all sources together, for each source, and for each address.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from meshserve.config import MeshConfig
from meshserve.wire.hello import MAX_ADDRESSES, PeerHint, PeerInfo

_MAX_UNDER_WAY, _MAX_OF_SOURCE, _MAX_AT_PLACE = 64, 32, 2
"""Dials at a time: in all, by what one source told, and at one address."""
_MAX_PER_S = 100
"""Dials begun in a second. A mesh of 50 peers that start at once is dialled in half a second."""
_SEED, _LOOKED_OUT_FOR = "--peer", "members that fell silent"
"""Sources beside mDNS and the incarnations of members."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Connect to this peer: try its addresses, say hello."""

    key: str
    addresses: tuple[str, ...]
    port: int
    incarnation: str | None


@dataclass(slots=True)
class _Candidate:
    """A peer to dial. `incarnation` is None for a seed, which is an address only."""

    addresses: tuple[str, ...]
    port: int
    incarnation: str | None
    source: str
    since_s: float
    next_dial_s: float
    num_failed_dials: int = 0
    is_dialling: bool = False
    led_to: str | None = None
    """The peer that a seed's address turned out to be."""

    @property
    def place(self) -> tuple[str, int]:
        return self.addresses[0], self.port


def backoff_s(num_failed: int, config: MeshConfig, rng: random.Random) -> float:
    """The pause after so many dials in vain: it doubles, is bounded, and is drawn from its upper half."""
    longest = min(config.redial_max_s, 0.1 * 2.0 ** min(num_failed, 10))
    return longest * (0.5 + rng.random() / 2)


class Hearsay:
    """The candidates. What is told of members and of peers that ended is kept out by the caller."""

    def __init__(self, config: MeshConfig, rng: random.Random) -> None:
        self._config, self._rng = config, rng
        self._candidates: dict[str, _Candidate] = {}
        self._begun_s: deque[float] = deque(maxlen=_MAX_PER_S)

    def seed(self, address: str, port: int, now_s: float) -> None:
        """An address from the command line: dialled for ever."""
        self._candidates.setdefault(f"{address}:{port}", _Candidate((address,), port, None, _SEED, now_s, now_s))

    def hint(self, hint: PeerHint, source: str, now_s: float) -> None:
        """`source` told that this peer is there. Beyond `max_hints` nothing is taken in."""
        known = self._candidates.get(hint.incarnation)
        if known is not None:
            known.addresses = tuple(dict.fromkeys((*hint.addresses, *known.addresses)))[: 2 * MAX_ADDRESSES]
            known.since_s = max(known.since_s, now_s)  # that of a peer that is looked out for lies ahead
        elif hint.addresses and len(self._candidates) < self._config.max_hints:
            self._candidates[hint.incarnation] = _Candidate(hint.addresses, hint.port, hint.incarnation, source, now_s, now_s)

    def look_out_for(self, info: PeerInfo, now_s: float) -> bool:
        """A member fell silent for good. Silence may end, as a link comes up again or a host wakes: so the peer is dialled on,
        for longer than others. False if there is no room."""
        if info.is_observer or len(self._candidates) >= self._config.max_hints:
            return False
        forget_late_s = now_s + self._config.forget_dead_s - self._config.forget_hint_s
        self._candidates[info.incarnation] = _Candidate(info.addresses, info.port, info.incarnation, _LOOKED_OUT_FOR, forget_late_s, now_s)
        return True

    def forget(self, incarnation: str) -> bool:
        """It is a member now, or has ended. Returns whether a dial is under way, which will be told under the same key."""
        candidate = self._candidates.pop(incarnation, None)
        return candidate is not None and candidate.is_dialling

    def network_changed(self, now_s: float) -> None:
        """What could not be reached may be reached now."""
        for candidate in self._candidates.values():
            candidate.num_failed_dials, candidate.next_dial_s = 0, now_s

    def due(self, now_s: float, is_known: Callable[[str | None, tuple[str, int]], bool]) -> Iterator[Dial]:
        """Dials that are due, marked as under way. `is_known(led_to, place)`: a seed leads to a member, and need not be asked."""
        under_way = [candidate for candidate in self._candidates.values() if candidate.is_dialling]
        of_source, at_place = Counter(candidate.source for candidate in under_way), Counter(candidate.place for candidate in under_way)
        num_left = _MAX_UNDER_WAY - len(under_way)
        # those that were tried least come first, so that a flood of hints that lead nowhere delays an honest one only once
        for key, candidate in sorted(self._candidates.items(), key=lambda item: (item[1].num_failed_dials, item[1].next_dial_s)):
            if num_left <= 0 or (len(self._begun_s) == _MAX_PER_S and now_s - self._begun_s[0] < 1.0):
                return
            if candidate.is_dialling or now_s < candidate.next_dial_s:
                continue
            if at_place[candidate.place] >= _MAX_AT_PLACE or (of_source[candidate.source] >= _MAX_OF_SOURCE and candidate.source != _SEED):
                continue
            if candidate.incarnation is None and is_known(candidate.led_to, candidate.place):
                continue
            candidate.is_dialling = True
            num_left -= 1
            of_source[candidate.source] += 1
            at_place[candidate.place] += 1
            self._begun_s.append(now_s)
            yield Dial(key, candidate.addresses, candidate.port, candidate.incarnation)

    def failed(self, key: str, now_s: float) -> None:
        """No address led to this peer."""
        candidate = self._candidates.get(key)
        if candidate is None:
            return
        candidate.is_dialling = False
        candidate.num_failed_dials += 1
        candidate.next_dial_s = now_s + backoff_s(candidate.num_failed_dials, self._config, self._rng)
        if candidate.incarnation is not None and now_s - candidate.since_s > self._config.forget_hint_s:
            del self._candidates[key]

    def found(self, key: str, incarnation: str, now_s: float) -> None:
        """A dial led to this peer. A seed is asked again only when the peer that it led to is gone."""
        candidate = self._candidates.get(key)
        if candidate is not None:
            candidate.is_dialling, candidate.num_failed_dials = False, 0
            candidate.next_dial_s = now_s + self._config.redial_max_s
            candidate.led_to = incarnation

    def answered(self, place: tuple[str, int], incarnation: str) -> None:
        """A dial to this place was answered by this peer: no other is there any more, and none is looked for there."""
        host, port = place
        for key, candidate in list(self._candidates.items()):
            if candidate.incarnation in (None, incarnation) or candidate.port != port or host not in candidate.addresses:
                continue
            candidate.addresses = tuple(address for address in candidate.addresses if address != host)
            if not candidate.addresses:
                del self._candidates[key]

    def places(self) -> Iterable[tuple[str, tuple[str, ...], int]]:
        """Incarnation, addresses and port of each candidate but the seeds."""
        for candidate in self._candidates.values():
            if candidate.incarnation is not None:
                yield candidate.incarnation, candidate.addresses, candidate.port
