"""Requests for completions, each from its body to the last byte of its answer.

No task stands behind an exchange: it is called, and never waits. It is the sink of the processor's stream, and writes what came once the
turn of the event loop is over, so that all text of one turn leaves in one write. A client that goes away cancels its request at every hop.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from meshserve.errors import Cancelled, Draining, InvalidRequest, MeshserveError, NoWorker, Overloaded, PeerLost, RequestTimedOut
from meshserve.mesh.calls import OutgoingCall
from meshserve.observe.receipts import FrontendReceipt, with_frontend
from meshserve.roles.frontend import apis
from meshserve.roles.frontend.admission import QueueEntry
from meshserve.roles.frontend.completions import Completions
from meshserve.roles.frontend.http.connection import Connection
from meshserve.roles.frontend.http.messages import Request
from meshserve.roles.frontend.models.common import MAX_SESSION_CHARACTERS, Parsed, ResponseOptions
from meshserve.roles.frontend.models.completions import parse_generate
from meshserve.roles.frontend.models.fields import header_line
from meshserve.roles.frontend.models.reading import SHORT_BODY_BYTES, check_json
from meshserve.roles.frontend.writers import Api, Writer
from meshserve.wire.completion import CompletionRequest, Ending, read_traceparent
from meshserve.wire.messages import COMPLETE
from meshserve.wire.structs import replace

_log = logging.getLogger(__name__)

_MAX_LABEL_BYTES = 128
_TIMEOUT_HEADER = "x-request-timeout"
_HEEDED_HEADERS = frozenset((b"x-request-timeout", b"x-session-id", b"traceparent"))
MIN_TIMEOUT_S = 0.001
_MAX_STARTS = 4
"""Of one request at processors, one after the other."""
_LOOK_AGAIN_S = 0.05
"""Until another look for a processor, while those that are known are out of reach."""


class Exchange(QueueEntry):
    """One request and its answer. It waits for its admission slots itself."""

    __slots__ = (
        "_api",
        "_call",
        "_completions",
        "_connection",
        "_end",
        "_error",
        "_has_slots",
        "_http",
        "_is_due",
        "_is_over",
        "_items",
        "_label",
        "_num_starts",
        "_options",
        "_receipt",
        "_request",
        "_waits_until_s",
        "_writer",
    )

    def __init__(self, completions: Completions, api: Api, http: Request) -> None:
        super().__init__(http.client, 1, http.began_s)
        self._completions, self._api, self._http = completions, api, http
        label = http.headers.get(b"x-request-id", b"")[:_MAX_LABEL_BYTES]
        self._receipt = FrontendReceipt(completions.new_id(), label.decode("latin-1"), http.began_s)
        self._label = b"x-request-id: %b\r\n" % (label or self._receipt.request_id.encode())
        self._connection: Connection
        self._request: CompletionRequest
        self._options: ResponseOptions
        self._writer: Writer
        self._num_starts, self._waits_until_s = 0, 0.0
        self._call: OutgoingCall | None = None
        self._items: list[Any] = []
        self._end: Any = None
        self._error: MeshserveError | None = None
        self._has_slots = self._is_due = self._is_over = False

    # --- to a processor

    def begin(self, connection: Connection) -> None:
        """The body is there: parse it, and go on. A long one is parsed in a thread: the tokens of other requests need not wait for it."""
        self._connection = connection
        self._completions.num_open += 1
        if len(self._http.body) <= SHORT_BODY_BYTES:
            self.run(self._parse)
        else:
            parsing = self._completions.loop.run_in_executor(None, self._parse)
            parsing.add_done_callback(lambda done: self.run(done.result))

    def _parse(self) -> Parsed:
        check_json(self._http.body)
        return self._api.parse(self._http.body, self._receipt.request_id, self._receipt.client_id)

    def run(self, parse: Callable[[], Parsed]) -> None:
        """The steps of a request. The answer comes back to `on_item`, `on_end` and `on_error`, and `flush` writes it."""
        completions, receipt = self._completions, self._receipt
        try:
            # What is asked, and how it will be answered.
            request, self._options = parse()  # raises InvalidRequest
            if self._options.ignored:
                self._http.extra_headers += header_line(self._options.ignored)
            self.arrived_s = time.monotonic()
            receipt.client_id, receipt.model, receipt.asked_s = request.client_id, request.model, self.arrived_s
            if self._is_over:  # the client left while a long body was parsed
                return
            self.deadline_s = receipt.began_s + completions.config.request_timeout_s
            if completions.exporter is not None or not _HEEDED_HEADERS.isdisjoint(self._http.headers):
                request = self._with_headers(request)  # raises InvalidRequest
            self._request = request
            self._writer = self._api.writer(int(time.time()), request, self._options)
            # Whether this frontend takes it in.
            if completions.mesh.own.is_draining:
                raise Draining("this frontend is shutting down")
            if completions.num_open > (most := completions.config.max_requests):
                raise Overloaded(f"this frontend has {most} requests under way; try again")
            completions.under_way.open[receipt.request_id] = receipt.client_id, self.stop
            # Whether the mesh has room for it, then on to a processor: now, or once `admitted` is called.
            self.weight, self._has_slots = request.num_choices, True
            if completions.slots.ask(self, request.model):  # raises Overloaded or RateLimited
                self.admitted()
        except MeshserveError as error:
            self.refuse(error)
        except Exception:  # nobody else's request must suffer
            self._went_wrong()
        finally:
            del parse  # a thread's future holds its error, and the error this call: only the collector could free both

    def _with_headers(self, request: CompletionRequest) -> CompletionRequest:
        """Apply what the headers ask for: how long it may take, whose session it is, and of which trace. Raises InvalidRequest."""
        headers, receipt, exporter = self._http.headers, self._receipt, self._completions.exporter
        if (given := headers.get(b"x-request-timeout")) is not None:
            most_s = self._completions.config.request_timeout_s
            self.deadline_s = receipt.began_s + _request_timeout_s(given, most_s)
        if session := headers.get(b"x-session-id"):
            request = replace(request, session=session.decode("latin-1")[:MAX_SESSION_CHARACTERS])
        if trace := headers.get(b"traceparent", b"").decode("latin-1"):
            receipt.traceparent = trace if read_traceparent(trace) is not None else ""
        traceparent = receipt.traceparent if exporter is None else exporter.trace(receipt)
        return replace(request, traceparent=traceparent) if traceparent else request

    def admitted(self) -> None:
        """The request has its slots: ask a processor."""
        completions = self._completions
        try:
            peer = completions.processor()
            self._receipt.passed_s = now_s = time.monotonic()
            self._call = completions.mesh.open(peer, COMPLETE, self._request, self, max(0.001, self.deadline_s - now_s))
            self._num_starts, self._waits_until_s = self._num_starts + 1, 0.0
        except (NoWorker, PeerLost) as error:
            if self._may_wait(error):
                completions.loop.call_later(_LOOK_AGAIN_S, self._ask_again)
            else:
                self.on_error(error)
        except MeshserveError as error:
            self.on_error(error)
        except Exception:
            self._went_wrong()

    # --- what comes from the processor

    def on_item(self, item: Any) -> None:
        self._items.append(item)
        if self._writer.is_stream and not self._is_due:  # else all of it is written at the end
            self._is_due = True  # `_flush_soon` in line: each token passes here
            self._completions.mesh.turn.afterwards(self.flush)

    def on_items(self, items: list[Any]) -> None:
        """Several at once."""
        self._items += items
        if self._writer.is_stream:
            self._flush_soon()

    def on_end(self, value: Any) -> None:
        self._end, self._receipt.answered_s = value if value is not None else (), time.monotonic()
        self._flush_soon()

    def on_error(self, error: MeshserveError) -> None:
        if self._call is not None and self._can_start_over(error, self._call.peer):
            self._start_over()
            return
        self._error = error
        self._give_slots_back()
        self._flush_soon()

    def _can_start_over(self, error: MeshserveError, processor: str) -> bool:
        """Whether the processor is gone, or its connection, and nothing of its answer has left."""
        if self._is_over or self._connection.is_started or self._num_starts >= _MAX_STARTS:
            return False
        if error.code == Draining.code:
            return True
        # of a processor that is there, it is a worker's loss that it tells of
        return error.code == PeerLost.code and not self._completions.mesh.is_linked(processor)

    def _start_over(self) -> None:
        """Under another id, as workers may still have the request of before."""
        completions, receipt = self._completions, self._receipt
        completions.mesh.counters.add("requests_started_over")
        open_requests, before, self._call, self._items = completions.under_way.open, receipt.request_id, None, []
        receipt.request_id = completions.new_id()
        if not self._http.headers.get(b"x-request-id"):
            self._label = b"x-request-id: %b\r\n" % receipt.request_id.encode()
        open_requests[receipt.request_id] = open_requests.pop(before)
        self._request = replace(self._request, request_id=receipt.request_id)
        self._writer = self._api.writer(int(time.time()), self._request, self._options)
        self.admitted()

    def _may_wait(self, error: MeshserveError) -> bool:
        """Whether a processor may be reached in a moment: a connection that was lost just now is made anew, or a stall ends."""
        mesh, now_s = self._completions.mesh, time.monotonic()
        if not self._waits_until_s:
            self._waits_until_s = now_s + mesh.config.failure_timeout_s
        is_known = isinstance(error, PeerLost) or bool(mesh.silent_peers_with("processor"))
        return is_known and now_s < self._waits_until_s

    def _ask_again(self) -> None:
        if not self._is_over and self._error is None:
            self.admitted()

    def stop(self, error: MeshserveError) -> None:
        """Cancel at every hop; the client is told why. Harmless after the end."""
        if self._end is None and self._error is None and not self._is_over:
            if self._call is not None:
                self._call.cancel()
            self.on_error(error)

    def client_gone(self) -> None:
        """Cancel at every hop; there is nobody to tell."""
        if not self._is_over:
            self._completions.mesh.counters.add("clients_gone")
            self._receipt.failed(Cancelled("the client left"))
            self._finish()

    # --- what goes to the client

    def _flush_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._completions.mesh.turn.afterwards(self.flush)

    def flush(self) -> None:
        """Write all that is there, unless the client still has to take in what was written: then the connection calls again."""
        self._is_due = False
        if self._is_over:
            return
        if self._connection.is_stuck:
            if self._end is not None or self._error is not None:
                self._give_slots_back()  # a client that reads slowly holds no slots
            elif len(self._items) > self._completions.config.frontend.max_unread_texts:
                self.stop(RequestTimedOut("the client takes its answer in too slowly"))
            return
        try:
            if self._error is not None and not self._connection.is_started:
                self.refuse(self._error)
            elif self._writer.is_stream:
                self._write_stream()
            elif self._end is not None:
                self._writer.feed(self._items)
                body = self._writer.end(self._ending())
                self._connection.respond(200, self._writer.headers + self._label, body)
                self._finish()
        except MeshserveError as error:
            self.refuse(error)
        except Exception:
            self._went_wrong()

    def _write_stream(self) -> None:
        """Write what the items come to, and the end or the error if it has come.

        The head goes out with the first text, so that what fails before it is an HTTP error and not a broken stream. A failure after it
        is worded in the stream: the status is sent already.
        """
        connection, writer, is_last = self._connection, self._writer, self._end is not None or self._error is not None
        items, self._items = self._items, []
        try:
            out = writer.feed(items)
            if self._error is not None:
                self._note_end()
                out += writer.fail(self._error)
            elif self._end is not None:
                out += writer.end(self._ending())
            elif not out:
                return  # what was said so far is not for the client yet
        except MeshserveError as error:
            out, is_last = writer.fail(error), True
        if not connection.is_started:
            connection.start(200, self._writer.headers + self._label)
        connection.write(out, is_last)
        if is_last:
            self._finish()

    def _ending(self) -> Ending:
        """The end, and the receipt with this frontend's part."""
        ending: Ending = self._end  # as the mesh read the answer of the method
        self._note_end()
        if ending.receipt is None:
            return ending
        own_part = self._receipt.to_wire(self._completions.mesh.own.name)
        return replace(ending, receipt=with_frontend(ending.receipt, own_part))

    def refuse(self, error: MeshserveError) -> None:
        """The answer is this error; if another one has begun, it is broken off. Harmless after the end."""
        if self._is_over:
            return
        self._note_end()
        self._receipt.failed(error)
        if self._connection.is_started:
            self._connection.break_off()
        else:
            body = self._api.error_body(self._api.named(error))
            self._connection.respond(error.http_status, apis.error_headers(error) + self._label, body)
        self._finish()

    def _went_wrong(self) -> None:
        """To be called in an exception's handler: a mistake of ours."""
        _log.exception("%s failed: request %s", self._api.path, self._receipt.request_id)
        self.refuse(MeshserveError())

    # --- the end

    def _note_end(self) -> None:
        """All that is left is to write the end: from then on the client may have it, and ask for its receipt."""
        self._receipt.ended_s = time.monotonic()
        self._receipt.processor = self._call.peer if self._call is not None else ""

    def _give_slots_back(self) -> None:
        self._receipt.answered_s = self._receipt.answered_s or time.monotonic()
        if self._has_slots:
            self._has_slots = False
            self._completions.slots.leave(self, self._request.model, is_done=self._end is not None)

    def _finish(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        completions, receipt = self._completions, self._receipt
        if self._call is not None and self._end is None and self._error is None:
            self._call.cancel()
        self._give_slots_back()
        if self._error is not None:
            receipt.failed(self._error)
            self._error = None  # where it was raised it holds this exchange: only the collector could free both
        if not receipt.ended_s:
            self._note_end()
        completions.num_open -= 1
        completions.under_way.open.pop(receipt.request_id, None)
        if completions.receipts is not None:
            completions.receipts.keep(receipt)
        if completions.exporter is not None:
            completions.exporter.frontend_ended(receipt)


def _request_timeout_s(given: bytes, most_s: float) -> float:
    """What the header asks for, but at most `most_s`. Raises InvalidRequest that names the header."""
    try:
        asked_s = float(given) if b"_" not in given else math.nan  # Python's own way to write numbers
    except ValueError:
        asked_s = math.nan
    if not MIN_TIMEOUT_S <= asked_s < math.inf:
        raise InvalidRequest(f"{_TIMEOUT_HEADER} must be a number of seconds, {MIN_TIMEOUT_S} at least", param=_TIMEOUT_HEADER)
    return min(asked_s, most_s)


def handlers_of(completions: Completions) -> dict[str, Callable[[Request], Exchange]]:
    """What begins an exchange, by path; all with POST."""

    def parse(body: bytes, request_id: str, client_id: str) -> Parsed:
        return parse_generate(body, request_id, client_id, completions.first_model())

    return {api.path: partial(Exchange, completions, api) for api in (*apis.APIS, apis.lines(parse))}
