"""What is printed for people: tables that fit the width, and text that cannot steer the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from meshserve.telemetry import printable

_GAP = 2
_NARROWEST = 6

Cell = str | tuple[str, str]
"""Text, or text and a style."""


class Output(Console):
    """stdout or stderr. Raises BrokenPipeError if the reader ended, as `head` does: rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich."""
        raise BrokenPipeError


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    title: str
    rank: int = 0
    """If the width does not hold all columns, the highest rank is left out first; rank 0 never is."""
    is_number: bool = False
    """Aligned to the right, and never narrowed."""


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int | None = None
) -> list[Text]:
    """The head and a line for each row, at most `width` cells wide; None: as wide as needed."""
    lines = [[_text((column.title, "bold")) for column in columns]]
    lines += [[_text(cell) for cell in row] for row in rows]
    widths = [max(cell.cell_len for cell in cells) for cells in zip(*lines, strict=True)]
    shown = _fitting(columns, widths, width)
    for line in lines:
        for index in shown:
            line[index].align("right" if columns[index].is_number else "left", widths[index])
    gap = Text(" " * _GAP, no_wrap=True)
    joined = [gap.join(line[index] for index in shown) for line in lines]
    for text in joined:
        text.rstrip()
    return joined


def _text(cell: Cell) -> Text:
    text, style = (cell, "") if isinstance(cell, str) else cell
    return Text(printable(text), style, overflow="ellipsis")


def _fitting(columns: Sequence[Column], widths: list[int], width: int | None) -> list[int]:
    """Indexes of the columns that stay; narrows columns of text if there are still too many."""
    shown = list(range(len(columns)))
    if width is None:
        return shown

    def excess() -> int:
        return sum(widths[index] for index in shown) + _GAP * (len(shown) - 1) - width

    while excess() > 0 and any(columns[index].rank for index in shown):
        shown.remove(max(shown, key=lambda index: (columns[index].rank, index)))
    texts = [index for index in shown if not columns[index].is_number]
    while excess() > 0 and texts:
        widest = max(texts, key=lambda index: widths[index])
        if widths[widest] <= _NARROWEST:
            break
        widths[widest] = max(_NARROWEST, widths[widest] - excess())
    return shown


def duration(seconds: float | None) -> str:
    """For people, in at most six cells: `4 s`, `12 min`, `3 h`, `2 d`."""
    if seconds is None:
        return "-"
    for limit, unit_s, unit in ((60.0, 1.0, "s"), (3600.0, 60.0, "min"), (86_400.0, 3600.0, "h")):
        if seconds < limit:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
