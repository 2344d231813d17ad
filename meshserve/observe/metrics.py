"""Metrics of the whole mesh in Prometheus' text format, from the status of every peer: one scrape of any frontend shows all peers."""

import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from meshserve.telemetry import BUCKETS_S

CONTENT_TYPE = CONTENT_TYPE_LATEST

_COUNTERS = {
    "tickets_pushed": "Prefill tickets sent, hedges included.",
    "tickets_hedged": "Times that others were asked too, as the preferred prefill workers did not claim in time.",
    "tickets_received": "Prefill tickets taken.",
    "tickets_refused": "Prefill tickets refused: the list is full, or their sender is unknown.",
    "tickets_struck": "Prefill tickets that became void before they were claimed.",
    "prefills_offered": "Short prompts that went with their ticket.",
    "prefills_begun_on_offer": "Of those that came here, the ones that were computed before they were claimed.",
    "claims_granted": "Claims that got their task.",
    "claims_gone": "Claims that came too late.",
    "prefill_tasks_done": "Prompts prefilled elsewhere.",
    "prefill_tasks_local": "Prompts that were to be prefilled elsewhere, and in the end were not.",
    "prefill_tasks_gave_up": "Prompts that took too many workers down.",
    "prefill_tasks_cancelled": "Prompts whose request was cancelled.",
    "prefill_attempts_failed": "Attempts at a prompt that failed.",
    "prefill_attempts_revoked": "Attempts that the decode worker revoked.",
    "requests_rerouted": "Requests that went to another decode worker.",
    "requests_migrated": "Of those, times that the other one went on with output that had begun.",
    "reservations_refused": "Handoffs that found no room in the decode worker's pool.",
    "kv_blocks_sent": "KV blocks sent.",
    "kv_blocks_received": "KV blocks taken in.",
    "kv_blocks_stale": "KV blocks of another attempt, which were dropped.",
    "kv_blocks_double": "KV blocks that were there already.",
    "kv_blocks_refused": "KV blocks with a wrong checksum, length or place.",
    "kv_checksum_failures": "Messages of KV with a wrong checksum.",
    "kv_bytes_sent": "Bytes of KV sent.",
    "kv_bytes_received": "Bytes of KV taken in.",
    "connections_refused": "HTTP connections beyond the limits.",
    "clients_timed_out": "HTTP clients that did not send the rest of their request in time.",
    "clients_too_slow": "HTTP clients that did not take in their answer.",
    "clients_gone": "HTTP clients that left before their answer was complete.",
    "requests_done": "Requests that came to their end, as processors see them.",
    "requests_failed": "Requests that ended in an error, as processors see them.",
    "requests_started_over": "Times that a request was started over at another processor, after the loss of one.",
    "requests_replayed": "Of those, times that the other one went on with a stream of which a part had left.",
    "requests_left": "Requests that their client left.",
    "requests_refused": "Requests that got no admission slot.",
    "requests_cancelled": "Requests that a client cancelled by id.",
    "otlp_requests_sent": "Requests whose spans an OpenTelemetry collector took.",
    "otlp_requests_dropped": "Requests whose spans it did not take, or for which there was no room.",
    "tokens_generated": "Tokens generated.",
    "prompt_tokens": "Prompt tokens of requests that a decode worker finished.",
    "prompt_tokens_cached": "Of those, the ones whose KV was on the worker when the request came.",
    "prefill_tokens": "Prompt tokens of prompts that a prefill worker computed for others.",
    "prefill_tokens_cached": "Of those, the ones whose KV it had.",
    "links_lost": "Connections of this peer to members that broke.",
    "connections_without_hello": "Connections that were dropped as their peer did not introduce itself in time.",
    "strangers_refused": "Connections without the mesh's key.",
}
"""Every peer shows these, at 0 if need be. A counter that is not listed here shows as soon as it counts."""

