"""What the options of `meshserve bench` say, as one value. Pure."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshserve.cli.bench.arrivals import Level, constant_level, due_times
from meshserve.cli.bench.http_target import HttpSettings
from meshserve.cli.bench.load import Plan
from meshserve.cli.bench.prompts import Shape
from meshserve.cli.bench.tally import Goal
from meshserve.cli.options import pick
from meshserve.errors import UsageError


@dataclass(frozen=True, slots=True)
class Settings:
    """One load on one target."""

    url: str | None
    """None: the mesh itself."""
    plan: Plan
    rate: Level | None
    """Of an open loop that no trace paces."""
    arrival: str
    shape: Shape
    trace: Path | None
    speed: float
    http: HttpSettings
    goal: Goal
    seed: int
    chars_per_token: float | None

    def dues(self, seed: int) -> Iterator[float] | None:
        """When requests are due; None if that is not for a clock to say."""
        if self.rate is None:
            return None
        return due_times(self.rate, self.arrival, random.Random(f"arrivals {seed}"))

    @property
    def load(self) -> str:
        """In words."""
        if self.plan.clients is not None:
            level, what = self.plan.clients, "clients"
        elif self.rate is not None:
            level, what = self.rate, f"requests/s, {self.arrival}"
        else:
            return f"as {self.trace} has it" + (f", {self.speed:g} times as fast" if self.speed != 1 else "")
        if level.ramp_s:
            return f"{level.first:g} to {level.last:g} {what} in {level.ramp_s:g} s"
        return "1 client" if what == "clients" and level.last == 1 else f"{level.last:g} {what}"


def read_settings(options: Mapping[str, Any], default_duration_s: float) -> Settings:
    """From options as click gives them. Raises UsageError for options that exclude each other."""
    is_traced, is_conversing = options["trace"] is not None, options["num_turns"] > 1
    if is_traced and is_conversing:
        raise UsageError("--trace has its own prompts: without --turns")
    clients, rate = _levels(options)
    num_warmup, warmup_s = options["warmup"]
    found = {
        **options,
        "clients": clients,
        "rate": rate,
        "num_warmup": num_warmup,
        "warmup_s": warmup_s,
        "is_keeping_text": is_conversing,
        "is_checking_certificates": not options["insecure"],
        "extra": options["extra"] or {},
    }
    if options["num_requests"] is None and options["duration_s"] is None and not is_traced:
        found["duration_s"] = default_duration_s
    goal = Goal(_seconds(options["target_ttft_ms"]), _seconds(options["target_itl_ms"]))
    plan, shape, http = pick(Plan, found), pick(Shape, found), pick(HttpSettings, found)
    return pick(Settings, {**found, "plan": plan, "shape": shape, "http": http, "goal": goal})


def _levels(options: Mapping[str, Any]) -> tuple[Level | None, Level | None]:
    """Of clients, or of requests a second; neither where a trace paces."""
    given = [name for name in ("concurrency", "rate", "ramp") if options[name] is not None]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]}: one of them says what the load is")
    if options["ramp"] is not None:
        name, level = options["ramp"]
        return (level, None) if name == "concurrency" else (None, level)
    if options["rate"] is not None:
        if options["trace"] is not None:
            raise UsageError("--trace says when requests are due: --speed scales it, --concurrency ignores it")
        return None, constant_level(options["rate"])
    if options["trace"] is not None and options["concurrency"] is None:
        return None, None
    return constant_level(options["concurrency"] or 1), None


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
