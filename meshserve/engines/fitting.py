"""A line through measured times, by which the next ones are forecast. Pure."""

_MEMORY_STEPS = 1000.0
"""Steps after which an observation counts for a third: long enough for a line through them, short enough to follow another load."""

_FIRST_MEMORY_STEPS = 4.0
"""The same of the first steps, which are slow: caches are cold, pages are touched for the first time. With
each step the memory becomes half a step longer, so that the first steps are soon outweighed. Lower forgets
them sooner, and lets noise in."""


class Line:
    """y = base + slope x by least squares; a point counts for a third once `memory` others came after it, and
    the first points for less.

    Where all x are alike, all of y is slope, or all of it base (`is_flat`).
    """

    def __init__(self, memory: float = _MEMORY_STEPS, is_flat: bool = False) -> None:
        self._memory, self._longest_memory, self._is_flat = min(memory, _FIRST_MEMORY_STEPS), memory, is_flat
        self._keep = 1 - 1 / self._memory
        self.num_added = 0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        """One more point."""
        keep = self._keep
        self.num_added += 1
        self._weight = self._weight * keep + 1
        self._x = self._x * keep + x
        self._y = self._y * keep + y
        self._xx = self._xx * keep + x * x
        self._xy = self._xy * keep + x * y
        if self._memory < self._longest_memory:
            self._memory += 0.5
            self._keep = 1 - 1 / self._memory

    def fade(self, share: float) -> None:
        """Points so far count for so much less against those that come."""
        self._weight *= share
        self._x *= share
        self._y *= share
        self._xx *= share
        self._xy *= share

    @property
    def mean_x(self) -> float:
        """0 without points."""
        return self._x / self._weight if self._weight else 0.0

    def fit(self) -> tuple[float, float]:
        """Base and slope, neither negative; 0 without points."""
        if not self._weight:
            return 0.0, 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        slope = 0.0 if self._is_flat or not mean_x else mean_y / mean_x
        if variance > 0.01 * mean_x * mean_x:
            slope = max(0.0, (self._xy / self._weight - mean_x * mean_y) / variance)
        base = mean_y - slope * mean_x
        return (base, slope) if base >= 0 else (0.0, mean_y / mean_x)
