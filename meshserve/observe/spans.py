"""Receipts as spans of OpenTelemetry, in OTLP's JSON form (opentelemetry-proto 1.x, `ExportTraceServiceRequest`). Pure.

Durations were measured on monotonic clocks; only where they lie is by the wall clock of the peer that tells of them. So a trace is whole
whatever the clocks of other hosts say, and the phases of a request stand one after the other, as they partition its time.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from meshserve.observe.receipts import OK, Front, Receipt, partition
from meshserve.wire.completion import TraceContext

Span = dict[str, Any]

_INTERNAL, _SERVER, _ERROR = 1, 2, 2
_NS_PER_MS = 1e6

_PHASES = (("process", "processor"), ("route", "router"), ("network", ""), ("queue", "decode"), ("prefill", "prefill"))
_LATER = (("kv_transfer", "prefill"), ("decode", "decode"))
"""In the order of the path, with the role that worked. What crossed the network there and back is one span."""


def receipt_spans(receipt: Receipt, ended_ns: int, own: TraceContext, parent_id: str, ids: Sequence[str]) -> list[Span]:
    """A span for the request, `own`, and one for each phase that took time, named by `ids` in order; `ended_ns` is of the epoch."""
    began_ns = ended_ns - int(receipt.total_ms * _NS_PER_MS)
    attributes = {
        "meshserve.request_id": receipt.request_id,
        "meshserve.client_id": receipt.client_id,
        "meshserve.policy": receipt.policy,
        "meshserve.outcome": receipt.outcome,
        "gen_ai.request.model": receipt.model,
        "gen_ai.usage.input_tokens": receipt.num_prompt_tokens,
        "gen_ai.usage.output_tokens": receipt.num_completion_tokens,
        "meshserve.cached_tokens": receipt.num_cached_tokens,
        **{f"meshserve.{role}": name for role, name in receipt.peers.items() if name},
    }
    whole = _span("meshserve.request", own, parent_id, _SERVER, began_ns, ended_ns, attributes)
    if receipt.outcome != OK:
        whole["status"] = {"code": _ERROR, "message": receipt.error}
    return [whole, *_phases(receipt, began_ns, own, iter(ids))]


def _phases(receipt: Receipt, began_ns: int, own: TraceContext, ids: Iterator[str]) -> Iterator[Span]:
    phases_ms, peers = partition(receipt.phases_ms.to_dict(), receipt.total_ms), receipt.peers
    for phase, role in (*_PHASES, *_LATER):
        took_ns = int(phases_ms[phase] * _NS_PER_MS)
        if took_ns:
            peer = peers.get(role) or (peers["decode"] if role == "prefill" else None)
            context = own._replace(span_id=next(ids))
            yield _span(f"meshserve.{phase}", context, own.span_id, _INTERNAL, began_ns, began_ns + took_ns, {"meshserve.peer": peer or ""})
            began_ns += took_ns


MAX_PHASE_SPANS = len(_PHASES) + len(_LATER)


def front_span(front: Front, ended_ns: int, own: TraceContext, parent_id: str, frontend: str) -> Span:
    """A frontend's part: all of the request as its client saw it."""
    part = front.to_wire(frontend)
    began_ns = ended_ns - int(part["total_ms"] * _NS_PER_MS)
    attributes = {
        "meshserve.request_id": front.request_id,
        "meshserve.client_id": front.client_id,
        "meshserve.frontend": frontend,
        "meshserve.outcome": front.outcome,
        "meshserve.http_ms": part["http_ms"],
        "meshserve.queue_ms": part["queue_ms"],
    }
    span = _span("meshserve.http", own, parent_id, _SERVER, began_ns, ended_ns, attributes)
    if front.outcome != OK:
        span["status"] = {"code": _ERROR, "message": front.error}
    return span


def _span(name: str, own: TraceContext, parent_id: str, kind: int, began_ns: int, ended_ns: int, attributes: Mapping[str, Any]) -> Span:
    return {
        "traceId": own.trace_id,
        "spanId": own.span_id,
        **({"parentSpanId": parent_id} if parent_id else {}),
        "name": name,
        "kind": kind,
        "startTimeUnixNano": str(began_ns),
        "endTimeUnixNano": str(ended_ns),
        "attributes": _attributes(attributes),
    }


def _attributes(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in values.items()]


def _value(value: Any) -> dict[str, Any]:
    """Whole numbers are strings in protobuf's JSON."""
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"doubleValue": value} if isinstance(value, float) else {"stringValue": str(value)}


def export_body(spans: list[Span], resource: Mapping[str, str], version: str) -> dict[str, Any]:
    """What is posted to `/v1/traces`."""
    scope = {"scope": {"name": "meshserve", "version": version}, "spans": spans}
    return {"resourceSpans": [{"resource": {"attributes": _attributes(resource)}, "scopeSpans": [scope]}]}
