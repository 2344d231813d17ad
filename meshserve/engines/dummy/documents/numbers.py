"""Some numbers that a schema allows, as JSON."""

from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from math import ceil, floor, log10
from typing import Any

_MOST_SAMPLES = 12
_WINDOW = 98
"""How far samples reach from a bound where there is no other one."""
_DIGITS = 300
"""Enough to write any number that a schema may name, and its product with a small one, exactly."""
_WIDE = 4
"""Above this distance of the bounds, halves are fine enough."""


def sample_numbers(schema: dict[str, Any], is_integer: bool, admits: Callable[[Any], bool]) -> list[bytes]:
    """Texts of up to a dozen numbers within `minimum`, `maximum` and so on that `admits` confirms; none if there is none to be found.

    Numbers are as `keywords` lets them through.
    """
    low, is_low_open = _bound(schema, "minimum", "exclusiveMinimum", max)
    high, is_high_open = _bound(schema, "maximum", "exclusiveMaximum", min)
    step = _step(schema, is_integer, low, high)
    texts = list(map(_written, _multiples(step, low, is_low_open, high, is_high_open)))
    found = [text for text in texts if admits(_read(text))]
    if found or is_integer or low is None or high is None:
        return found
    # too narrow for any step: its ends and its middle as they are
    return [text for text in (repr(float(value)).encode() for value in (low, high, (low + high) / 2)) if admits(_read(text))]


def _bound(schema: dict[str, Any], closed: str, open_: str, tighter: Callable[..., Fraction]) -> tuple[Fraction | None, bool]:
    """The bound, if there is one, and whether it is excluded itself."""
    values = [_exact(schema[key]) for key in (closed, open_) if key in schema]
    if not values:
        return None, False
    value = tighter(values)
    return value, open_ in schema and _exact(schema[open_]) == value


def _exact(value: float) -> Fraction:
    return Fraction(repr(value))


def _step(schema: dict[str, Any], is_integer: bool, low: Fraction | None, high: Fraction | None) -> Fraction:
    """The distance between samples, or a part of it."""
    if "multipleOf" in schema:
        step = _exact(schema["multipleOf"])
        return Fraction(step.numerator) if is_integer else step
    if is_integer:
        return Fraction(1)
    width = float(high - low) if low is not None and high is not None else _WIDE
    return Fraction(1, 2) if width >= _WIDE or width <= 0 else Fraction(10) ** (floor(log10(width)) - 1)


def _multiples(step: Fraction, low: Fraction | None, is_low_open: bool, high: Fraction | None, is_high_open: bool) -> list[Fraction]:
    """Multiples of `step` within the bounds, spread evenly."""
    first = None if low is None else low / step
    last = None if high is None else high / step
    start = None if first is None else floor(first) + 1 if is_low_open else ceil(first)
    end = None if last is None else ceil(last) - 1 if is_high_open else floor(last)
    if start is None:
        start = 0 if end is None else end - _WINDOW
    if end is None:
        end = start + _WINDOW
    count = min(_MOST_SAMPLES, end - start + 1)
    return [step * (start + (end - start) * index // max(1, count - 1)) for index in range(count)]


def _written(number: Fraction) -> bytes:
    if number.denominator == 1:
        return b"%d" % number.numerator
    with localcontext() as context:
        context.prec = _DIGITS
        return f"{Decimal(number.numerator) / number.denominator:f}".encode()


def _read(text: bytes) -> int | float:
    return float(text) if b"." in text or b"e" in text else int(text)
