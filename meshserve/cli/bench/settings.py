"""What the options of `meshserve bench` say, as one value. Pure."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshserve.cli.bench.arrivals import Level, constant_level, due_times, parse_ramp
from meshserve.cli.bench.distributions import parse_lengths
from meshserve.cli.bench.http_target import HttpSettings
from meshserve.cli.bench.load import Plan
from meshserve.cli.bench.tally import Goal
from meshserve.cli.bench.workload import Shape
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
    """From options as click gives them. Raises UsageError for what does not go together."""
    clients, rate = _levels(options)
    is_traced = options["trace"] is not None
    is_conversing = options["turns"] > 1
    if is_traced and is_conversing:
        raise UsageError("--trace has its own prompts: without --turns")
    num_requests, duration_s = options["num_requests"], options["duration"]
    if num_requests is None and duration_s is None and not is_traced:
        duration_s = default_duration_s
    num_warmup, warmup_s = _warmup(options["warmup"])
    plan = Plan(
        clients=clients,
        num_requests=num_requests,
        duration_s=duration_s,
        num_warmup=num_warmup,
        warmup_s=warmup_s,
        max_open=options["max_open"],
        timeout_s=options["timeout"],
        think_s=options["think_time"],
        receipt_every=options["receipt_every"],
    )
    return Settings(
        url=options["url"],
        plan=plan,
        rate=rate,
        arrival=options["arrival"],
        shape=_shape(options),
        trace=Path(options["trace"]) if is_traced else None,
        speed=options["speed"],
        http=_http(options, is_conversing),
        goal=Goal(_seconds(options["target_ttft_ms"]), _seconds(options["target_itl_ms"])),
        seed=options["seed"],
        chars_per_token=options["chars_per_token"],
    )


def _levels(options: Mapping[str, Any]) -> tuple[Level | None, Level | None]:
    """Of clients, or of requests a second; neither where a trace paces."""
    given = [name for name in ("concurrency", "rate", "ramp") if options[name] is not None]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]}: one of them says what the load is")
    if options["ramp"] is not None:
        name, level = parse_ramp(options["ramp"])
        return (level, None) if name == "concurrency" else (None, level)
    if options["rate"] is not None:
        if options["trace"] is not None:
            raise UsageError("--trace says when requests are due: --speed scales it, --concurrency ignores it")
        return None, constant_level(options["rate"])
    if options["trace"] is not None and options["concurrency"] is None:
        return None, None
    return constant_level(options["concurrency"] or 1), None


def _warmup(text: str) -> tuple[int, float]:
    """`20` requests or `2s`."""
    try:
        if text.endswith("s"):
            number, seconds = 0, float(text[:-1])
        else:
            number, seconds = int(text), 0.0
    except ValueError:
        number, seconds = -1, 0.0
    if not (0 <= number <= 1_000_000 and 0 <= seconds <= 86_400):
        raise UsageError(f"--warmup {text!r} is neither a number of requests nor seconds, as 2s")
    return number, seconds


def _shape(options: Mapping[str, Any]) -> Shape:
    return Shape(
        parse_lengths(options["prompt_tokens"]),
        parse_lengths(options["output_tokens"]),
        options["shared_prefix_tokens"],
        options["num_prefixes"],
        options["turns"],
    )


def _http(options: Mapping[str, Any], is_conversing: bool) -> HttpSettings:
    try:
        extra = json.loads(options["extra"]) if options["extra"] else {}
    except ValueError as exc:
        raise UsageError(f"--extra is not JSON: {exc}") from exc
    if not isinstance(extra, dict):
        raise UsageError("--extra is not a JSON object")
    return HttpSettings(
        endpoint=options["endpoint"],
        model=options["model"],
        api_key=options["api_key"],
        is_stream=options["stream"],
        ignore_eos=options["ignore_eos"],
        is_keeping_text=is_conversing,
        is_checking_certificates=not options["insecure"],
        extra=extra,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
