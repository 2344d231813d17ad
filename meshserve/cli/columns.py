"""Tables that fit: columns that matter less go first where the width does not hold all. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

_GAP = 2
_NARROWEST = 6

Cell = str | tuple[str, str]
"""Text, or text and a style."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    title: str
    rank: int = 0
    """Where it is too narrow for all, the highest rank is left out first; those of rank 0 are never."""
    is_number: bool = False
    """Aligned to the right."""


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int | None = None) -> list[Text]:
    """The head and a line for each row, at most `width` cells wide; None is as wide as it takes. Cells cannot steer the terminal."""
    texts = [[plain(cell if isinstance(cell, str) else cell[0]) for cell in row] for row in rows]
    styles = [["" if isinstance(cell, str) else cell[1] for cell in row] for row in rows]
    widths = [
        max(cell_len(column.title), *(cell_len(row[index]) for row in texts)) if texts else cell_len(column.title)
        for index, column in enumerate(columns)
    ]
    shown = _fitting(columns, widths, width)
    head = _line([(columns[index].title, "bold", columns[index].is_number, widths[index]) for index in shown])
    lines = [
        _line([(row[index], style[index], columns[index].is_number, widths[index]) for index in shown])
        for row, style in zip(texts, styles, strict=True)
    ]
    return [head, *lines]


def _fitting(columns: Sequence[Column], widths: list[int], width: int | None) -> list[int]:
    """Indexes of the columns that stay; those of text are narrowed at last."""
    shown = list(range(len(columns)))
    if width is None:
        return shown

    def too_much() -> int:
        return sum(widths[index] for index in shown) + _GAP * (len(shown) - 1) - width

    while too_much() > 0 and any(columns[index].rank for index in shown):
        shown.remove(max(shown, key=lambda index: (columns[index].rank, index)))
    while too_much() > 0:
        widest = max((index for index in shown if not columns[index].is_number), key=lambda index: widths[index], default=None)
        if widest is None or widths[widest] <= _NARROWEST:
            break
        widths[widest] = max(_NARROWEST, widths[widest] - too_much())
    return shown


def _line(cells: list[tuple[str, str, bool, int]]) -> Text:
    line = Text(no_wrap=True)
    for position, (text, style, is_number, width) in enumerate(cells):
        cell = Text(text, style)
        cell.truncate(width, overflow="ellipsis")
        padding = " " * (width - cell.cell_len)
        is_last = position == len(cells) - 1
        line.append(" " * (_GAP if position else 0) + (padding if is_number else ""))
        line.append_text(cell)
        line.append("" if is_number or is_last else padding)
    return line


def plain(text: str) -> str:
    """Without what could steer a terminal."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


def duration(seconds: float | None) -> str:
    """For people, in at most six cells: `4 s`, `12 min`, `3.5 h`, `2 d`."""
    if seconds is None:
        return "-"
    for limit, unit_s, unit in ((60.0, 1.0, "s"), (3600.0, 60.0, "min"), (86_400.0, 3600.0, "h")):
        if seconds < limit:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
