"""Prefill and decode on two hosts with 1 Gbit/s between them: what the handoff adds to the time to the first token."""

import asyncio
import contextlib
import random
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click

from bench.llama.client import complete, random_prompt
from bench.llama.prefill_alone import serve
from bench.llama.servers import engine_options
from bench.processes import started
from meshserve.cli.bench.compare import Ratio, ratio_of
from tests.harness import Host, Lan, Process, meshserve_command
from tests.harness.namespaces import ToolError

LENGTHS = (300, 1200)
LINK_BYTES_PER_S, _BURST_KB = 125_000_000, 256
_DECODE_CORE, _PREFILL_CORE = 0, 1
_NUM_CELLS = 8192
_MAX_TOKENS = 4
_PORT, _HTTP_PORT, _PROBE_PORT = 7800, 8000, 7790
_START_S = 120.0
_PROBE_BYTES = 32_000_000


class Trial(NamedTuple):
    """One prompt, handed over and alone."""

    ttft_ms: float
    """The client's: to the first token of the request that was handed over."""
    alone_ms: float
    """The same tokens but the last, by the same engine on the prefill peer's core, with nothing handed over."""
    phases_ms: dict[str, float]
    """Of the receipt."""

    @property
    def causes_ms(self) -> dict[str, float]:
        """Where the time beyond `alone_ms` went, by the receipt; together they are `ttft_ms` - `alone_ms`.

        The receipt's phase `prefill` is the prefill peer's time and, after it, the step in which the decode peer computes the last token;
        that step is taken to be as long as the mean of those that follow it.
        """
        phases = dict(self.phases_ms)
        step_ms = phases.pop("decode") / (_MAX_TOKENS - 1)
        slower_ms = phases.pop("prefill") - step_ms - self.alone_ms
        found = {"prefill_slower_than_alone": slower_ms, "last_token_step": step_ms, **phases}
        return {**found, "client": self.ttft_ms - self.alone_ms - sum(found.values())}


def handoff_1gbit(path: Path, num_pairs: int) -> dict[str, Any]:
    """Two hosts of one core; a decode peer that is the frontend too, and a prefill peer. No other load. Pairs on the same core in turn.

    Raises ClickException where network namespaces cannot be made, and for a prompt that was not handed over.
    """
    rng = random.Random(12)
    try:
        with _lan() as (front_host, prefill_host), started(serve, path, _PREFILL_CORE, _NUM_CELLS) as alone:
            link_mbit_per_s = _measured_mbit_per_s(prefill_host, front_host)
            front, prefill = _start(front_host, prefill_host, path)
            _received(alone)
            found = {length: _trials(front_host, alone, path.stem, length, num_pairs, rng) for length in LENGTHS}
    except ToolError as error:
        raise click.ClickException(f"this row needs the right to make network namespaces: {error}") from error
    figures = {f"tokens_{length}": summary(trials) for length, trials in found.items()}
    return {**figures, "link_mbit_per_s": round(link_mbit_per_s), "commands": [shlex.join(each.command) for each in (front, prefill)]}


@contextmanager
def _lan() -> Iterator[tuple[Host, Host]]:
    with Lan() as lan:
        hosts = lan.add_host("decode"), lan.add_host("prefill")
        for host in hosts:
            host.limit_rate(LINK_BYTES_PER_S, _BURST_KB)
        yield hosts


def _start(front_host: Host, prefill_host: Host, path: Path) -> tuple[Process, Process]:
    """Both peers, once the router has them. Every prompt may be handed over, however short."""
    common = ["--no-mdns", "--port", str(_PORT), *engine_options(path, _NUM_CELLS)]
    roles = ["--role", "frontend,processor,router,decode", "--http", f"127.0.0.1:{_HTTP_PORT}", "--max-local-prefill-tokens", "0"]
    own = ["--role", "prefill", "--peer", f"{front_host.address}:{_PORT}"]
    front = front_host.start("taskset", "-c", str(_DECODE_CORE), *meshserve_command("run", *roles, *common))
    prefill = prefill_host.start("taskset", "-c", str(_PREFILL_CORE), *meshserve_command("run", *own, *common))
    try:
        front.wait_for_line("^1 decode, 1 prefill ready", _START_S)
    except AssertionError as error:
        raise click.ClickException(str(error)) from error
    return front, prefill


def _trials(host: Host, alone: Connection, model: str, length: int, num_pairs: int, rng: random.Random) -> list[Trial]:
    """The first pair is for warming up: it opens connections."""
    return [_trial(host, alone, model, random_prompt(length, rng), is_alone_first=bool(pair % 2)) for pair in range(1 + num_pairs)][1:]


def _trial(host: Host, alone: Connection, model: str, prompt: list[int], is_alone_first: bool) -> Trial:
    alone_s = _alone_s(alone, prompt) if is_alone_first else None
    connected = host.connect("127.0.0.1", _HTTP_PORT)
    connected.settimeout(None)
    url = f"http://127.0.0.1:{_HTTP_PORT}"
    answer = asyncio.run(complete(url, model, prompt, _MAX_TOKENS, with_receipt=True, connected=connected))
    if not answer.receipt["peers"]["prefill"] or len(answer.receipt["attempts"]) != 1:
        raise click.ClickException(f"a prompt was not handed over at once: {answer.receipt['handoff']}, {answer.receipt['attempts']}")
    alone_s = _alone_s(alone, prompt) if alone_s is None else alone_s
    return Trial(answer.ttft_s * 1000, alone_s * 1000, answer.receipt["phases_ms"])


def _alone_s(alone: Connection, prompt: list[int]) -> float:
    alone.send(prompt[:-1])
    return float(_received(alone))


def _received(alone: Connection) -> Any:
    try:
        return alone.recv()
    except EOFError as exc:
        raise click.ClickException("the engine alone has ended") from exc


def summary(trials: list[Trial]) -> dict[str, Any]:
    """`beyond_percent` is the figure: the median of the pairs, and its interval; then medians in milliseconds."""
    ratio = ratio_of([trial.ttft_ms for trial in trials], [trial.alone_ms for trial in trials])
    causes = {name: [trial.causes_ms[name] for trial in trials] for name in trials[0].causes_ms}
    return {
        "beyond_percent": _percent(ratio),
        "pairs": ratio.num_pairs,
        "ttft_ms": round(median(trial.ttft_ms for trial in trials), 1),
        "alone_ms": round(median(trial.alone_ms for trial in trials), 1),
        "beyond_ms": {name: round(median(found), 2) for name, found in causes.items()},
    }


def _percent(ratio: Ratio) -> dict[str, float]:
    return {name: round((value - 1) * 100, 2) for name, value in (("median", ratio.median), ("low", ratio.low), ("high", ratio.high))}


def _measured_mbit_per_s(sender: Host, receiver: Host) -> float:
    """What one TCP connection gets through."""
    server = receiver.inside(lambda: socket.create_server((receiver.address, _PROBE_PORT)))
    with contextlib.closing(server), contextlib.closing(sender.connect(receiver.address, _PROBE_PORT)) as near:
        far, _ = server.accept()
        thread = threading.Thread(target=lambda: near.sendall(bytes(_PROBE_BYTES)))
        with contextlib.closing(far):
            began_s, left = time.monotonic(), _PROBE_BYTES
            thread.start()
            while left:
                left -= len(far.recv(min(left, 1 << 20)))
            took_s = time.monotonic() - began_s
        thread.join()
    return _PROBE_BYTES * 8 / took_s / 1e6
