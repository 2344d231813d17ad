"""A target that is open, and runs on it: connections and what was learnt of the target stay from one run to the next."""

import gc
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from meshserve.cli.bench.arrivals import due_times
from meshserve.cli.bench.http_target import HttpTarget
from meshserve.cli.bench.live import Live
from meshserve.cli.bench.load import Load, Plan, Stop
from meshserve.cli.bench.mesh_target import MeshTarget, Target
from meshserve.cli.bench.options import Settings
from meshserve.cli.bench.prompts import PROBE_CHARS, Scale, Texts, TraceLine, Workload, read_trace_file, trace_requests
from meshserve.cli.bench.requests import Request, RequestRecord
from meshserve.cli.bench.selfcheck import findings
from meshserve.cli.bench.tally import Second, Tally
from meshserve.config import MeshConfig

CSV_COLUMNS = ("due_s", "queue_ms", "ttft_ms", "tpot_ms", "e2e_ms", "prompt_tokens", "output_tokens", "error", "run")


@dataclass(slots=True)
class Run:
    """What one run showed."""

    label: str
    load: str
    target: str
    model: str
    tally: Tally
    generator: dict[str, Any]
    findings: list[str] = field(default_factory=list)

    @property
    def advice(self) -> list[str]:
        """What makes figures weak that are not wrong."""
        num_done = self.tally.num_done
        if 0 < num_done < 1000:
            of = f"{num_done} requests" if num_done > 1 else "one request"
            return [f"p99.9 of {of} is the maximum; for a real one it takes 1,000 and more"]
        return []

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        timeline = [{"second": number, **_second(second)} for number, second in sorted(self.tally.seconds.items())]
        return {
            "label": self.label,
            "target": self.target,
            "model": self.model,
            "load": self.load,
            **self.tally.to_dict(),
            "generator": self.generator,
            "findings": self.findings,
            "timeline": timeline,
        }


def _interruption(tally: Tally, num_left: int) -> str:
    if tally.began_s is None:
        return "interrupted during the warm-up: nothing was measured"
    return f"interrupted after {tally.window_s:.1f} s; requests that were under way are left out ({num_left})"


def _never_warm(plan: Plan, num_started: int, is_trace: bool) -> str:
    warmup = f"{plan.num_warmup} requests" if plan.num_warmup else f"{plan.warmup_s:g} s"
    what = "the trace is shorter than the warm-up" if is_trace else "the run was over before the warm-up"
    return f"{what} ({warmup}): nothing was measured of {num_started} requests; --warmup 0 measures all"


def _second(second: Second) -> dict[str, Any]:
    found: dict[str, Any] = {
        "due": second.num_due,
        "requests": second.num_done,
        "errors": second.num_errors,
        "output_pieces": second.num_pieces,
    }
    if not second.e2e.count:
        return found
    for name, times in (("ttft", second.ttft), ("e2e", second.e2e)):
        found[f"{name}_p50_ms"] = round(times.quantile_ms(0.5), 3)
        found[f"{name}_max_ms"] = round(times.most_s * 1000, 3)
    return found


class Session:
    """Opened once, used for any number of runs one after the other, closed once."""

    def __init__(
        self, settings: Settings, mesh: MeshConfig, live: Live, stop: Stop, is_keeping_rows: bool
    ) -> None:
        self.settings, self._live, self._stop = settings, live, stop
        self._is_keeping_rows = is_keeping_rows
        self.target: Target = _target(settings, mesh)
        self._scale = Scale()
        self._lines: list[TraceLine] = read_trace_file(settings.trace, settings.speed) if settings.trace is not None else []
        self._runs: list[Run] = []

    async def open(self) -> None:
        """Connect, and learn how long the target's tokens are. Raises StartupFailed."""
        await self.target.open()
        chars_per_token = self.settings.chars_per_token
        scale = Scale(chars_per_token) if chars_per_token is not None else await self._measured_scale()
        if scale is None:
            self.target.notes.append("the target does not say how many tokens a prompt has: 4 characters a token are taken for one")
        self._scale = scale or Scale()

    async def _measured_scale(self) -> Scale | None:
        texts = Texts(self.settings.seed)
        short, long = [await self.target.count_tokens(texts.make("probe", size)) for size in PROBE_CHARS]
        return Scale.from_probes(short, long) if short is not None and long is not None else None

    async def run(self, label: str, shown: str, settings: Settings) -> Run:
        """One run, `shown` beside the progress bar. Prompts are new: the target may know the last run's."""
        seed = settings.seed + 1_000_003 * len(self._runs)
        workload = Workload(settings.shape, self._scale, seed)
        requests: Iterable[Request] = trace_requests(self._lines, self._scale, seed) if self._lines else workload
        if settings.plan.clients is not None and self._lines:
            requests = (replace(request, due_s=None) for request in requests)
        tally = Tally(settings.goal, self._is_keeping_rows)
        next_turn = workload.next_turn if settings.shape.num_turns > 1 else None
        dues = None
        if settings.rate is not None:
            dues = due_times(settings.rate, settings.arrival, random.Random(f"arrivals {seed}"))
        load = Load(self.target, settings.plan, requests, dues, tally, next_turn)
        self._live.watch(shown, load, len(self._lines) or None)
        self._stop.watch(load)
        gc.collect()
        gc.freeze()  # a full collection over what is there for good would be a stall of the generator's own
        try:
            await load.run()
        finally:
            gc.unfreeze()
        check = load.check
        found = findings(check.cpu_share, check.late, check.lag, tally)
        if load.is_stopped:
            found.insert(0, _interruption(tally, load.num_left))
        elif tally.began_s is None:
            found.insert(0, _never_warm(settings.plan, load.num_started, bool(self._lines)))
        run = Run(label, settings.load, self.target.name, self.target.model, tally, check.to_dict(), found)
        self._runs.append(run)
        return run

    def rows(self) -> list[list[Any]]:
        """The measured requests of all runs, with the columns of :data:`CSV_COLUMNS`."""
        records = [(run.label, record) for run in self._runs for record in run.tally.records or ()]
        began_s = min((record.due_s for _, record in records), default=0.0)
        return [[*_row(record, began_s), label] for label, record in records]

    async def close(self) -> None:
        """End all connections."""
        await self.target.close()


def _target(settings: Settings, mesh: MeshConfig) -> Target:
    http = settings.http
    if settings.url is not None:
        return HttpTarget(settings.url, http)
    return MeshTarget(mesh, http, settings.plan.timeout_s)


def _row(row: RequestRecord, began_s: float) -> list[Any]:
    ended_s, ttft_s, tpot_s = row.ended_s or row.due_s, row.ttft_s, row.tpot_s
    return [
        f"{row.due_s - began_s:.6f}",
        _milliseconds(None if row.sent_s is None else row.sent_s - row.due_s),
        _milliseconds(ttft_s),
        _milliseconds(tpot_s),
        _milliseconds(ended_s - row.due_s),
        row.ending.num_prompt_tokens if row.ending.num_prompt_tokens is not None else "",
        row.num_tokens,
        row.error or "",
    ]


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.4f}"
