"""Spans on their way to an OpenTelemetry collector (`--otlp URL`): OTLP over HTTP, as JSON.

Written over the standard library: the OpenTelemetry project's own exporter brings 16 packages, 256 modules and 14 MiB (measured, with
opentelemetry-exporter-otlp-proto-http 1.x) and a thread and clock of its own for spans that end as they are told; what is needed here is
one POST of a small document that every collector takes.
"""

import asyncio
import http.client
import json
import logging
import secrets
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable

from meshserve import __version__
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipts import Front, Receipt
from meshserve.observe.spans import MAX_PHASE_SPANS, Span, export_body, front_span, receipt_spans
from meshserve.wire.completion import TraceContext, read_traceparent

_log = logging.getLogger(__name__)

_MAX_QUEUED = 2048
"""Requests whose spans wait. Higher bridges a longer silence of the collector, lower holds less memory."""
_MAX_BATCH = 128
_GATHER_S = 0.5
"""What ends within it leaves as one message."""
_POST_TIMEOUT_S = 2.0
_LAST_WORDS_S = 1.0
"""What a peer that stops waits for its last spans to leave."""

Render = Callable[[], list[Span]]


class Exporter:
    """Takes spans of requests that are over. Taking never waits: what finds no room is counted (`otlp_requests_dropped`), and so is what
    the collector does not take.
    """

    def __init__(self, mesh: Mesh, url: str) -> None:
        """Send to `URL/v1/traces` from now on."""
        self._mesh, self._url = mesh, url.rstrip("/") + "/v1/traces"
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Render] = deque()
        self._wake = asyncio.Event()
        self._is_failing = False
        self._task = self._loop.create_task(self._run())

    # --- what is told of

    def trace(self, front: Front) -> str:
        """Of a request that a frontend took in: the `traceparent` that its processor gets, whose span is this frontend's."""
        given = read_traceparent(front.traceparent)
        trace_id, is_sampled = (given.trace_id, given.is_sampled) if given else (secrets.token_hex(16), True)
        front.passed_on = str(TraceContext(trace_id, secrets.token_hex(8), is_sampled))
        return front.passed_on

    def front_ended(self, front: Front) -> None:
        """A frontend's part of a request is over."""
        own, parent = read_traceparent(front.passed_on), read_traceparent(front.traceparent)
        if own is not None and own.is_sampled:
            ended_ns, name, parent_id = time.time_ns(), self._mesh.own.name, parent.span_id if parent else ""
            self._offer(lambda: [front_span(front, ended_ns, own, parent_id, name)])

    def request_ended(self, receipt: Receipt) -> None:
        """A request is over; one that came without a trace begins its own, and its receipt says which."""
        parent = read_traceparent(receipt.traceparent)
        if parent is not None and not parent.is_sampled:
            return
        own = TraceContext(parent.trace_id if parent else secrets.token_hex(16), secrets.token_hex(8))
        receipt.traceparent = receipt.traceparent or str(own)
        ended_ns, parent_id = time.time_ns(), parent.span_id if parent else ""
        ids = [secrets.token_hex(8) for _ in range(MAX_PHASE_SPANS)]
        self._offer(lambda: receipt_spans(receipt, ended_ns, own, parent_id, ids))

    # --- how it leaves

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
            await self._loop.run_in_executor(None, self._post, batch)
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._mesh.counters.add("otlp_requests_dropped", len(batch))
            if not self._is_failing:
                _log.warning("--otlp %s takes no spans (%s): they are dropped and counted until it does", self._url, error)
            self._is_failing = True
            return
        self._mesh.counters.add("otlp_requests_sent", len(batch))
        self._is_failing = False

    def _post(self, batch: list[Render]) -> None:
        """On a thread: rendering takes some 50 us a request, and a collector takes its time."""
        resource = {"service.name": "meshserve", "service.instance.id": self._mesh.incarnation, "meshserve.mesh": self._mesh.config.mesh}
        body = export_body([span for render in batch for span in render()], resource, __version__)
        headers = {"content-type": "application/json", "user-agent": f"meshserve/{__version__}"}
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=_POST_TIMEOUT_S) as response:
            response.read()

    async def close(self) -> None:
        """Send what waits, if it can be sent within a second."""
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                while self._queue and not self._is_failing:
                    await self._send()
        except TimeoutError:
            self._mesh.counters.add("otlp_requests_dropped", len(self._queue))
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
