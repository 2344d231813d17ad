"""Which evicted blocks are asked for again, and when a prefix is worth a copy on another worker. Pure."""

from collections.abc import Iterable, Sequence
from math import exp2

_PRIOR_EVICTIONS = 200.0
_PRIOR_REGRET = 0.3
"""Counts as so many evictions, until there are real ones: caches exist since things come back."""
_HALVINGS = 12.0
"""Of rent, while all caches are replaced once. More keeps copies for what is in demand now, fewer makes them earlier."""

_MAX_PREFIXES = 8192
"""Prefixes whose rent is remembered. More cost memory (100 bytes each), fewer forget a prefix that is asked for now and then."""


class Regret:
    """A ghost list: the hashes evicted lately, of which no worker holds a copy any more.

    The idea is the ghost lists of ARC (Megiddo and Modha, FAST 2003). Two generations take turns instead of one
    queue: dropping the older is one step. `capacity` is how many evicted blocks are remembered: as many as all
    caches hold, so that "again" means within one more lifetime of a cached block.
    """

    def __init__(self) -> None:
        self._young: dict[int, None] = {}
        self._old: dict[int, None] = {}
        self._num_evicted = _PRIOR_EVICTIONS
        self._num_regretted = _PRIOR_EVICTIONS * _PRIOR_REGRET
        self.capacity = 2

    @property
    def share(self) -> float:
        """Of evicted blocks, those that were asked for again: 0 to 1."""
        return self._num_regretted / self._num_evicted

    def evicted(self, lost: Iterable[int], num_copies: int) -> None:
        """No worker holds these blocks now; of `num_copies` more evicted blocks, a copy remains elsewhere."""
        before = len(self._young)
        self._young.update(dict.fromkeys(lost))
        self._num_evicted += len(self._young) - before + num_copies
        if len(self._young) * 2 >= self.capacity:
            self._old, self._young = self._young, {}
        # older evictions count less: the demand changes
        if self._num_evicted > max(self.capacity, 10 * _PRIOR_EVICTIONS):
            self._num_evicted /= 2
            self._num_regretted /= 2

    def asked(self, hashes: Sequence[int], num_held: int) -> None:
        """A prompt has these blocks, and no worker holds more than the first `num_held`."""
        for place in range(num_held, len(hashes)):
            block_hash = hashes[place]
            if block_hash in self._young:
                del self._young[block_hash]
            elif block_hash in self._old:
                del self._old[block_hash]
            else:
                break  # a prefix ends where it was first cut off
            self._num_regretted += 1


class Replication:
    """Rent or buy: the rent paid for each prefix, which is named by the hash of its last block.

    A request pays rent if it is sent where its prefix lies and waits there longer than a less busy worker would
    have kept it waiting if it held the prefix too. A copy is bought once the rent that others paid for the
    prefix has reached its price: what computing it again, and what that evicts, costs this one request more.
    Rent and price together are at most twice the cost with foreknowledge (Karlin, Manasse, Rudolph and Sleator,
    "Competitive snoopy caching", Algorithmica 1988).

    Two things differ from the theorem. A copy does not live for ever: rent fades with every block that is
    evicted. And a prefix that was copied lately is in demand, so its next copy is bought the sooner.
    """

    def __init__(self) -> None:
        self._paid: dict[int, tuple[float, float, float]] = {}  # rent in ms, copies bought, and the age at which both were true
        self._age = 0.0

    def evicted(self, share: float) -> None:
        """So much of all caches has been replaced."""
        self._age += share

    def is_due(self, prefix: int, rent_ms: float, price_ms: float) -> bool:
        """Whether this request should make a copy, at `price_ms`, instead of paying `rent_ms`; keeps account."""
        paid_ms, num_copies, age = self._paid.pop(prefix, (0.0, 0.0, self._age))
        fade = exp2((age - self._age) * _HALVINGS)
        paid_ms, num_copies = paid_ms * fade, num_copies * fade
        is_due = paid_ms * (1 + num_copies) > price_ms
        found = (0.0, num_copies + 1, self._age) if is_due else (paid_ms + max(0.0, rent_ms), num_copies, self._age)
        if is_due or found[0]:
            self._paid[prefix] = found  # the newest last: the prefix that was not asked for longest is forgotten first
            if len(self._paid) > _MAX_PREFIXES:
                del self._paid[next(iter(self._paid))]
        return is_due
