"""What `/metrics` says, without a mesh: names and texts by Prometheus' conventions, and counters that somebody counts."""

import re
import time
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

import meshserve
from meshserve.handoff.task import TaskState
from meshserve.observe.metrics import metrics_text
from meshserve.observe.process import process_figures
from meshserve.observe.vllm_metrics import vllm_metrics_text
from meshserve.telemetry import BUCKETS_S

DERIVED = {f"prefill_tasks_{state}" for state in TaskState} | {"requests_done", "requests_failed", "requests_left"}
"""Counters whose names are put together where they are counted."""
HISTOGRAMS = ("ttft", "itl", "e2e", "route", "queue", "prefill", "prefill_wait", "prefill_compute", "kv_transfer")
REQUESTS = [("/v1/completions", 200, "ok", "m", 3), ("/v1/completions", 429, "rate_limited", "m", 2), ("/health", 200, "ok", "", 9)]


def a_peer(**changes: Any) -> dict[str, Any]:
    load = {"num_running": 1, "num_waiting": 0, "num_tickets": 0, "used_blocks": 3, "cached_blocks": 4, "num_blocks": 8}
    histograms = {name: [1.5, [1] * (len(BUCKETS_S) + 1)] for name in HISTOGRAMS}
    peer = {"name": "one", "incarnation": "abc", "roles": ["decode"], "state": "alive", "rtt_ms": 0.5, "counters": {}, "held": {"calls": 2}}
    peer |= {"mesh": "home", "model": "m", "version": "1.2", "process": process_figures(), "request_counts": REQUESTS}
    by_worker = {"abc": {name: histograms[name] for name in ("ttft", "itl")}, "gone": {"ttft": histograms["ttft"]}}
    return {**peer, "load": load, "histograms": histograms, "histograms_by_worker": by_worker, **changes}


def shown(**changes: Any) -> str:
    return metrics_text([a_peer(**changes)]).decode()


def families(text: bytes) -> dict[str, Metric]:
    """As Prometheus' own parser reads them."""
    return {family.name: family for family in text_string_to_metric_families(text.decode())}


def test_names_units_and_texts_are_as_prometheus_wants_them() -> None:
    text = shown()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    texts = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    assert len(kinds) > 40 and kinds.keys() == texts.keys()
    for name, kind in kinds.items():
        assert re.fullmatch(r"(meshserve|process)_[a-z][a-z0-9_]*", name) and texts[name].endswith(".")
        assert name.endswith("_total") == (kind == "counter"), name
        assert kind != "histogram" or name.endswith("_seconds"), name
        assert not re.search(r"_(ms|us|milliseconds|gauge|counter|histogram|summary)(_|$)", name), name
    samples = re.findall(r"^(\w+)\{[^}]*\} \S+$", text, re.MULTILINE)
    assert {re.sub(r"_(bucket|sum|count)$", "", name) if name not in kinds else name for name in samples} == kinds.keys()


def test_a_counter_that_is_always_shown_is_one_that_somebody_counts() -> None:
    always = set(re.findall(r"^meshserve_(\w+)_total\{", shown(), re.MULTILINE)) - {"http_requests"}
    package = Path(meshserve.__path__[0])
    code = "".join(path.read_text() for path in package.rglob("*.py") if path != package / "observe" / "metrics.py")
    assert len(always) > 30 and [name for name in sorted(always - DERIVED) if f'"{name}"' not in code] == []


def test_a_peer_of_another_version_adds_counters_and_no_lines() -> None:
    text = shown(counters={"tickets_burnt": 3, "evil\nmeshserve_forged 1\n": 1, "Odd name": 2})
    assert 'meshserve_tickets_burnt_total{incarnation="abc",mesh="home",model="m",peer="one"} 3.0' in text
    assert "forged" not in text and "Odd" not in text


