"""`meshserve top`: what every peer is doing, live."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from meshserve.cli.activities import Activity, Samples, sparkline
from meshserve.cli.columns import Cell, Column, duration, table
from meshserve.cli.options import mesh_config, mesh_options, option
from meshserve.cli.peers import STATE_STYLES
from meshserve.cli.running import execute
from meshserve.cli.trace import waterfall
from meshserve.errors import RequestNotFound
from meshserve.telemetry import Histogram, printable

if TYPE_CHECKING:
    from meshserve.mesh.mesh import Mesh

_BAR_CELLS = 10
_PAGE = 10


@click.command()
@option("--interval", type=click.FloatRange(0.2, 60), default=1.0, help="Seconds between two looks.")
@mesh_options
def top(interval: float, **settings: Any) -> None:
    """Watch what every peer is doing: batch, queue, cache, tokens a second, latencies. `q` quits."""
    execute(settings, lambda: _top(settings, interval))


async def _top(settings: dict[str, Any], interval_s: float) -> int:
    from meshserve.cli.observing import observer, settle
    from meshserve.cli.terminal import run_view

    async with observer(mesh_config(settings)) as mesh:
        await settle(mesh)
        await run_view(TopView(mesh), interval_s)
    return 0


@dataclass(frozen=True, slots=True)
class _Field:
    """One column: the value of a peer in it, by which the column sorts, and how the value shows."""

    column: Column
    value: Callable[[Activity], Any]
    show: Callable[[Any], Cell]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.0f}%"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _bar(shares: tuple[float, ...]) -> str:
    """Of the KV pool: what running sequences use, and what is cached for prompts with the same prefix."""
    if not shares:
        return "-"
    used = round(min(1.0, shares[0]) * _BAR_CELLS)
    cached = min(_BAR_CELLS - used, round(shares[1] * _BAR_CELLS))
    return "█" * used + "▒" * cached + "·" * (_BAR_CELLS - used - cached)


def _pair(values: tuple[float, float] | None, index: int) -> float | None:
    return values[index] if values else None


def _numeric(title: str, rank: int, value: Callable[[Activity], float | None], show: Callable[[float | None], str] = _number) -> _Field:
    return _Field(Column(title, rank, is_number=True), value, show)


_FIELDS = (
    _Field(Column("PEER"), lambda found: found.peer["name"], str),
    _Field(Column("ROLES", 7), lambda found: found.peer["roles"], ",".join),
    _Field(Column("STATE"), lambda found: found.peer["state"], lambda state: (state, STATE_STYLES.get(state, "dim"))),
    _numeric("BATCH", 0, lambda found: found.num_running),
    _numeric("WAIT", 1, lambda found: found.num_waiting),
    _numeric("QUEUE", 1, lambda found: found.num_tickets),
    _numeric("TOK/S", 0, lambda found: found.tokens_per_s),
    _numeric("PROMPT/S", 2, lambda found: found.prompt_tokens_per_s),
    _numeric("HIT", 1, lambda found: found.hit_share, _percent),
    _numeric("KV", 1, lambda found: None if found.used_share is None else found.used_share + (found.cached_share or 0.0), _percent),
    _Field(Column("USED▒CACHED", 5), lambda found: () if found.used_share is None else (found.used_share, found.cached_share or 0.0), _bar),
    _numeric("TTFT", 3, lambda found: _pair(found.ttft_ms, 0), _milliseconds),
    _numeric("p99", 5, lambda found: _pair(found.ttft_ms, 1), _milliseconds),
    _numeric("ITL", 4, lambda found: _pair(found.itl_ms, 0), _milliseconds),
    _numeric("p99", 6, lambda found: _pair(found.itl_ms, 1), _milliseconds),
    _numeric("RTT", 8, lambda found: found.peer["rtt_ms"], _milliseconds),
)


class TopView:
    """Activities of all peers, sorted; or everything about one."""

    def __init__(self, mesh: "Mesh") -> None:
        self._mesh = mesh
        self._samples = Samples()
        self._activities: list[Activity] = []
        self._sort_by, self._is_reversed = 0, False
        self._selected: str | None = None
        """Incarnation: the selection stays with its peer when the order changes."""
        self._is_detailed = False
        self._scrolled = 0
        self._traces, self._is_trace_due = False, False
        self._recent: list[str] = []
        """Requests that had ended last when `t` was pressed, the latest first."""
        self._at = 0
        self._receipt: dict[str, Any] | None = None
        """Of the request that is shown; None if there is none, or its receipt is not kept any more."""

    async def refresh(self) -> None:
        """Ask every peer."""
        from meshserve.observe.status import list_peers

        self._activities = self._samples.add(await list_peers(self._mesh), time.monotonic())
        if self._is_trace_due:
            await self._find_trace()

    async def _find_trace(self) -> None:
        from meshserve.observe.receipt_store import find_receipt, recent_requests

        self._is_trace_due = False
        if not self._recent:
            self._recent = await recent_requests(self._mesh)
        name = self._recent[self._at] if self._recent else ""
        try:
            self._receipt = await find_receipt(self._mesh, name) if name else None
        except RequestNotFound:
            self._receipt = None

    # --- keys

    def on_key(self, key: str) -> bool:
        """Arrows select and sort, enter opens, escape closes, `t` shows the last request, and arrows then those before it."""
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page-up": -_PAGE, "page-down": _PAGE}
        if key in ("escape", "backspace"):
            self._is_detailed = self._traces = False
        elif key == "t":
            self._recent, self._at, self._is_detailed = [], 0, False
            self._show_trace()
        elif key in ("left", "right") and self._traces:
            self._at = max(0, min(len(self._recent) - 1, self._at + (1 if key == "left" else -1)))
            self._show_trace()
        elif key == "enter":
            self._is_detailed, self._traces, self._scrolled = not (self._is_detailed or self._traces), False, 0
        elif key in steps and (self._is_detailed or self._traces):
            self._scrolled = max(0, self._scrolled + steps[key])
        elif key in steps:
            self._select(steps[key])
        elif key in ("right", ">", "left", "<"):
            self._sort_by = (self._sort_by + (1 if key in ("right", ">") else -1)) % len(_FIELDS)
        elif key == "r":
            self._is_reversed = not self._is_reversed
        return self._is_trace_due

    def _show_trace(self) -> None:
        self._traces, self._is_trace_due, self._scrolled = True, True, 0

    def _select(self, step: int) -> None:
        order = [activity.peer["incarnation"] for activity in self._sorted()]
        if order:
            at = order.index(self._selected) if self._selected in order else 0
            self._selected = order[max(0, min(len(order) - 1, at + step))]

    def _sorted(self) -> list[Activity]:
        """Names from the first on, figures from the highest on; equal ones by name."""
        field = _FIELDS[self._sort_by]
        by_name = sorted(self._activities, key=lambda found: str(found.peer["name"]))

        def key(found: Activity) -> Any:
            value = field.value(found)
            return -1.0 if value is None else value  # below all figures

        return sorted(by_name, key=key, reverse=field.column.is_number != self._is_reversed)

    # --- drawing

    def draw(self, width: int | None, height: int | None) -> list[Text]:
        """Two lines on the mesh, then the peers, then the keys."""
        order = self._sorted()
        if not order:
            return [Text(f"no peer of mesh {self._mesh.own.mesh!r} found; try --peer HOST with the address of one, or `meshserve doctor`")]
        if height is None or width is None:
            return [*self._head(80), *self._table(order, None)]
        if self._selected not in {activity.peer["incarnation"] for activity in order}:
            self._selected = order[0].peer["incarnation"]
        head = self._head(width)
        room = height - len(head) - 2
        if self._traces:
            body = self._shown(self._trace(width), room)
        else:
            body = self._shown(self._details(), room) if self._is_detailed else self._scrolled_table(order, width, room)
        lines = [*head, Text(), *body][: height - 1]
        return [*lines, *([Text()] * (height - 1 - len(lines))), self._foot()]

    def _head(self, width: int) -> list[Text]:
        roles = [role for activity in self._activities for role in activity.peer["roles"]]
        counts = ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
        numbers = [
            f"{_number(sum(activity.tokens_per_s or 0.0 for activity in self._activities))} tokens/s",
            f"{_number(sum(activity.prompt_tokens_per_s or 0.0 for activity in self._activities))} prompt tokens/s",
            f"{sum(activity.num_running or 0 for activity in self._activities)} running",
            f"{sum((activity.num_waiting or 0) + (activity.num_tickets or 0) for activity in self._activities)} waiting",
        ]
        first = Text.assemble(("mesh ", "dim"), (printable(self._mesh.own.mesh), "bold"), f": {counts}")
        second = Text("  ".join(numbers), "bold")
        second.append("  " + sparkline(list(self._samples.trend), width - second.cell_len - 2), "green")
        return [first, second]

    def _table(self, order: list[Activity], width: int | None) -> list[Text]:
        columns = [
            Column(f"{'↑' if self._is_reversed == field.column.is_number else '↓'}{field.column.title}", 0, field.column.is_number)
            if index == self._sort_by and width is not None
            else field.column
            for index, field in enumerate(_FIELDS)
        ]
        return table(columns, [[field.show(field.value(activity)) for field in _FIELDS] for activity in order], width)

    def _scrolled_table(self, order: list[Activity], width: int, height: int) -> list[Text]:
        head, *rows = self._table(order, width)
        at = next((index for index, activity in enumerate(order) if activity.peer["incarnation"] == self._selected), 0)
        if rows:
            rows[at].pad_right(max(0, width - rows[at].cell_len))
            rows[at].stylize("reverse")
        num_rows = max(1, height - 1)
        first = max(0, min(at - num_rows // 2, len(rows) - num_rows))
        return [head, *rows[first : first + num_rows]]

    def _details(self) -> list[Text]:
        activity = next((found for found in self._activities if found.peer["incarnation"] == self._selected), None)
        return [Text(printable(line)) for line in details(activity)] if activity is not None else []

    def _trace(self, width: int) -> list[Text]:
        if self._is_trace_due and self._receipt is None:
            return [Text("looking for the last request ...", "dim")]
        if self._receipt is None:
            return [Text(f"{printable(self._recent[self._at])} is not kept any more" if self._recent else "no request has ended yet")]
        place = Text(f"{self._at + 1} of the last {len(self._recent)} requests", "dim") if len(self._recent) > 1 else Text()
        return [place, *waterfall(self._receipt, width)]

    def _shown(self, lines: list[Text], height: int) -> list[Text]:
        self._scrolled = max(0, min(self._scrolled, len(lines) - height))
        return lines[self._scrolled : self._scrolled + height]

    def _foot(self) -> Text:
        if self._traces:
            return Text("q quit   esc back   ↑↓ scroll   ← earlier   → later   t the last by now", "reverse")
        if self._is_detailed:
            return Text("q quit   esc back   ↑↓ scroll", "reverse")
        return Text("q quit   ↑↓ select   enter details   t last request   ←→ sort   r reverse", "reverse")


def details(activity: Activity) -> list[str]:
    """All that a peer reports, in lines."""
    peer = activity.peer
    lines = [
        f"{peer['name']}  {','.join(peer['roles'])}  {peer['state']} since {duration(peer['since_s'])}",
        f"instance id {peer['incarnation']}  version {peer['version']}  model {peer['model'] or '-'}",
        f"address {peer['address']}  advertised {', '.join(peer['addresses'])}  {peer['http'] or ''}".rstrip(),
        f"other peers that it reaches: {peer['num_reached']}  round trip {_milliseconds(peer['rtt_ms'])} ms",
        "",
    ]
    if peer["latencies"]:
        served = {name: _times(data) for name, data in peer["latencies"].items()}
        lines += ["of what it served, at the processors, ms (number, mean, median, p99)", *_columns(served), ""]
    if peer["load"]:
        lines += ["load", *_columns({name: str(value) for name, value in peer["load"].items()}), ""]
    if peer["histograms"]:
        lines += ["times, ms (number, mean, median, p99)", *_columns({name: _times(data) for name, data in peer["histograms"].items()}), ""]
    counters = {name: str(count) for name, count in sorted(peer["counters"].items()) if count}
    lines += ["counters", *_columns(counters)] if counters else []
    lines += [f"refused {entry['who']}: {entry['reason']} ({entry['times']}x)" for entry in peer["refused"]]
    return lines


def _columns(pairs: dict[str, str]) -> list[str]:
    widest = max(map(len, pairs), default=0)
    return [f"  {name:{widest}}  {value}" for name, value in pairs.items()]


def _times(data: list[Any]) -> str:
    found = Histogram.of_row(data)
    values = (found.mean_ms, found.quantile_ms(0.5), found.quantile_ms(0.99))
    return f"{found.count:8}  " + "  ".join(f"{_milliseconds(value if found.count else None):>8}" for value in values)
