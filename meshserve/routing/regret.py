"""How often what a cache pushed out is asked for again: what an eviction costs, measured. Pure."""

from collections.abc import Iterable, Sequence

_PRIOR_EVICTIONS = 200.0
_PRIOR_REGRET = 0.3
"""Counts as so many evictions, until there are real ones: caches exist since things come back."""


class Regret:
    """A ghost list: the hashes evicted lately, of which nobody holds a copy any more.

    The idea is the ghost lists of ARC (Megiddo and Modha, FAST 2003). Two generations take turns instead of one queue: dropping the
    older is one step, and dicts of integers are not walked by the garbage collector. `capacity` is how many evicted blocks are
    remembered: as many as all caches hold, so that "again" means within one more lifetime of a cached block.
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
        """These blocks are held nowhere now; of `num_copies` more, a copy remains elsewhere, and nobody will miss them."""
        before = len(self._young)
        self._young.update(dict.fromkeys(lost))
        self._num_evicted += len(self._young) - before + num_copies
        if len(self._young) * 2 >= self.capacity:
            self._old, self._young = self._young, {}
        if self._num_evicted > max(self.capacity, 10 * _PRIOR_EVICTIONS):
            self._num_evicted /= 2
            self._num_regretted /= 2

    def asked(self, hashes: Sequence[int], num_held: int) -> None:
        """A prompt has these blocks, and nobody holds more than the first `num_held`."""
        for place in range(num_held, len(hashes)):
            block_hash = hashes[place]
            if block_hash in self._young:
                del self._young[block_hash]
            elif block_hash in self._old:
                del self._old[block_hash]
            else:
                break  # a prefix ends where it was first cut off
            self._num_regretted += 1
