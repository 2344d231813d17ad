"""`meshserve peers`: who is in the mesh, who is gone, and who was not let in."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from meshserve.cli.columns import Column, Output, duration, table
from meshserve.cli.options import mesh_config, mesh_options, option
from meshserve.cli.running import execute
from meshserve.telemetry import printable

if TYPE_CHECKING:
    from meshserve.mesh.mesh import Mesh

_WATCH_INTERVAL_S = 1.0
_MAX_REFUSED, _MAX_GONE = 6, 6
_NARROW = 110
_SHORT_ROLES = {"frontend": "front", "processor": "proc", "router": "route"}
_COLUMNS = (
    Column("NAME"),
    Column("ROLES", 1),
    Column("MODEL", 8),
    Column("ADDRESS", 2),
    Column("STATE"),
    Column("SINCE", 6, is_number=True),
    Column("VERSION", 9),
    Column("LOAD", 4, is_number=True),
    Column("QUEUE", 4, is_number=True),
    Column("BLOCKS", 5, is_number=True),
    Column("RTT", 3, is_number=True),
)
STATE_STYLES = {"alive": "green", "suspect": "yellow", "draining": "cyan"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON list; with --watch, a line every second.")
@option("--watch", is_flag=True, help="Again every second, until `q` or Ctrl-C.")
@mesh_options
def peers(as_json: bool, watch: bool, **settings: Any) -> None:
    """Show who is in the mesh, whom it refused and why, and who is gone."""
    execute(settings, lambda: _show(settings, as_json, watch))


async def _show(settings: dict[str, Any], as_json: bool, is_watching: bool) -> int:
    from meshserve.cli.observing import observer, settle
    from meshserve.cli.terminal import run_view

    async with observer(mesh_config(settings)) as mesh:
        await settle(mesh)
        view = PeersView(mesh)
        if is_watching and not as_json:
            await run_view(view, _WATCH_INTERVAL_S)
            return 0
        while is_watching:
            await view.refresh()
            click.echo(json.dumps(view.found))
            await asyncio.sleep(_WATCH_INTERVAL_S)
        await view.refresh()
        if as_json:
            click.echo(json.dumps(view.found, indent=1))
        else:
            console = Output(highlight=False, soft_wrap=True)
            for line in view.draw(console.width if console.is_terminal else None, None):
                console.print(line)
        return 0 if view.found else 1


class PeersView:
    """The table, as one print or as a screen that is looked at."""

    def __init__(self, mesh: "Mesh") -> None:
        self._mesh = mesh
        self.found: list[dict[str, Any]] = []
        self._first = 0

    async def refresh(self) -> None:
        """Ask every peer."""
        from meshserve.observe.status import list_peers

        self.found = await list_peers(self._mesh)

    def on_key(self, key: str) -> bool:
        """Scroll."""
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page-up": -10, "page-down": 10, "home": -len(self.found), "end": len(self.found)}
        self._first = max(0, min(len(self.found) - 1, self._first + steps.get(key, 0)))
        return False

    def draw(self, width: int | None, height: int | None) -> list[Text]:
        """The table, then who was refused and who is gone, as far as there is room."""
        mesh = self._mesh.own.mesh
        if not self.found:
            return [Text(f"no peer of mesh {mesh!r} found; try --peer HOST with the address of one, or `meshserve doctor`")]
        own = self._mesh.links.sightings.to_wire(self._mesh.now_s())["gone"]
        notes = [Text(printable(note), "dim") for note in [*refused_lines(self.found), *gone_lines(self.found, own)]]
        head, *rows = peer_lines(self.found, width)
        if height is None:
            return [head, *rows, *([Text(), *notes] if notes else [])]
        notes = notes[: max(0, min(height // 3, height - len(rows) - 5))]
        num_rows = max(1, height - 3 - len(notes) - bool(notes))
        first = max(0, min(self._first, len(rows) - num_rows))
        shown = rows[first : first + num_rows]
        lines = [head, *shown, *([Text(), *notes] if notes else [])]
        more = f"  {first + 1}-{first + len(shown)} of {len(rows)}, arrows scroll" if len(shown) < len(rows) else ""
        count = f"{len(self.found)} peer{'' if len(self.found) == 1 else 's'}"
        foot = Text(f"mesh {mesh}: {count}{more}   q quits", "reverse")
        return [*lines, *([Text()] * (height - len(lines) - 1)), foot]


def peer_lines(found: list[dict[str, Any]], width: int | None) -> list[Text]:
    """The table's head, and a line for each peer as `list_peers` gives them."""
    is_narrow = width is not None and width < _NARROW
    rows = []
    hashes = {(peer["model"], peer["model_hash"]) for peer in found if peer["model"]}
    ambiguous = {model for model, times in Counter(model for model, _ in hashes).items() if times > 1}
    for peer in found:
        load = peer["load"] or {}
        roles = [_SHORT_ROLES.get(role, role) for role in peer["roles"]] if is_narrow else peer["roles"]
        rows.append(
            (
                peer["name"],
                ",".join(roles),
                _model(peer, ambiguous),
                peer["address"].removeprefix("tcp://"),
                _state(peer),
                duration(peer["since_s"]),
                peer["version"],
                str(load.get("num_running", "-")),
                str(load.get("num_waiting", 0) + load.get("num_tickets", 0)) if load else "-",
                str(load.get("used_blocks", 0) + load.get("cached_blocks", 0)) if load else "-",
                f"{peer['rtt_ms']:.1f} ms" if peer["rtt_ms"] is not None else "-",
            )
        )
    return table(_COLUMNS, rows, width)


