"""The doctor's command, and how its findings look."""

import ipaddress
import json
import sys
import time
from dataclasses import asdict
from typing import Any

import click

from meshserve.cli.options import mesh_config, mesh_options
from meshserve.cli.running import execute


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@mesh_options
def doctor(as_json: bool, **settings: Any) -> None:
    """Find out why peers do not see each other, and what to do. Exits with 1 if something is wrong."""
    if settings["log_level"] == "warning":
        settings["log_level"] = "error"  # what could be warned of is what the findings say
    execute(settings, lambda: _examine(settings, as_json))


async def _examine(settings: dict[str, Any], as_json: bool) -> int:
    from meshserve.cli.doctor.gathering import gather
    from meshserve.observe.diagnosis import diagnose
    from meshserve.observe.diagnosis.facts import is_wrong

    began_s = time.monotonic()
    if not as_json and sys.stderr.isatty():
        click.echo("looking at this machine, the network and every peer: up to eight seconds ...", err=True)
    facts = await gather(mesh_config(settings))
    findings = diagnose(facts)
    if as_json:
        verdict = {"mesh": facts.mesh, "ok": not is_wrong(findings), "took_s": round(time.monotonic() - began_s, 3)}
        click.echo(json.dumps({**verdict, "findings": [asdict(found) for found in findings], **_facts(facts)}, indent=1))
    else:
        _print(findings)
    return 1 if is_wrong(findings) else 0


def _facts(facts: Any) -> dict[str, Any]:
    outside = [local for local in facts.interfaces if not ipaddress.ip_address(local.address).is_loopback]
    sources = [("", facts.knocks), *((peer.label, peer.knocks or ()) for peer in facts.peers)]
    labels = {peer.incarnation: peer.label for peer in facts.peers}
    return {
        "interfaces": [{"interface": local.interface, "address": local.address, "network": local.network} for local in outside],
        "peers": [
            {
                "name": peer.label,
                "incarnation": peer.incarnation,
                "roles": list(peer.roles),
                "addresses": list(peer.addresses),
                "port": peer.port,
                "version": peer.version,
                "answers": peer.view is not None,
                "clock_offset_s": round(peer.clock_offset_s, 3) if peer.view else None,
                "longest_packet": peer.path.largest if peer.path else None,
            }
            for peer in facts.peers
        ],
        "reach": [
            {"from": source, "to": labels.get(found.target, found.target), "address": found.address, "port": found.port + found.offset}
            | {"outcome": found.outcome}
            for source, knocks in sources
            for found in knocks
        ],
    }


_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "green"}


def _print(findings: list[Any]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from meshserve.cli.columns import Output
    from meshserve.telemetry import printable

    console = Output(highlight=False, soft_wrap=not sys.stdout.isatty())
    for finding in findings:
        console.print(Text.assemble((f"{finding.severity:7}", _STYLES[finding.severity]), "  ", printable(finding.cause)))
        for title, text in (("seen", finding.seen), ("do", finding.advice)):
            if text:
                line = Text.assemble((f"{title}: ", "dim"), printable(text))
                console.print(Padding(line, (0, 0, 0, 9)) if sys.stdout.isatty() else Text(" " * 9).append_text(line))
    counts = [(sum(finding.severity == kind for finding in findings), kind) for kind in ("error", "warning")]
    verdict = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for count, kind in counts if count)
    console.print(f"\n{verdict or 'nothing is wrong that can be seen from here'}")