def test_a_workers_latencies_are_a_family_of_their_own_for_each_processor() -> None:
    text = shown()
    of_one = 'incarnation="abc",mesh="home",model="m",peer="one",worker="one",worker_incarnation="abc"'
    assert f"meshserve_worker_inter_token_latency_seconds_count{{{of_one}}} {len(BUCKETS_S) + 1}.0" in text
    assert f"meshserve_worker_time_to_first_token_seconds_sum{{{of_one}}} 1.5" in text
    assert text.count("meshserve_inter_token_latency_seconds_count{") == 1 and '"gone"' not in text


def test_every_series_names_its_mesh_and_a_worker_its_model() -> None:
    found = families(metrics_text([a_peer(), a_peer(name="two", incarnation="def", model=None)]))
    for family in found.values():
        assert {sample.labels["mesh"] for sample in family.samples} == {"home"}, family.name
    models = {sample.labels["peer"]: sample.labels["model"] for sample in found["meshserve_running_sequences"].samples}
    assert models == {"one": "m", "two": ""}
    (build, _) = found["meshserve_build_info"].samples
    assert build.labels["version"] == "1.2" and build.value == 1


def test_http_requests_are_counted_by_route_status_code_and_the_model_asked_for() -> None:
    samples = families(metrics_text([a_peer(model="of the engine")]))["meshserve_http_requests"].samples
    rows = {tuple(sample.labels[name] for name in ("route", "status", "code", "model")): sample.value for sample in samples}
    assert rows == {(route, str(status), code, model): count for route, status, code, model, count in REQUESTS}


def test_the_process_of_each_peer_is_seen_by_the_names_of_prometheus_own_clients() -> None:
    found = families(metrics_text([a_peer()]))
    assert found["process_cpu_seconds"].type == "counter" and found["process_cpu_seconds"].samples[0].value > 0
    assert 0 < found["process_start_time_seconds"].samples[0].value <= time.time()
    assert found["process_max_fds"].samples[0].value != 0
    if Path("/proc/self/statm").exists():
        assert found["process_resident_memory_bytes"].samples[0].value > 1_000_000 and found["process_open_fds"].samples[0].value >= 1


def test_histograms_reach_to_ten_minutes() -> None:
    samples = families(metrics_text([a_peer()]))["meshserve_request_duration_seconds"].samples
    bounds = [sample.labels["le"] for sample in samples if sample.name.endswith("_bucket")]
    assert bounds[-2:] == ["600.0", "+Inf"] and len(bounds) == len(set(bounds)) == len(BUCKETS_S) + 1


def test_vllms_names_say_what_vllm_says() -> None:
    counters = {"prompt_tokens": 30, "prompt_tokens_cached": 10, "tokens_generated": 7}
    worker = a_peer(counters=counters, histograms={}, histograms_by_worker={})
    processors = [a_peer(name=name, incarnation=name, load=None, model=None, request_counts=REQUESTS) for name in ("p", "q")]
    found = families(vllm_metrics_text([worker, *processors]))

    def values(name: str, suffix: str = "") -> dict[tuple[str, str], float]:
        samples = [sample for sample in found[f"vllm:{name}"].samples if sample.name.endswith(suffix)]
        return {(sample.labels["model_name"], sample.labels["engine"]): sample.value for sample in samples}

    assert values("num_requests_running") == {("m", "one"): 1} and values("num_requests_waiting") == {("m", "one"): 0}
    assert values("kv_cache_usage_perc") == {("m", "one"): 3 / 8}
    assert values("generation_tokens") == {("m", "one"): 7} and values("prefix_cache_queries") == {("m", "one"): 30}
    assert values("prefix_cache_hits") == {("m", "one"): 10}
    assert values("request_success") == {("m", "one"): 3, ("m", "p"): 3, ("m", "q"): 3}
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds"):
        assert values(name, "_count") == {("m", "one"): 2 * (len(BUCKETS_S) + 1)}, "what both processors measured of the worker"
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"):
        assert values(name, "_count") == {("m", "p"): len(BUCKETS_S) + 1, ("m", "q"): len(BUCKETS_S) + 1}
