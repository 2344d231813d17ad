"""`meshserve trace`: a receipt as lines of text: path, waterfall of phases, attempts, candidates with reasons."""

import json
from collections.abc import Mapping
from typing import Any

import click
from rich.text import Text

from meshserve.cli.columns import Cell, Column, Output, duration, table
from meshserve.cli.options import mesh_config, mesh_options
from meshserve.cli.running import execute
from meshserve.errors import UsageError
from meshserve.observe.receipts import OK
from meshserve.telemetry import printable

_PLAIN_WIDTH = 100
"""Of the bars without a terminal."""
_NARROWEST_BAR = 10
_PARTS = " ▏▎▍▌▋▊▉█"

PHASES = {
    "http": ("bright_black", "frontend"),
    "process": ("blue", "processor"),
    "route": ("magenta", "router"),
    "queue": ("yellow", "decode"),
    "prefill": ("green", "prefill"),
    "kv_transfer": ("cyan", "prefill"),
    "decode": ("bright_green", "decode"),
    "network": ("bright_blue", ""),
    "other": ("red", ""),
}
"""Colour, and the role that works in this phase."""
_FIGURES = (
    Column("LOAD", 3, is_number=True),
    Column("CACHED", 2, is_number=True),
    Column("WAIT ms", 1, is_number=True),
    Column("COST ms", is_number=True),
    Column("WHY"),
)
_CANDIDATES = (("DECODE", "candidates"), ("PREFILL", "prefill_candidates"))
_ATTEMPT_FIGURES = (Column("ms", is_number=True), Column("BLOCKS", 1, is_number=True), Column("MB", 1, is_number=True))
_ATTEMPTS = (Column("ATTEMPT BY"), Column("WORK"), *_ATTEMPT_FIGURES, Column("OUTCOME"))


@click.command()
@click.argument("request_id", required=False)
@click.option("--last", "is_last", is_flag=True, help="The request that ended last, whoever asked.")
@click.option("--json", "as_json", is_flag=True, help="The receipt as JSON.")
@mesh_options
def trace(request_id: str | None, is_last: bool, as_json: bool, **settings: Any) -> None:
    """Show who served a request, why, and where its time went.

    REQUEST_ID is the x-request-id of its response: the mesh's own, or what the client called it. The last 1,000 requests of each
    processor are known, with those that failed or were cancelled.
    """
    if (request_id is None) != is_last:
        raise UsageError("name one request by its x-request-id, or ask for --last")
    execute(settings, lambda: _trace(settings, request_id, as_json))


async def _trace(settings: dict[str, Any], request_id: str | None, as_json: bool) -> int:
    from meshserve.cli.observing import observer, settle, wait_for
    from meshserve.observe.receipt_store import find_receipt, latest_receipt

    async with observer(mesh_config(settings)) as mesh:
        await wait_for(mesh, lambda: any(member.is_callable for member in mesh.links.membership.listed()), "found no peer")
        await settle(mesh)
        receipt = await (latest_receipt(mesh) if request_id is None else find_receipt(mesh, request_id))
    if as_json:
        click.echo(json.dumps(receipt, indent=1))
        return 0
    console = Output(highlight=False, soft_wrap=True)
    width, height = (console.width, console.height - 1) if console.is_terminal else (None, None)
    for line in waterfall(receipt, width, height):
        console.print(line)
    return 0


