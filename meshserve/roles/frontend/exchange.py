"""One request for a completion, from its body to the last byte of its answer.

An exchange is called, and never waits: no task stands behind it. It is the sink of the processor's stream, and writes what came once the
turn of the event loop is over, so that all text of one turn leaves in one write. A client that goes away cancels its request at every hop.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from meshserve.errors import Cancelled, MeshserveError, RequestTimedOut
from meshserve.mesh.calls import OutgoingCall
from meshserve.observe.receipts import Front
from meshserve.roles.frontend.admission import QueueEntry
from meshserve.roles.frontend.apis import Api
from meshserve.roles.frontend.asgi import error_headers
from meshserve.roles.frontend.connections import FrontProtocol
from meshserve.roles.frontend.responding import Responder, encode_headers
from meshserve.roles.frontend.writers import Writer
from meshserve.telemetry import Counters
from meshserve.wire.completion import CompletionRequest, Ending

_log = logging.getLogger(__name__)


class Owner(Protocol):
    """Whose exchanges they are: a frontend's completions."""

    counters: Counters
    max_unread: int

    def enter(self, exchange: "Exchange") -> None:
        """Find it its place. Raises Draining, Overloaded or RateLimited."""

    def pass_on(self, exchange: "Exchange") -> None:
        """Its place is there: ask a processor. Raises NoWorker or PeerLost."""

    def leave(self, model: str, entry: QueueEntry, is_done: bool) -> None:
        """Take its place back."""

    def after_turn(self, callback: Callable[[], None]) -> None:
        """Call this at the end of the turn."""

    def with_receipt(self, ending: Ending, front: Front) -> Ending:
        """With a frontend's part in the receipt."""

    def over(self, exchange: "Exchange") -> None:
        """It is no longer under way."""


