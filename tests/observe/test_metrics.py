"""What `/metrics` says, without a mesh: names and texts by Prometheus' conventions, and counters that somebody counts."""

import re
from pathlib import Path
from typing import Any

import meshserve
from meshserve.handoff.task import TaskState
from meshserve.observe.metrics import metrics_text
from meshserve.telemetry import BUCKETS_S

DERIVED = {f"prefill_tasks_{state}" for state in TaskState} | {"requests_done", "requests_failed", "requests_left"}
"""Counters whose names are put together where they are counted."""
HISTOGRAMS = ("ttft", "itl", "e2e", "route", "queue", "prefill", "prefill_wait", "prefill_compute", "kv_transfer")


def shown(**changes: Any) -> str:
    load = {"num_running": 1, "num_waiting": 0, "num_tickets": 0, "used_blocks": 3, "cached_blocks": 4, "num_blocks": 8}
    histograms = {name: [1.5, [1] * (len(BUCKETS_S) + 1)] for name in HISTOGRAMS}
    peer = {"name": "one", "incarnation": "abc", "roles": ["decode"], "state": "alive", "rtt_ms": 0.5, "counters": {}, "held": {"calls": 2}}
    by_worker = {"abc": {name: histograms[name] for name in ("ttft", "itl")}, "gone": {"ttft": histograms["ttft"]}}
    return metrics_text([{**peer, "load": load, "histograms": histograms, "histograms_by_worker": by_worker, **changes}]).decode()


def test_names_units_and_texts_are_as_prometheus_wants_them() -> None:
    text = shown()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    texts = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    assert len(kinds) > 40 and kinds.keys() == texts.keys()
    for name, kind in kinds.items():
        assert re.fullmatch(r"meshserve_[a-z][a-z0-9_]*", name) and texts[name].endswith(".")
        assert name.endswith("_total") == (kind == "counter"), name
        assert kind != "histogram" or name.endswith("_seconds"), name
        assert not re.search(r"_(ms|us|milliseconds|gauge|counter|histogram|summary)(_|$)", name), name
    samples = re.findall(r"^(\w+)\{[^}]*\} \S+$", text, re.MULTILINE)
    assert {re.sub(r"_(bucket|sum|count)$", "", name) if name not in kinds else name for name in samples} == kinds.keys()


def test_a_counter_that_is_always_shown_is_one_that_somebody_counts() -> None:
    always = set(re.findall(r"^meshserve_(\w+)_total\{", shown(), re.MULTILINE))
    package = Path(meshserve.__path__[0])
    code = "".join(path.read_text() for path in package.rglob("*.py") if path != package / "observe" / "metrics.py")
    assert len(always) > 30 and [name for name in sorted(always - DERIVED) if f'"{name}"' not in code] == []


def test_a_peer_of_another_version_adds_counters_and_no_lines() -> None:
    text = shown(counters={"tickets_burnt": 3, "evil\nmeshserve_forged 1\n": 1, "Odd name": 2})
    assert 'meshserve_tickets_burnt_total{incarnation="abc",peer="one"} 3.0' in text
    assert "forged" not in text and "Odd" not in text


def test_a_workers_latencies_are_a_family_of_their_own_for_each_processor() -> None:
    text = shown()
    of_one = 'incarnation="abc",peer="one",worker="one",worker_incarnation="abc"'
    assert f"meshserve_worker_inter_token_latency_seconds_count{{{of_one}}} {len(BUCKETS_S) + 1}.0" in text
    assert f"meshserve_worker_time_to_first_token_seconds_sum{{{of_one}}} 1.5" in text
    assert text.count("meshserve_inter_token_latency_seconds_count{") == 1 and '"gone"' not in text