_GAUGES = {
    "num_tickets": ("prefill_queue_depth", "Prompts queued for prefill, claimed or not."),
    "num_running": ("running_sequences", "Sequences in the engine's batch."),
    "num_waiting": ("waiting_sequences", "Sequences that wait for the batch."),
    "waiting_prefill_tokens": ("waiting_prefill_tokens", "Prompt tokens still to be computed."),
    "used_blocks": ("kv_blocks_used", "KV blocks that running sequences hold."),
    "cached_blocks": ("kv_blocks_cached", "KV blocks that can be found again."),
    "num_blocks": ("kv_blocks", "KV blocks in all."),
}

_HISTOGRAMS = {
    "ttft": ("time_to_first_token", "From a request's arrival at its processor to its first token there."),
    "itl": ("inter_token_latency", "Between the tokens of one step and those of the next, at the processor."),
    "e2e": ("request_duration", "From a request's arrival at its processor to its end, of those that came to it."),
    "route": ("route", "Of a request: until a worker was chosen."),
    "queue": ("queue", "Of a request: waiting for prefill or for the batch, and the time at workers that were lost."),
    "prefill": ("prefill", "Of a request: computing its prompt's KV, wherever that was done."),
    "prefill_wait": ("prefill_wait", "From the first ticket to the claim that got the prompt."),
    "prefill_compute": ("prefill_compute", "Of a prompt that was prefilled elsewhere, by that worker's clock."),
    "kv_transfer": ("kv_transfer", "From the claim to the last block, less what was computing."),
}
"""By the name in the mesh: the name for Prometheus, and the help. A histogram shows once a duration was observed."""

_BY_WORKER = {
    "ttft": ("worker_time_to_first_token", "Of one worker: from its requests' arrival at this processor to their first token."),
    "itl": ("worker_inter_token_latency", "Of one worker: between the tokens of one step and those of the next, at this processor."),
}
"""Families of their own, so that a sum over all labels counts nothing twice. Each processor has series of its own, as a worker's sum over
processors would fall when a processor leaves. The series of a worker end when the worker does."""

_PROCESS = {
    "cpu_seconds": (CounterMetricFamily, "User and system CPU time of the peer's process."),
    "start_time_seconds": (GaugeMetricFamily, "When the peer's process began, in seconds of the epoch."),
    "resident_memory_bytes": (GaugeMetricFamily, "Resident memory."),
    "virtual_memory_bytes": (GaugeMetricFamily, "Virtual memory."),
    "open_fds": (GaugeMetricFamily, "Open file descriptors."),
    "max_fds": (GaugeMetricFamily, "File descriptors that the process may open; -1 is no limit."),
}

_LABELS = ("peer", "incarnation", "mesh", "model")
"""Of every series. The model is the one that the peer's engine serves; empty, which is the same as absent, on peers without an engine."""
_NAME = re.compile("[a-z][a-z0-9_]{0,62}")
"""Of a counter that is not listed here, as newer peers may have."""


