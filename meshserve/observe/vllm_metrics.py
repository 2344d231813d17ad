"""Metrics under the names that vLLM 0.10 uses (`--metrics-vllm`).

They are for dashboards and autoscalers that know only those. A worker of the mesh is what vLLM calls
an engine. Times to the first token and between tokens are of each worker, as processors measured;
times of whole requests are of each processor, and name the model where the mesh serves one.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from meshserve.observe.metrics import histogram_family
from meshserve.observe.receipts import OK
from meshserve.telemetry import added_up

_LABELS = ("model_name", "engine")
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of requests that a worker finished."),
    "generation_tokens": ("tokens_generated", "Tokens generated."),
    "prefix_cache_queries": (
        "prompt_tokens",
        "Prompt tokens that were looked for in the prefix cache.",
    ),
    "prefix_cache_hits": (
        "prompt_tokens_cached",
        "Prompt tokens that were found in the prefix cache.",
    ),
}
"""By vLLM's name: meshserve's, and the help."""
_OF_WORKERS = {"ttft": "time_to_first_token_seconds", "itl": "inter_token_latency_seconds"}
_OF_PROCESSORS = {
    "e2e": "e2e_request_latency_seconds",
    "queue": "request_queue_time_seconds",
    "prefill": "request_prefill_time_seconds",
}


class _Engines(Collector):
    def __init__(self, peers: list[dict[str, Any]]) -> None:
        self._peers = peers
        self._workers = [
            ((peer["model"] or "", peer["name"]), peer)
            for peer in peers
            if peer["load"] is not None
        ]
        models = {peer["model"] for peer in peers if peer["model"]}
        self._only_model = models.pop() if len(models) == 1 else ""

    def collect(self) -> Iterator[Metric]:
        """Called by `generate_latest`."""
        yield from self._gauges()
        yield from self._counters()
        yield self._done()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            "vllm:num_requests_running", "Sequences in the engine's batch.", labels=_LABELS
        )
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting", "Sequences that wait for the batch.", labels=_LABELS
        )
        used = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "KV blocks in use; 1 is all of them.", labels=_LABELS
        )
        for labels, peer in self._workers:
            load = peer["load"]
            running.add_metric(labels, load.get("num_running", 0))
            waiting.add_metric(labels, load.get("num_waiting", 0))
            used.add_metric(labels, load.get("used_blocks", 0) / max(1, load.get("num_blocks", 0)))
        yield from (running, waiting, used)

    def _counters(self) -> Iterator[Metric]:
        for name, (key, help_text) in _COUNTERS.items():
            family = CounterMetricFamily(f"vllm:{name}", help_text, labels=_LABELS)
            for labels, peer in self._workers:
                family.add_metric(labels, peer["counters"].get(key, 0))
            yield family

    def _done(self) -> Metric:
        """Of completions, whose requests name a model."""
        family = CounterMetricFamily(
            "vllm:request_success", "Requests that were answered, by frontend.", labels=_LABELS
        )
        for peer in self._peers:
            done: dict[str, int] = {}
            for _, status, code, model, count in peer["request_counts"]:
                if model and status == 200 and code == OK:
                    done[model] = done.get(model, 0) + count
            for model, count in done.items():
                family.add_metric((model, peer["name"]), count)
        return family

    def _histograms(self) -> Iterator[Metric]:
        for key, name in _OF_WORKERS.items():
            rows = []
            for labels, worker in self._workers:
                parts = (
                    peer["histograms_by_worker"].get(worker["incarnation"], {})
                    for peer in self._peers
                )
                found = added_up({key: part[key]} for part in parts if key in part)
                rows += [(labels, row) for row in found.values()]
            yield histogram_family(
                f"vllm:{name}", "As meshserve's metric of the worker.", _LABELS, rows
            )
        for key, name in _OF_PROCESSORS.items():
            rows = [
                ((self._only_model, peer["name"]), peer["histograms"][key])
                for peer in self._peers
                if key in peer["histograms"]
            ]
            yield histogram_family(
                f"vllm:{name}", "As meshserve's metric of the processor.", _LABELS, rows
            )


def vllm_metrics_text(peers: list[dict[str, Any]]) -> bytes:
    """To follow those by meshserve's names."""
    return generate_latest(_Engines(peers))