def _model(peer: dict[str, Any], ambiguous: set[str]) -> str:
    """With the hash where several models have one name."""
    if not peer["model"]:
        return "-"
    from meshserve.wire.card import short

    return f"{peer['model']}#{short(peer['model_hash'])}" if peer["model"] in ambiguous else str(peer["model"])


def _state(peer: dict[str, Any]) -> tuple[str, str]:
    state = peer["state"]
    if state == "alive" and not peer["answered"]:
        return "no answer", STATE_STYLES["suspect"]
    return state, STATE_STYLES.get(state, "dim")


def refused_lines(found: Iterable[dict[str, Any]]) -> list[str]:
    """Strangers that peers did not let in: who, why, how often; the latest first."""
    merged: dict[tuple[str, str], tuple[float, int, set[str]]] = {}
    for peer in found:
        for entry in peer["refused"]:
            ago_s, times, by = merged.get((entry["who"], entry["reason"]), (entry["ago_s"], 0, set()))
            merged[entry["who"], entry["reason"]] = min(ago_s, entry["ago_s"]), times + entry["times"], by | {peer["name"]}
    latest = sorted(merged.items(), key=lambda item: item[1][0])[:_MAX_REFUSED]
    return [
        f"refused  {who or 'somebody'}: {reason} ({times}x by {', '.join(sorted(by))}, last {duration(ago_s)} ago)"
        for (who, reason), (ago_s, times, by) in latest
    ]


def gone_lines(found: Iterable[dict[str, Any]], own: Iterable[dict[str, Any]]) -> list[str]:
    """Incarnations that have ended, by what peers and we ourselves saw of it; the latest first."""
    listed = {peer["incarnation"] for peer in found}
    merged: dict[str, dict[str, Any]] = {}
    for entry in [*own, *(entry for peer in found for entry in peer["gone"])]:
        known = merged.get(entry["incarnation"], entry)
        # not everybody hears a goodbye before the connection is closed
        if entry["incarnation"] not in listed and (entry["reason"] == "left" or known["reason"] != "left"):
            merged[entry["incarnation"]] = entry
    latest = sorted(merged.values(), key=lambda entry: float(entry["ago_s"]))[:_MAX_GONE]
    return [f"gone     {entry['name']} at {entry['address']}: {entry['reason']}, {duration(entry['ago_s'])} ago" for entry in latest]
