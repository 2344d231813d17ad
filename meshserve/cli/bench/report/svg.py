"""Plots as SVG text: axes with round numbers, lines, dots, intervals. Colours are CSS classes: one page for light, dark and paper."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 88, 14, 14, 44
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to pixels."""

    low: float
    high: float
    label: str
    is_log: bool = False
    is_share: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.is_log:
            return (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers within."""
        found = log_ticks(self.low, self.high) if self.is_log else linear_ticks(self.low, self.high)
        return found or [self.low, self.high]

    def show(self, value: float) -> str:
        """A tick's label."""
        return f"{value * 100:g} %" if self.is_share else f"{value:,.6g}"


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or powers alone where those would be many; even steps where all is of one magnitude."""
    if high / low < 8:
        return linear_ticks(low, high)
    factors = (1, 2, 5) if high / low < 2000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def axis_for(values: Iterable[float], label: str, is_log: bool = False, is_from_zero: bool = True) -> Axis:
    """One that has room for all these values."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)] or [1.0]
    low, high = min(known), max(known)
    if is_log:
        return Axis(low / 1.1, max(high, low * 1.5) * 1.1, label, is_log=True)
    if is_from_zero:
        low = min(0.0, low)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Axis(low if is_from_zero else low - margin, high + margin, label)


class Plot:
    """One picture. Things are drawn in the order in which they are added."""

    def __init__(self, title: str, x: Axis, y: Axis, width: int = 560, height: int = 300) -> None:
        self._title, self._x, self._y, self._width, self._height = title, x, y, width, height
        self._parts: list[str] = []
        self._legend: list[tuple[str, str]] = []

    def _at(self, x: float, y: float) -> tuple[float, float]:
        inner_width, inner_height = self._width - _LEFT - _RIGHT, self._height - _TOP - _BOTTOM
        return _LEFT + self._x.place(x) * inner_width, _TOP + (1 - self._y.place(y)) * inner_height

    def line(self, points: Points, colour: str, name: str = "", is_stepped: bool = False) -> None:
        """Joined, where they are finite; stepped as a distribution is."""
        path, is_begun = [], False
        known = [point for point in points if all(map(math.isfinite, point))]
        if len(known) == 1:
            self.dots(known, colour, name)
            return
        for x, y in points:
            if not (math.isfinite(x) and math.isfinite(y)):
                is_begun = False
                continue
            left, top = self._at(x, y)
            if not is_begun:
                path.append(f"M{left:.1f} {top:.1f}")
            else:
                path.append(f"H{left:.1f}V{top:.1f}" if is_stepped else f"L{left:.1f} {top:.1f}")
            is_begun = True
        self._parts.append(f'<path class="line {colour}" d="{"".join(path)}"/>')
        self._named(name, colour)

    def dots(self, points: Points, colour: str, name: str = "", titles: Sequence[str] = ()) -> None:
        """One for each; a title is shown under the pointer."""
        for number, (x, y) in enumerate(points):
            if math.isfinite(x) and math.isfinite(y):
                left, top = self._at(x, y)
                title = f"<title>{escape(titles[number])}</title>" if number < len(titles) else ""
                self._parts.append(f'<circle class="dot {colour}" cx="{left:.1f}" cy="{top:.1f}" r="3.5">{title}</circle>')
        self._named(name, colour)

    def mark(self, x: float, y: float, text: str) -> None:
        """A ring with words under it, or over it, on the side that has room."""
        left, top = self._at(x, y)
        word_top = top + 24 if top < self._height - _BOTTOM - 30 else top - 14
        is_right = left > self._width * 0.6
        anchor, shift = ("end", -10) if is_right else ("start", 10)
        self._parts.append(f'<circle class="ring" cx="{left:.1f}" cy="{top:.1f}" r="8"/>')
        self._parts.append(f'<text class="word" x="{left + shift:.1f}" y="{word_top:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def vertical(self, x: float) -> None:
        """A dashed line over the whole height."""
        left, _ = self._at(x, self._y.low)
        self._parts.append(f'<path class="dashed" d="M{left:.1f} {_TOP}V{self._height - _BOTTOM}"/>')

    def interval(self, low: float, high: float, middle: float, y: float, colour: str) -> None:
        """A horizontal bar with a dot in it."""
        left, top = self._at(low, y)
        right, _ = self._at(high, y)
        centre, _ = self._at(middle, y)
        self._parts.append(f'<path class="thick {colour}" d="M{left:.1f} {top:.1f}H{max(right, left + 1):.1f}"/>')
        self._parts.append(f'<circle class="dot {colour}" cx="{centre:.1f}" cy="{top:.1f}" r="4.5"/>')

    def _named(self, name: str, colour: str) -> None:
        if name and (name, colour) not in self._legend:
            self._legend.append((name, colour))

    def render(self, y_names: Sequence[tuple[float, str]] | None = None) -> str:
        """The figure with its title and legend; `y_names` instead of numbers on the vertical axis."""
        legend = "".join(f'<span class="key {colour}">{escape(name)}</span>' for name, colour in self._legend)
        picture = (
            f'<svg viewBox="0 0 {self._width} {self._height}" role="img" aria-label="{escape(self._title)}">'
            f"{self._x_axis()}{self._y_axis(y_names)}{''.join(self._parts)}</svg>"
        )
        return f"<figure><figcaption><b>{escape(self._title)}</b> {legend}</figcaption>{picture}</figure>"

    def _x_axis(self) -> str:
        bottom = self._height - _BOTTOM
        parts = []
        for tick in self._x.ticks():
            left, _ = self._at(tick, self._y.low)
            parts.append(f'<path class="grid" d="M{left:.1f} {_TOP}V{bottom}"/>')
            parts.append(f'<text x="{left:.1f}" y="{bottom + 16}" text-anchor="middle">{self._x.show(tick)}</text>')
        middle = (_LEFT + self._width - _RIGHT) / 2
        parts.append(f'<text class="label" x="{middle:.0f}" y="{self._height - 6}" text-anchor="middle">{escape(self._x.label)}</text>')
        return "".join(parts)

    def _y_axis(self, names: Sequence[tuple[float, str]] | None) -> str:
        parts = []
        for tick, text in names if names is not None else [(tick, self._y.show(tick)) for tick in self._y.ticks()]:
            _, top = self._at(self._x.low, tick)
            parts.append(f'<path class="grid" d="M{_LEFT} {top:.1f}H{self._width - _RIGHT}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{top + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        if self._y.label:
            middle = (_TOP + self._height - _BOTTOM) / 2
            turned = f'transform="rotate(-90 12 {middle:.0f})"'
            parts.append(f'<text class="label" x="12" y="{middle:.0f}" {turned} text-anchor="middle">{escape(self._y.label)}</text>')
        return "".join(parts)
