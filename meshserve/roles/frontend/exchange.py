"""Requests for completions, each from its body to the last byte of its answer.

No task stands behind an exchange: it is called, and never waits. It is the sink of the processor's stream, and writes what came once the
turn of the event loop is over, so that all text of one turn leaves in one write. A client that goes away cancels its request at every hop.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from meshserve.errors import Cancelled, Draining, MeshserveError, NoWorker, Overloaded, PeerLost, PeerSilent, RequestTimedOut
from meshserve.mesh.calls import OutgoingCall, Sink
from meshserve.observe.receipts import FrontendReceipt, with_frontend
from meshserve.roles.frontend import apis, request_headers
from meshserve.roles.frontend.admission import QueueEntry
from meshserve.roles.frontend.completions import Completions
from meshserve.roles.frontend.http.connection import Connection
from meshserve.roles.frontend.http.messages import Request
from meshserve.roles.frontend.liveness import Liveness
from meshserve.roles.frontend.losses import Losses
from meshserve.roles.frontend.models.common import Parsed, ResponseOptions
from meshserve.roles.frontend.models.fields import header_line
from meshserve.roles.frontend.models.reading import SHORT_BODY_BYTES, check_json
from meshserve.roles.frontend.replaying import MAX_ITEMS, Given, Replay
from meshserve.roles.frontend.writers import Api, Writer
from meshserve.wire.completion import CompletionRequest, Ending
from meshserve.wire.messages import COMPLETE
from meshserve.wire.structs import replace

_log = logging.getLogger(__name__)

_MAX_LABEL_BYTES = 128
_LOOK_AGAIN_S = 0.05
"""Pause between two looks for a processor, while no known processor can be reached."""


class Exchange(QueueEntry):
    """One request and its answer. It waits for its admission slots itself."""

    __slots__ = (
        "_api",
        "_call",
        "_completions",
        "_connection",
        "_end",
        "_error",
        "_given",
        "_has_slots",
        "_http",
        "_is_due",
        "_is_over",
        "_items",
        "_liveness",
        "_losses",
        "_options",
        "_receipt",
        "_request",
        "_writer",
        "id_header",
    )

    def __init__(self, completions: Completions, api: Api, http: Request) -> None:
        super().__init__(http.client, 1, http.began_s)
        self._completions, self._api, self._http = completions, api, http
        label = http.headers.get(b"x-request-id", b"")[:_MAX_LABEL_BYTES]
        self._receipt = http.account = FrontendReceipt(completions.new_id(), label.decode("latin-1"), http.began_s)
        self.id_header = b"x-request-id: %b\r\n" % (label or self._receipt.request_id.encode())
        self._connection: Connection
        self._request: CompletionRequest
        self._options: ResponseOptions
        self._writer: Writer
        self._losses: Losses | None = None
        self._given: Given | None = None
        """Of a stream from another peer, which may be lost."""
        self._call: OutgoingCall | None = None
        self._liveness: Liveness | None = None
        """Of a stream that a sweep has met."""
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
            if completions.exporter is not None or not request_headers.HEEDED.isdisjoint(self._http.headers):
                self.deadline_s = receipt.began_s + request_headers.timeout_s(self._http.headers, completions.config.request_timeout_s)
                request = request_headers.applied(request, self._http.headers, receipt, completions.exporter)  # as `timeout_s`
            self._request = request
            self._writer = self._api.writer(int(time.time()), request, self._options)
            # Whether this frontend takes it in.
            if completions.mesh.own.is_draining:
                raise Draining("this frontend is shutting down")
            if completions.num_open > (most := completions.config.max_requests):
                raise Overloaded(f"this frontend has {most} requests under way; try again")
            completions.under_way.open[receipt.request_id] = self
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

    def admitted(self) -> None:
        """The request has its slots: ask a processor."""
        completions = self._completions
        try:
            peer = completions.processor() if self._losses is None else completions.processor(self._losses.blind)
            self._receipt.passed_s = now_s = time.monotonic()
            sink: Sink = self._followed() if peer != completions.mesh.incarnation and self._writer.is_stream else self
            self._call = completions.mesh.open(peer, COMPLETE, self._request, sink, max(0.001, self.deadline_s - now_s))
        except (NoWorker, PeerLost) as error:
            if self._may_wait(error):
                completions.loop.call_later(_LOOK_AGAIN_S, self._ask_again)
            else:
                self.on_error(completions.unreached(error, self.deadline_s))
        except MeshserveError as error:
            self.on_error(error)
        except Exception:
            self._went_wrong()

    def _followed(self) -> Sink:
        """The sink of a stream that another processor could continue: keeps the items that the writer gets, and omits repeated ones."""
        if self._given is None:
            self._given = Given()
            return self
        return Replay(self._given, self, self._went_on)

    @property
    def client_id(self) -> str:
        """The client's label."""
        return self._receipt.client_id

    @property
    def processor(self) -> str | None:
        """Incarnation of the processor that now has the request."""
        return self._call.peer if self._call is not None else None

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
        if (call := self._call) is not None:
            if self._is_for_another(error, call.peer) and self._start_over(error):
                return
            if (losses := self._losses) and losses.is_too_early(error, self._connection.is_started) and self._may_wait(error):
                self._rename(losses)
                self._completions.loop.call_later(_LOOK_AGAIN_S, self._ask_again)
                return
        self._error = error
        self._give_slots_back()
        self._flush_soon()

    def _is_for_another(self, error: MeshserveError, processor: str) -> bool:
        """Whether another processor may serve the request: this one is lost, or knows no worker although others may."""
        if not isinstance(error, NoWorker) or processor == self._completions.mesh.incarnation:
            return self._completions.is_lost(processor, error)
        self._losses = self._losses or Losses()
        self._losses.blind += (processor,)
        return self._completions.knows_another(self._losses.blind)

    def processor_suspected(self) -> None:
        """Another processor starts the request over. The silent processor is told; if it continues, its items are dropped."""
        call, is_open = self._call, self._end is None and self._error is None
        if call is not None and is_open and self._start_over(PeerSilent("the processor fell silent")):
            call.cancel()

    def _start_over(self, error: MeshserveError) -> bool:
        """Ask another processor. Returns False if the request was started over too often."""
        assert self._call is not None
        completions, receipt = self._completions, self._receipt
        losses, has_begun = self._losses or Losses(), self._connection.is_started
        if self._is_over or not losses.allow_another(completions.config.max_migrations, has_begun=has_begun):
            return False
        losses.add(completions.mesh.name_of(self._call.peer), error, receipt.passed_s, time.monotonic(), has_begun=has_begun)
        self._losses, receipt.started_over, before = losses, losses.told, self._request.request_id
        self._rename(losses)
        completions.mesh.counters.add("requests_started_over")
        if completions.mesh.event_log.is_on:
            completions.mesh.event_log.note("started_over", losses.told.name, before=before, outcome=error.code)
        self.admitted()
        return True

    def _rename(self, losses: Losses) -> None:
        """Send the request again under another name, because workers may still have the earlier name."""
        is_given = self._connection.is_started or bool(self._given is not None and self._given.settle())
        self._call, self._items = None, []
        self._request = losses.renamed(self._request, self._completions.new_id(), is_given=is_given)

    def _went_on(self) -> None:
        """The second answer has come further than the client's part."""
        assert self._losses is not None and self._call is not None
        self._completions.mesh.counters.add("requests_replayed")
        self._losses.went_on(self._completions.mesh.name_of(self._call.peer), time.monotonic())

    def _may_wait(self, error: MeshserveError) -> bool:
        """Whether a processor may be reached soon: a connection that was just lost is made again, or a stall ends. For an answer
        that has begun, a killed processor may be started again."""
        mesh, has_begun = self._completions.mesh, self._connection.is_started
        longest_s = mesh.config.failure_timeout_s + (mesh.config.death_timeout_s if has_begun else 0.0)
        is_known = has_begun or self._call is not None or isinstance(error, PeerLost) or bool(mesh.silent_peers_with("processor"))
        self._losses = self._losses or Losses()
        return is_known and self._losses.may_wait(time.monotonic(), longest_s, self.deadline_s)

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
                self._connection.respond(200, self._writer.headers + self.id_header, body)
                self._finish()
        except MeshserveError as error:
            self.refuse(error)
        except Exception:
            self._went_wrong()

    def look_after(self, now_s: float) -> None:
        """The sweep passes: a stream without new text gets a ping."""
        call, connection = self._call, self._connection
        if (call is not None or connection.is_started) and not self._is_over and self._error is None and self._writer.is_stream:
            self._liveness = self._liveness or Liveness(self._completions)
            headers = self._writer.headers + self.id_header
            self._liveness.look(now_s, connection, call, self._request.request_id, headers, self._writer.ping)

    def _write_stream(self) -> None:
        """Write what the items come to, and the end or the error if it has come.

        The head goes out with the first text, or once a worker has had the request for a while: what fails before it is an HTTP error and
        not a broken stream. A failure after it is worded in the stream: the status is sent already.
        """
        connection, writer, is_last = self._connection, self._writer, self._end is not None or self._error is not None
        items, self._items = self._items, []
        try:
            out = writer.feed(items)
            if (given := self._given) is not None:
                given.items += items
                if len(given.items) > MAX_ITEMS:
                    given.settle()
            if self._error is not None:
                self._note_end()
                self._receipt.failed(self._error)
                out += writer.fail(self._error)
            elif self._end is not None:
                out += writer.end(self._ending())
            elif not out:
                return  # what was said so far is not for the client yet
        except MeshserveError as error:
            self._receipt.failed(error)
            out, is_last = writer.fail(error), True
        if not connection.is_started:
            connection.start(200, self._writer.headers + self.id_header)
        connection.write(out, is_last)
        if is_last:
            self._finish()

    def _ending(self) -> Ending:
        """The end, and the receipt with this frontend's part."""
        ending: Ending = self._end  # as the mesh read the answer of the method
        self._http.ending = ending
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
            self._connection.respond(error.http_status, apis.error_headers(error) + self.id_header, body)
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
            request_headers.export(receipt, self._http, completions.exporter)
