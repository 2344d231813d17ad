"""Receipts as spans, sent to an OpenTelemetry collector: OTLP over HTTP, as JSON.

Names and attributes follow OpenTelemetry's semantic conventions 1.37: the frontend's span those of
HTTP servers, the processor's those of generative AI (inference), which are in development. Phases are
spans of our own. An error of the client's (4xx) is no error of the server's span.

Durations are measured on monotonic clocks; only the place of a trace in time is by the wall clock of
the peer that sends it. So a trace is whole whatever the clocks of other hosts say.

Written over the standard library: the OpenTelemetry project's own exporter brings 16 packages, 256
modules and 14 MiB (measured, with opentelemetry-exporter-otlp-proto-http 1.x), and a thread and clock
of its own for spans that end as they are told. One POST of a small document is all that is needed.
"""

import asyncio
import gzip
import http.client
import json
import logging
import secrets
import ssl
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from meshserve import __version__
from meshserve.config import OtlpConfig
from meshserve.errors import StartupFailed, http_status_of
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipts import OK, FrontendReceipt, Receipt, partition
from meshserve.wire.completion import TraceContext, read_traceparent

_log = logging.getLogger(__name__)

_MAX_QUEUED = 2048
"""Requests whose spans wait. Higher bridges a longer silence of the collector, lower holds less memory."""
_MAX_BATCH = 128
_GATHER_S = 0.5
"""Requests that end within it leave in one message."""
_CLOSE_S = 1.0
"""For the last spans of a peer that stops."""

SCHEMA_URL = "https://opentelemetry.io/schemas/1.37.0"
_INTERNAL, _SERVER, _CLIENT, _ERROR = 1, 2, 3, 2
_OPERATIONS = {"chat": "chat", "completion": "text_completion"}
"""By the kind of the request."""
_NS_PER_MS = 1e6
_ROLE_OF_PHASE = {"process": "processor", "route": "router", "network": "", "queue": "decode", "prefill": "prefill"}
_ROLE_OF_PHASE |= {"kv_transfer": "prefill", "decode": "decode"}
"""Which role worked, in the order of the path. The network's time, there and back, is one span."""

Span = dict[str, Any]
Render = Callable[[], list[Span]]