class Exchange:
    """Made when a request's head is read. `go` or `refuse` follows, and `on_done` is called once, when nothing more is to come."""

    __slots__ = (
        "_connection",
        "_is_due",
        "_is_over",
        "_items",
        "_label",
        "_owner",
        "_response",
        "_writer",
        "api",
        "call",
        "client",
        "deadline_s",
        "end",
        "entry",
        "error",
        "front",
        "headers",
        "on_done",
        "request",
    )

    def __init__(
        self,
        owner: Owner,
        api: Api,
        connection: FrontProtocol,
        response: Responder,
        headers: Mapping[bytes, bytes],
        client: str,
        front: Front,
    ) -> None:
        self._owner, self.api, self._connection, self._response = owner, api, connection, response
        self.headers, self.client, self.front = headers, client, front
        self._label = b"x-request-id: %b\r\n" % (front.client_id or front.request_id).encode("latin-1", "replace")
        self.request: CompletionRequest | None = None
        self.deadline_s = 0.0
        self.entry: QueueEntry | None = None
        """Its place in the mesh, or in the queue for one."""
        self.call: OutgoingCall | None = None
        self.end: Any = None
        self.error: MeshserveError | None = None
        self.on_done: Callable[[], None] | None = None
        self._writer: Writer | None = None
        self._items: list[Any] = []
        self._is_due = self._is_over = False

    # --- on its way

    def go(self, request: CompletionRequest, writer: Writer, deadline_s: float) -> None:
        """The request is read: find it its place, and pass it on."""
        self.request, self._writer, self.deadline_s = request, writer, deadline_s
        connection = self._connection
        if connection.is_lost:  # meanwhile
            self.client_gone()
            return
        connection.exchange = self
        connection.flow.resume_reading()  # a long body may have paused it, and who does not read sees no client go
        try:
            self._owner.enter(self)
        except MeshserveError as error:
            self.refuse(error)

    def admitted(self) -> None:
        """There is a place for it: now, or later."""
        try:
            self._owner.pass_on(self)
        except MeshserveError as error:
            self.on_error(error)

    # --- what comes from the processor

    def on_item(self, item: Any) -> None:
        self._items.append(item)
        self._came()

    def on_items(self, items: list[Any]) -> None:
        """Several at once."""
        self._items += items
        self._came()

    def _came(self) -> None:
        if self._writer is None or not self._writer.is_stream:
            return  # all of it is written at the end
        if len(self._items) > self._owner.max_unread:
            self.stop(RequestTimedOut("the client takes its answer in too slowly"))
        self._write_soon()

    def on_end(self, value: Any) -> None:
        self.end, self.front.answered_s = value if value is not None else (), time.monotonic()
        self._write_soon()

    def on_error(self, error: MeshserveError) -> None:
        self.error = error
        self._left()
        self._write_soon()

    def stop(self, error: MeshserveError) -> None:
        """Cancel at every hop; the client is told why. Harmless after the end."""
        if self.end is None and self.error is None and not self._is_over:
            self._cancel()
            self.on_error(error)

    def client_gone(self) -> None:
        """Cancel at every hop; there is nobody to tell."""
        if not self._is_over:
            self._owner.counters.add("clients_gone")
            self.front.failed(Cancelled("the client left"))
            self._finish()

    def _cancel(self) -> None:
        if self.call is not None:
            self.call.cancel()

    def _left(self) -> None:
        """If nothing more comes, the place is free."""
        if self.end is None and self.error is None and not self._is_over:
            return
        self.front.answered_s = self.front.answered_s or time.monotonic()
        entry, self.entry = self.entry, None
        if entry is not None and self.request is not None:
            self._owner.leave(self.request.model, entry, self.end is not None)

    # --- what goes to the client

    def _write_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._owner.after_turn(self.write)

    def write(self) -> None:
        """All that is there, unless the client still has to take in what was sent: then it comes again."""
        self._is_due = False
        if self._is_over:
            return
        if self._response.is_stuck:
            self._left()  # whoever takes his time to read needs no place for that
            return
        try:
            if self._writer is not None and self._writer.is_stream:
                self._write_stream(self._writer)
            else:
                self._write_whole()
        except MeshserveError as error:
            self.refuse(error)
        except Exception:
            self.went_wrong()

    def _write_whole(self) -> None:
        writer = self._writer
        if self.error is not None or writer is None:
            raise self.error or MeshserveError()
        if self.end is None:
            return
        writer.feed(self._items)
        body = writer.end(self._ending())
        self._response.whole(200, body, writer.headers + self._label)
        self._finish()

    def _write_stream(self, writer: Writer) -> None:
        """The head goes out with the first text, so that what fails before it is an HTTP error and not a broken stream."""
        response, (items, self._items) = self._response, (self._items, [])
        if self.error is not None and not response.is_started:
            raise self.error
        out, is_last = self._written(writer, items)
        if not out and not is_last:
            return  # what was said so far is not for the client yet
        if not response.is_started:
            response.start(200, writer.headers + self._label)
        response.write(out, is_last)
        if is_last:
            self._finish()

    def _written(self, writer: Writer, items: list[Any]) -> tuple[bytes, bool]:
        """What these items come to, and whether it is the last of the response. A failure is worded here: the status is sent already."""
        try:
            out = writer.feed(items)
            if self.error is not None:
                self._passed()
                return out + writer.fail(self.error), True
            if self.end is not None:
                return out + writer.end(self._ending()), True
        except MeshserveError as error:
            return writer.fail(error), True
        return out, False

    def _ending(self) -> Ending:
        """The end, and the receipt with this frontend's part. Raises ProtocolError for what a processor must not say."""
        ending = Ending.from_wire(self.end)
        self._passed()
        return ending if ending.receipt is None else self._owner.with_receipt(ending, self.front)

    def went_wrong(self) -> None:
        """To be called in an exception's handler: a mistake of ours."""
        _log.exception("%s failed: request %s", self.api.path, self.front.request_id)
        self.refuse(MeshserveError())

    def refuse(self, error: MeshserveError) -> None:
        """The answer is this error; if another one has begun, it is broken off."""
        self._passed()
        self.front.failed(error)
        if self._response.is_started:
            self._response.break_off()
        else:
            headers = encode_headers(error_headers(error)) + self._label
            self._response.whole(error.http_status, self.api.error_body(self.api.named(error)), headers)
        self._finish()

    # --- the end

    def _passed(self) -> None:
        """What is known of this frontend's part when all that is left is to write the end: from then on the client may have it."""
        front = self.front
        front.ended_s = time.monotonic()
        front.processor = self.call.peer if self.call is not None else ""

    def _finish(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._cancel()
        self._left()
        if self.error is not None:
            self.front.failed(self.error)
            self.error = None  # where it was raised it holds this exchange: only the collector could free both
        if not self.front.ended_s:
            self._passed()
        if self._connection.exchange is self:
            self._connection.exchange = None
        self._owner.over(self)
        if self.on_done is not None:
            self.on_done()
