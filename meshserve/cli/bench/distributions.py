"""Lengths of prompts and outputs, drawn from a distribution. Pure."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from meshserve.errors import UsageError

FORMS = "N | uniform:LOW:HIGH | normal:MEAN:DEVIATION | lognormal:MEDIAN:SIGMA"
MAX_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts from 1 to 1,000,000."""

    text: str
    """As it was asked for."""
    draw_raw: Callable[[random.Random], float]

    def draw(self, rng: random.Random) -> int:
        """The next one."""
        return max(1, min(MAX_TOKENS, round(self.draw_raw(rng))))


def parse_lengths(text: str) -> Lengths:
    """One of :data:`FORMS`; `lognormal` takes the median and the standard deviation of the logarithm. Raises UsageError."""
    kind, *parts = text.split(":")
    try:
        if not parts:
            kind, parts = "fixed", [kind]
        numbers = [float(part) for part in parts]
    except ValueError as exc:
        raise UsageError(f"{text!r} is no distribution of lengths: {FORMS}") from exc
    draw = _draw(kind, numbers)
    if draw is None:
        raise UsageError(f"{text!r} is no distribution of lengths: {FORMS}")
    return Lengths(text, draw)


def _draw(kind: str, numbers: list[float]) -> Callable[[random.Random], float] | None:
    if not all(math.isfinite(number) and 0 <= number <= MAX_TOKENS for number in numbers):
        return None
    match kind, numbers:
        case "fixed", [count] if count >= 1:
            return lambda rng: count
        case "uniform", [low, high] if 1 <= low <= high:
            return lambda rng: rng.randint(math.ceil(low), math.floor(high))
        case "normal", [mean, deviation] if mean >= 1:
            return lambda rng: rng.gauss(mean, deviation)
        case "lognormal", [median, sigma] if median >= 1 and sigma <= 10:
            return lambda rng: rng.lognormvariate(math.log(median), sigma)
    return None