class Exporter:
    """Takes spans of requests that are over. Taking never waits: spans that find no room, or that the
    collector does not take, are counted by request (`otlp_requests_dropped`).
    """

    def __init__(self, mesh: Mesh, config: OtlpConfig) -> None:
        """Send from now on. Raises StartupFailed for certificates that cannot be used."""
        self._mesh, self._config, self._tls = mesh, config, _tls_of(config)
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Render] = deque()
        self._wake = asyncio.Event()
        self._is_failing = False
        self._task = self._loop.create_task(self._run())

    # --- requests

    def trace(self, receipt: FrontendReceipt) -> str:
        """The `traceparent` for the processor of a request that a frontend took in: the parent span is
        this frontend's."""
        given = read_traceparent(receipt.traceparent)
        trace_id, is_sampled = (given.trace_id, given.is_sampled) if given else (secrets.token_hex(16), True)
        receipt.passed_on = str(TraceContext(trace_id, secrets.token_hex(8), is_sampled))
        return receipt.passed_on

    def frontend_ended(self, receipt: FrontendReceipt, http: Mapping[str, Any]) -> None:
        """A frontend's part of a request is over. `http` are the attributes of the HTTP request."""
        own = read_traceparent(receipt.passed_on or self.trace(receipt))  # refused before it had one
        parent = read_traceparent(receipt.traceparent)
        if own is not None and own.is_sampled:
            ended_ns, name, parent_id = time.time_ns(), self._mesh.own.name, parent.span_id if parent else ""
            self._offer(lambda: [frontend_span(receipt, http, ended_ns, own, parent_id, name)])

    def request_ended(self, receipt: Receipt) -> None:
        """A request is over. A request without a trace begins its own, which its receipt names."""
        parent = read_traceparent(receipt.traceparent)
        if parent is not None and not parent.is_sampled:
            return
        own = TraceContext(parent.trace_id if parent else secrets.token_hex(16), secrets.token_hex(8))
        receipt.traceparent = receipt.traceparent or str(own)
        ended_ns, parent_id = time.time_ns(), parent.span_id if parent else ""
        self._offer(lambda: receipt_spans(receipt, ended_ns, own, parent_id))

    # --- sending

    def _offer(self, render: Render) -> None:
        if len(self._queue) >= _MAX_QUEUED:
            self._mesh.counters.add("otlp_requests_dropped")
            return
        self._queue.append(render)
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(_GATHER_S)
            self._wake.clear()
            while self._queue:
                await self._send()

    async def _send(self) -> None:
        batch = [self._queue.popleft() for _ in range(min(_MAX_BATCH, len(self._queue)))]
        try:
            # on a thread: rendering takes some 50 us a request, and a collector takes its time
            await self._loop.run_in_executor(None, self._post, batch)
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._mesh.counters.add("otlp_requests_dropped", len(batch))
            if not self._is_failing:
                words = "the collector at %s takes no spans (%s): they are dropped and counted until it does"
                _log.warning(words, self._config.url, error)
            self._is_failing = True
            return
        self._mesh.counters.add("otlp_requests_sent", len(batch))
        self._is_failing = False

    def _post(self, batch: list[Render]) -> None:
        config, mesh = self._config, self._mesh
        resource = {
            "service.name": "meshserve",
            "service.version": __version__,
            "service.instance.id": mesh.incarnation,
            "meshserve.mesh": mesh.config.mesh,
            "meshserve.peer": mesh.own.name,
            **dict(config.resource),
        }
        body = export_body([span for render in batch for span in render()], resource, __version__)
        data = json.dumps(body).encode()
        headers = {"user-agent": f"meshserve/{__version__}", **dict(config.headers)}
        headers["content-type"] = "application/json"
        if config.is_compressed:
            data, headers["content-encoding"] = gzip.compress(data), "gzip"
        request = urllib.request.Request(config.url, data, headers)
        with urllib.request.urlopen(
            request, timeout=config.timeout_s, context=self._tls
        ) as response:
            response.read()

    async def close(self) -> None:
        """Send the spans that wait, if that takes less than a second."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                while self._queue and not self._is_failing:
                    await self._send()
        except TimeoutError:
            self._mesh.counters.add("otlp_requests_dropped", len(self._queue))
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


# --- spans: OTLP's JSON form (opentelemetry-proto 1.x, `ExportTraceServiceRequest`)


def receipt_spans(receipt: Receipt, ended_ns: int, own: TraceContext, parent_id: str) -> list[Span]:
    """A span for the request, `own`, and one for each phase that took time; `ended_ns` is of the epoch."""
    began_ns = ended_ns - int(receipt.total_ms * _NS_PER_MS)
    operation = _OPERATIONS.get(receipt.kind, "chat")
    attributes = {
        "meshserve.request_id": receipt.request_id,
        "meshserve.client_id": receipt.client_id,
        "meshserve.policy": receipt.policy,
        "meshserve.outcome": receipt.outcome,
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "meshserve",
        "gen_ai.request.model": receipt.model,
        "gen_ai.response.model": receipt.model,
        **({"gen_ai.response.finish_reasons": [receipt.reason]} if receipt.reason else {}),
        "gen_ai.usage.input_tokens": receipt.num_prompt_tokens,
        "gen_ai.usage.output_tokens": receipt.num_completion_tokens,
        "meshserve.cached_tokens": receipt.num_cached_tokens,
        **{f"meshserve.{role}": name for role, name in receipt.peers.items() if name},
    }
    name = f"{operation} {receipt.model}"
    whole = _span(name, own, parent_id, _CLIENT, began_ns, ended_ns, attributes)
    return [_with_status(whole, receipt), *_phases(receipt, began_ns, own)]


def _phases(receipt: Receipt, began_ns: int, own: TraceContext) -> Iterator[Span]:
    """Phases stand one after the other, since they partition the time of the request."""
    phases_ms, peers = partition(asdict(receipt.phases_ms), receipt.total_ms), receipt.peers
    for phase, role in _ROLE_OF_PHASE.items():
        ended_ns = began_ns + int(phases_ms[phase] * _NS_PER_MS)
        if ended_ns > began_ns:
            peer = peers.get(role) or (peers["decode"] if role == "prefill" else None)
            context = own._replace(span_id=secrets.token_hex(8))
            attributes = {"meshserve.peer": peer or ""}
            yield _span(f"meshserve.{phase}", context, own.span_id, _INTERNAL, began_ns, ended_ns, attributes)
            began_ns = ended_ns


def frontend_span(
    receipt: FrontendReceipt,
    http: Mapping[str, Any],
    ended_ns: int,
    own: TraceContext,
    parent_id: str,
    frontend: str,
) -> Span:
    """A frontend's part: all of the request as its client saw it."""
    part = receipt.to_wire(frontend)
    began_ns = ended_ns - int(part["total_ms"] * _NS_PER_MS)
    attributes = {
        **http,
        "meshserve.request_id": receipt.request_id,
        "meshserve.client_id": receipt.client_id,
        "meshserve.frontend": frontend,
        "meshserve.outcome": receipt.outcome,
        "meshserve.http_ms": part["http_ms"],
        "meshserve.queue_ms": part["queue_ms"],
    }
    name = f"{http.get('http.request.method', 'HTTP')} {http.get('http.route', '')}".rstrip()
    whole = _span(name, own, parent_id, _SERVER, began_ns, ended_ns, attributes)
    return _with_status(whole, receipt)


def _with_status(span: Span, receipt: Receipt | FrontendReceipt) -> Span:
    """What the client did wrong, or wanted no more, is named, and is no error of the server's."""
    if receipt.outcome == OK:
        return span
    named = {**span, "attributes": [*span["attributes"], *_attributes({"error.type": receipt.outcome})]}
    is_error = (http_status_of(receipt.outcome) or 500) >= 500
    return {**named, "status": {"code": _ERROR, "message": receipt.error}} if is_error else named


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
    if isinstance(value, list):
        return {"arrayValue": {"values": [_value(item) for item in value]}}
    if isinstance(value, int):
        return {"intValue": str(value)}  # integers are strings in protobuf's JSON
    return {"doubleValue": value} if isinstance(value, float) else {"stringValue": str(value)}


def export_body(spans: list[Span], resource: Mapping[str, str], version: str) -> dict[str, Any]:
    """The document for `/v1/traces`."""
    scope = {
        "scope": {"name": "meshserve", "version": version},
        "spans": spans,
        "schemaUrl": SCHEMA_URL,
    }
    of_peer = {"attributes": _attributes(resource)}
    return {
        "resourceSpans": [{"resource": of_peer, "scopeSpans": [scope], "schemaUrl": SCHEMA_URL}]
    }


def _tls_of(config: OtlpConfig) -> ssl.SSLContext | None:
    """None for the system's defaults."""
    if config.ca_file is None and config.client_cert is None:
        return None
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
        if config.client_cert is not None:
            context.load_cert_chain(config.client_cert, config.client_key)
    except OSError as error:  # ssl.SSLError is one
        words = "the certificates of OTEL_EXPORTER_OTLP_* cannot be used"
        raise StartupFailed(f"{words}: {error.strerror or error}") from error
    return context
