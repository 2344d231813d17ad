"""The benchmarks that compare systems, in a short form: that they run, and that what they compare answers without an error."""

import json
import shutil
import sys
from typing import Any

import pytest

from tests.harness import run_command

pytestmark = [pytest.mark.full, pytest.mark.skipif(shutil.which("wrk") is None, reason="the load comes from wrk")]


def figures(module: str, *arguments: str) -> dict[str, Any]:
    done = run_command([sys.executable, "-m", f"bench.{module}", "--json", *arguments], 110.0)
    assert done.exit_code == 0, done
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_mesh_is_compared_with_its_floor() -> None:
    found = figures("overhead", "--rounds", "6", "--seconds", "1", "--scenario", "unary32_c1", "--scenario", "stream32_c32")
    for systems in found["scenarios"].values():
        assert list(systems) == ["floor", "meshserve aggregated", "meshserve disaggregated"]
        assert not any(system["errors"] for system in systems.values())
        assert systems["meshserve aggregated"]["p50_ms_ratio"]["num_pairs"] == 6
        assert systems["meshserve aggregated"]["requests_per_s_ratio"]["low"] < 1


def test_throughput_agrees_with_that_of_wrk() -> None:
    found = figures("agreement", "--pairs", "6", "--seconds", "4")
    assert found["wrk"]["requests/s"]["verdict"] != "DIFFERS"
