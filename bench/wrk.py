"""Load by `wrk` (Debian's package of that name): in C, so that next to nothing of what it measures is its own."""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

_SCRIPT = """
local number = 0
local head = '{"model": "MODEL", "prompt": "a short prompt that no other has, number '
local tail = '", "max_tokens": TOKENS, "stream": STREAM, "ignore_eos": true}'
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
request = function()
  number = number + 1
  return wrk.format(nil, "/v1/completions", nil, head .. number .. tail)
end
done = function(summary, latency)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format('FOUND {"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "errors": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, failed))
end
"""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Clients that each ask again as soon as they were answered."""

    name: str
    num_tokens: int
    is_stream: bool
    num_clients: int
    step_ms: float = 0.0
    """Between two tokens of a worker; 0: as fast as it can."""


SCENARIOS = [
    Scenario("unary1_c1", 1, False, 1),
    Scenario("unary32_c1", 32, False, 1),
    Scenario("unary1_c32", 1, False, 32),
    Scenario("stream32_c32", 32, True, 32),
    Scenario("stream128_c32", 128, True, 32),
    Scenario("paced128_c256", 128, True, 256, 10.0),
]


@dataclass(frozen=True, slots=True)
class Found:
    """What wrk saw."""

    num_requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    num_errors: int


def load(url: str, model: str, scenario: Scenario, seconds: float) -> Found:
    """Run one scenario. Raises ClickException where wrk is missing or says nothing."""
    if shutil.which("wrk") is None:
        raise click.ClickException("the load comes from wrk: apt install wrk")
    text = _SCRIPT.replace("MODEL", model).replace("TOKENS", str(scenario.num_tokens)).replace("STREAM", str(scenario.is_stream).lower())
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory, "load.lua")
        script.write_text(text)
        command = ["wrk", "-t1", f"-c{scenario.num_clients}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", "-s", str(script), url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    _, is_found, figures = done.stdout.partition("FOUND ")
    if not is_found:
        raise click.ClickException(f"wrk failed: {done.stderr.strip() or done.stdout.strip()}")
    seen = json.loads(figures)
    return Found(seen["requests"], seen["requests"] / seen["seconds"], seen["p50_ms"], seen["p99_ms"], seen["errors"])
