"""`python -m bench.scale [--json]`: what a peer costs that only belongs to a mesh, by how many belong to it.

So many `meshserve run` processes on loopback, without mDNS, each told of the first one alone: one in seven answers HTTP,
processes and routes; of the others a third are prefill workers, the rest decode workers. Once they all know each other nobody asks them
for anything. CPU time and memory are the kernel's account of each process; heartbeats are the peers' own counts.
"""

import contextlib
import json
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from bench.processes import cpu_s, end_peers, ready_fields, start_peer

_FRONT = "frontend,processor,router"
_MEET_S, _POLL_S, _SETTLE_S = 60.0, 0.1, 6.0
"""A while after they met, gossip has come to rest."""


def role_of(number: int) -> str:
    """Of the peer with this number; number 0, the first, is a front."""
    if number % 7 == 0:
        return _FRONT
    return "prefill" if number % 3 == 0 else "decode"


@dataclass(frozen=True, slots=True)
class Idle:
    """Of a mesh that does nothing; per peer where not said otherwise. CPU is in hundredths of a core."""

    num_peers: int
    ready_s: float
    """From the first start to the last `ready`: mostly Python's imports, which share the cores."""
    met_s: float
    """From the last `ready` until everybody could call everybody."""
    cpu_percent_mean: float
    cpu_percent_max: float
    rss_mb_mean: float
    rss_mb_max: float
    num_links: int
    """TCP connections of all peers together, both ends counted."""
    num_files: int
    """Open descriptors of the peer that has most."""
    pings_per_s: float
    """Heartbeats that a peer sends; each is answered."""
    hellos_per_s: float
    """Gossip that a peer sends."""


class MeshOfPeers:
    """The processes, and how to ask the first of them."""

    def __init__(self, processes: list["subprocess.Popen[str]"], url: str) -> None:
        self.processes, self._url = processes, url

    def peers(self) -> list[dict[str, Any]]:
        """Everybody, as the first peer has it from each."""
        with urllib.request.urlopen(f"{self._url}/mesh/peers", timeout=20) as response:
            found: list[dict[str, Any]] = json.loads(response.read())
        return found

    def have_met(self) -> bool:
        """Whether each can call all others."""
        peers = self.peers()
        count = len(self.processes)
        return len(peers) == count and all(peer["num_reached"] == count - 1 for peer in peers)

    def cpu_s(self) -> list[float]:
        """That each has used so far."""
        return [cpu_s([process.pid]) for process in self.processes]

    def rss_mb(self) -> list[float]:
        """Resident memory of each, what it shares with others included."""
        return [_rss_mb(process.pid) for process in self.processes]

    def num_files(self) -> int:
        """Open descriptors of the peer that has most."""
        return max(sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir()) for process in self.processes)

    def num_links(self) -> int:
        """Open TCP connections."""
        listing = [Path("/proc/net", name).read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
        established = {fields[9] for lines in listing for fields in map(str.split, lines) if fields[3] == "01"}
        return sum(_socket_of(path) in established for process in self.processes for path in Path(f"/proc/{process.pid}/fd").iterdir())


def _rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def _socket_of(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.readlink().name.removeprefix("socket:[").removesuffix("]")
    return ""


@contextlib.contextmanager
def mesh_of(num_peers: int) -> Iterator[MeshOfPeers]:
    """The first, and once it has said where it lives all others at once. All are ready at the block's begin, and ended at its end."""
    processes = [_start(_FRONT)]
    try:
        first = ready_fields(processes[0])
        seed = first["address"].removeprefix("tcp://")
        processes += [_start(role_of(number), "--peer", seed) for number in range(1, num_peers)]
        for process in processes[1:]:
            ready_fields(process)
        yield MeshOfPeers(processes, first["http"])
    finally:
        end_peers(processes)


def _start(role: str, *options: str) -> "subprocess.Popen[str]":
    return start_peer("scale", role, *(["--http", "127.0.0.1:0"] if role == _FRONT else []), *options)


def measure(num_peers: int, seconds: float) -> Idle:
    """Start them, let them meet, and look on. Raises ClickException where they do not meet."""
    began_s = time.monotonic()
    with mesh_of(num_peers) as mesh:
        ready_s = time.monotonic()
        while not mesh.have_met():
            if time.monotonic() > ready_s + _MEET_S:
                raise click.ClickException("not all know all")
            time.sleep(_POLL_S)
        met_s = time.monotonic()
        time.sleep(_SETTLE_S)
        counted, counted_s = _counts(mesh), time.monotonic()
        cpu, cpu_at_s = mesh.cpu_s(), time.monotonic()
        time.sleep(seconds)
        cpu_now, took_s = mesh.cpu_s(), time.monotonic() - cpu_at_s
        percent = [100 * (now - before) / took_s for now, before in zip(cpu_now, cpu, strict=True)]
        counted_now, took_s = _counts(mesh), time.monotonic() - counted_s
        rates = [(now - before) / took_s for now, before in zip(counted_now, counted, strict=True)]
        rss = mesh.rss_mb()
        return Idle(
            num_peers=num_peers,
            ready_s=round(ready_s - began_s, 2),
            met_s=round(met_s - ready_s, 2),
            cpu_percent_mean=round(statistics.mean(percent), 2),
            cpu_percent_max=round(max(percent), 2),
            rss_mb_mean=round(statistics.mean(rss), 1),
            rss_mb_max=round(max(rss), 1),
            num_links=mesh.num_links(),
            num_files=mesh.num_files(),
            pings_per_s=round(rates[0] / num_peers, 1),
            hellos_per_s=round(rates[1] / num_peers, 2),
        )


def _counts(mesh: MeshOfPeers) -> tuple[int, int]:
    counters = [peer["counters"] for peer in mesh.peers()]
    return sum(found.get("pings_sent", 0) for found in counters), sum(found.get("hellos_sent", 0) for found in counters)


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--peers", "sizes", multiple=True, type=click.IntRange(min=2), default=(10, 50), show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="That they are watched for.")
def main(as_json: bool, sizes: tuple[int, ...], seconds: float) -> None:
    """Measure meshes of so many peers, one after the other."""
    found = [measure(size, seconds) for size in sizes]
    if as_json:
        click.echo(json.dumps([asdict(idle) for idle in found], indent=1))
        return
    for idle in found:
        click.echo(f"{idle.num_peers} peers: ready after {idle.ready_s} s, all know all {idle.met_s} s later; then, idle, each")
        click.echo(f"  CPU       {idle.cpu_percent_mean:7.2f} % of a core (most: {idle.cpu_percent_max})")
        click.echo(f"  memory    {idle.rss_mb_mean:7.1f} MB (most: {idle.rss_mb_max})")
        click.echo(f"  links     {idle.num_links / idle.num_peers:7.1f} connections (open files, most: {idle.num_files})")
        click.echo(f"  pings     {idle.pings_per_s:7.1f} a second, and {idle.hellos_per_s} hellos")


if __name__ == "__main__":
    main()