class _Mesh(Collector):
    """The peers as `list_peers` gives them, as metric families."""

    def __init__(self, peers: list[dict[str, Any]]) -> None:
        self._peers = [((peer["name"], peer["incarnation"], peer["mesh"], peer["model"] or ""), peer) for peer in peers]

    def collect(self) -> Iterator[Metric]:
        """Called by `generate_latest`."""
        up = GaugeMetricFamily("meshserve_peer_up", "1 if the peer answered this scrape.", labels=(*_LABELS, "state", "roles"))
        help_text = "What a peer holds for requests at this moment, and their connections."
        held = GaugeMetricFamily("meshserve_held", help_text, labels=(*_LABELS, "kind"))
        for labels, peer in self._peers:
            up.add_metric((*labels, peer["state"], ",".join(peer["roles"])), float(peer["rtt_ms"] is not None))
            for kind, level in peer["held"].items():
                held.add_metric((*labels, kind), level)
        yield up
        yield from self._builds()
        yield from self._counters()
        yield self._http_requests()
        yield from self._gauges()
        yield held
        yield from self._histograms()
        yield from self._by_worker()
        yield from self._processes()

    def _builds(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("meshserve_build_info", "Always 1: which version each peer runs.", labels=(*_LABELS, "version"))
        for labels, peer in self._peers:
            family.add_metric((*labels, peer["version"]), 1.0)
        yield family

    def _http_requests(self) -> Metric:
        """The model is the one that was asked for."""
        help_text = "HTTP requests, by route, status, code of the error (or ok) and model. What the mesh does not know is other."
        family = CounterMetricFamily("meshserve_http_requests", help_text, labels=(*_LABELS, "route", "status", "code"))
        for (*labels, _), peer in self._peers:
            for route, status, code, model, count in peer["request_counts"]:
                family.add_metric((*labels, model, route, str(status), code), count)
        return family

    def _processes(self) -> Iterator[Metric]:
        for name, (kind, help_text) in _PROCESS.items():
            family = kind(f"process_{name}", help_text, labels=_LABELS)
            for labels, peer in self._peers:
                if name in peer["process"]:
                    family.add_metric(labels, peer["process"][name])
            yield family

    def _counters(self) -> Iterator[Metric]:
        named = {name for _, peer in self._peers for name in peer["counters"] if _NAME.fullmatch(name)}
        extra = sorted(named - _COUNTERS.keys())
        for name in (*_COUNTERS, *extra):
            family = CounterMetricFamily(f"meshserve_{name}", _COUNTERS.get(name, name.replace("_", " ") + "."), labels=_LABELS)
            for labels, peer in self._peers:
                if name in peer["counters"] or (name in _COUNTERS and peer["rtt_ms"] is not None):
                    family.add_metric(labels, peer["counters"].get(name, 0))
            yield family

    def _gauges(self) -> Iterator[Metric]:
        for key, (name, help_text) in _GAUGES.items():
            family = GaugeMetricFamily(f"meshserve_{name}", help_text, labels=_LABELS)
            for labels, peer in self._peers:
                if peer["load"] is not None:
                    family.add_metric(labels, peer["load"].get(key, 0))
            yield family

    def _histograms(self) -> Iterator[Metric]:
        for key, (name, help_text) in _HISTOGRAMS.items():
            rows = [(labels, peer["histograms"][key]) for labels, peer in self._peers if key in peer["histograms"]]
            yield histogram_family(f"meshserve_{name}_seconds", help_text, _LABELS, rows)

    def _by_worker(self) -> Iterator[Metric]:
        workers = {peer["incarnation"]: (peer["name"], peer["model"] or "") for _, peer in self._peers}
        for key, (name, help_text) in _BY_WORKER.items():
            rows = [
                ((*labels, workers[worker][1], workers[worker][0], worker), histograms[key])
                for (*labels, _), peer in self._peers
                for worker, histograms in peer["histograms_by_worker"].items()
                if key in histograms and worker in workers
            ]
            yield histogram_family(f"meshserve_{name}_seconds", help_text, (*_LABELS, "worker", "worker_incarnation"), rows)


def histogram_family(name: str, help_text: str, labels: tuple[str, ...], rows: list[Any]) -> Metric:
    """Rows are those of :meth:`~meshserve.telemetry.Histogram.to_row`, each with the values of its labels."""
    family = HistogramMetricFamily(name, help_text, labels=labels)
    for values, (sum_s, counts) in rows:
        # Prometheus counts what does not exceed a bound, meshserve what lies between two
        cumulated = zip((*map(str, BUCKETS_S), "+Inf"), map(float, accumulate(counts)), strict=True)
        family.add_metric(values, list(cumulated), sum_s)
    return family


def metrics_text(peers: list[dict[str, Any]]) -> bytes:
    """The metrics by meshserve's names."""
    return generate_latest(_Mesh(peers))