def waterfall(receipt: Mapping[str, Any], width: int | None, height: int | None = None) -> list[Text]:
    """The whole receipt in lines of at most `width` cells; None is as wide as it takes. Nothing in it can steer the terminal.

    Where `height` does not hold all, the best candidates stay, at least one of each role.
    """
    lines = [*_head(receipt), Text(), *_phases(receipt, width)]
    if receipt.get("handoff"):
        lines.append(_line("handoff", printable(_decision(receipt["handoff"]))))  # instead of an empty line: 24 lines are few
    elif receipt["attempts"]:
        lines.append(Text())
    if receipt["attempts"]:
        lines += table(_ATTEMPTS, [_attempt(attempt) for attempt in receipt["attempts"]], width)
    groups = [(role, found) for role, name in _CANDIDATES if (found := receipt.get(name) or [])]
    for index, (role, found) in enumerate(groups):
        lines += [Text(), *_candidates(role, found, width, None if height is None else (height - len(lines)) // (len(groups) - index) - 2)]
    if width is not None:
        for line in lines:
            line.truncate(width, overflow="ellipsis")
    return lines


def _candidates(role: str, found: list[dict[str, Any]], width: int | None, room: int | None) -> list[Text]:
    shown = found if room is None else found[: max(1, room)]
    title = f"{role} CANDIDATES" if len(shown) == len(found) else f"{role} CANDIDATES ({len(shown)} of {len(found)})"
    return table((Column(title), *_FIGURES), [_candidate(candidate) for candidate in shown], width)


def _head(receipt: Mapping[str, Any]) -> list[Text]:
    outcome, label, tokens = receipt["outcome"], receipt["client_id"], receipt["tokens"]
    ago = f", {duration(receipt['ended_ago_s'])} ago" if "ended_ago_s" in receipt else ""
    first = Text.assemble((printable(receipt["request_id"]), "bold"), f" {printable(label)}" if label else "", "  ")
    first.append(outcome, "green" if outcome == OK else "red")
    first.append(f"  {receipt['total_ms']:.3f} ms{ago}")
    lines = [first]
    if receipt.get("error"):
        lines.append(_line("error", printable(receipt["error"])))
    lines += [_line("path", printable(_path(receipt["peers"])))]
    prompt = f"{tokens.get('prompt')} prompt tokens ({tokens.get('cached')} cached)"
    policy = f", by {receipt['policy']}" if receipt["policy"] else ""
    lines.append(_line("served", printable(f"{receipt['model']}, {prompt}, {tokens.get('completion')} completed{policy}")))
    lines += [
        _line(f"answer {choice.get('index')}", printable(f"{_path(choice)}, {choice.get('completion')} tokens"))
        for choice in receipt.get("choices") or []
    ]
    if continued := receipt.get("continuations") or []:
        lines.append(_line("went on", printable("; ".join(map(_continuation, continued)))))
    return lines + ([_line("trace", printable(receipt["traceparent"]))] if receipt.get("traceparent") else [])


def _continuation(continued: Mapping[str, Any]) -> str:
    pause = f"{_number(continued.get('pause_ms'))} ms pause"
    return f"{continued.get('from')} > {continued.get('to')} after {continued.get('position')} tokens, {pause} ({continued.get('outcome')})"


def _decision(handoff: Mapping[str, Any]) -> str:
    local, remote = (_expected(handoff.get(name)) for name in ("local_ms", "remote_ms"))
    return f"{handoff.get('decided')}, {handoff.get('reason')}: {local} here, {remote} with a handoff expected; {handoff.get('why')}"


def _expected(found_ms: Any) -> str:
    return f"{found_ms:.1f} ms" if isinstance(found_ms, (int, float)) else "unknown"


def _line(name: str, text: str) -> Text:
    return Text.assemble((f"{name:9}", "dim"), text)


def _path(peers: Mapping[str, Any]) -> str:
    """Each peer once, in the order of the path."""
    names = [str(name) for role in ("frontend", "processor", "router", "prefill", "decode") if (name := peers.get(role))]
    return " -> ".join(dict.fromkeys(names)) or "nobody"


def _phases(receipt: Mapping[str, Any], width: int | None) -> list[Text]:
    """Each bar begins where the one before it ends, though http, network and other are sums of several times on the path."""
    total_ms, phases = receipt["total_ms"], receipt["phases_ms"]
    spent = [(phase, float(phases[phase])) for phase in PHASES if phases[phase] > 0]
    if not spent or total_ms <= 0:
        return [Text("nothing took time", "dim")]
    names = {phase: printable(_peer(receipt["peers"], PHASES[phase][1])) for phase, _ in spent}
    widest = min(max(map(len, names.values())), 24)
    head = 12 + 10 + widest + 2
    room = max(_NARROWEST_BAR, (width or _PLAIN_WIDTH) - head - 1)
    lines, before_ms = [], 0.0
    for phase, took_ms in spent:
        line = Text.assemble(f"{phase:12}", f"{took_ms:9.3f} ", (f"{names[phase][:widest]:{widest}}  ", "dim"))
        line.append(_bar(before_ms / total_ms, took_ms / total_ms, room), PHASES[phase][0])
        lines.append(line)
        before_ms += took_ms
    return lines


def _peer(peers: Mapping[str, Any], role: str) -> str:
    """A prompt that was not handed over was prefilled by the decode worker."""
    return str(peers.get(role) or (peers.get("decode") if role == "prefill" else "") or "")


def _bar(start: float, share: float, room: int) -> str:
    """Begins in a whole cell; its length is in eighths of a cell, at least one."""
    first = min(room - 1, int(start * room))
    whole, rest = divmod(min(max(1, round(share * room * 8)), (room - first) * 8), 8)
    return " " * first + _PARTS[8] * whole + (_PARTS[rest] if rest else "")


def _candidate(candidate: Mapping[str, Any]) -> list[Cell]:
    names = ("load", "overlap_blocks", "wait_ms", "cost_ms")
    return [str(candidate.get("peer")), *(_number(candidate.get(name)) for name in names), str(candidate.get("reason"))]


def _attempt(attempt: Mapping[str, Any]) -> list[Cell]:
    outcome = str(attempt.get("outcome"))
    work = str(attempt.get("role", "prefill"))
    style = "green" if outcome == "done" else "red"
    size_bytes = attempt.get("bytes")
    moved_mb = f"{size_bytes / 1e6:.2f}" if isinstance(size_bytes, int) else "-"
    return [str(attempt.get("peer")), work, _number(attempt.get("ms")), _number(attempt.get("blocks")), moved_mb, (outcome, style)]


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value}" if isinstance(value, int) else f"{value:.1f}"
