"""One HTTP connection: its requests are answered in their order, under deadlines and limits of size.

The sweep over all connections (`connections.py`) looks at the deadlines, so that a request pays for no timer.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from meshserve.errors import MeshserveError, RequestTimedOut
from meshserve.roles.frontend.http.connections import Connections
from meshserve.roles.frontend.http.deadlines import Progress, Stage, Verdict
from meshserve.roles.frontend.http.forwarded import plain_address
from meshserve.roles.frontend.http.messages import Request, Response
from meshserve.roles.frontend.http.reader import RequestReader

_log = logging.getLogger(__name__)

_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_STATUS_LINES = {status: f"HTTP/1.1 {status} {_PHRASES.get(status, '')}\r\n".encode() for status in range(100, 600)}


class Answer(Protocol):
    """What answers a request over time, by callbacks: no task stands behind it."""

    def begin(self, connection: "Connection") -> None:
        """It is the request's turn on its connection. Must not raise."""

    def flush(self) -> None:
        """Write what waits: the client takes more in again."""

    def look_after(self, now_s: float) -> None:
        """The sweep passes, every :data:`~meshserve.roles.frontend.http.connections.SWEEP_S`: something may be due."""

    def client_gone(self) -> None:
        """The connection is lost."""


@dataclass(frozen=True, slots=True)
class Application:
    """What stands behind the connections of a server. What raises MeshserveError is answered with that error."""

    admit: Callable[[Request], Response | None]
    """Let a request in, as far as its head tells, or answer it."""
    answer: Callable[[Request], Response | Answer]
    error_response: Callable[[str, MeshserveError], Response]
    """An error as the clients of this path expect it."""


class Connection(asyncio.Protocol):
    """Answers requests in their order. After an error of the client's in HTTP itself, the connection closes."""

    def __init__(self, connections: Connections, application: Application) -> None:
        self._connections, self._application, self._log = connections, application, connections.log
        self._progress = Progress(connections.now_s)
        self._seen_s = connections.now_s
        """When the last sweep looked."""
        self._num_answered = 0
        self._passed = 0, 0
        """Requests begun and answered when the last sweep looked: it sees that the connection has gone on meanwhile."""
        self._queue: deque[Request] = deque()
        """Complete requests whose turn has not come."""
        self._is_reading = True
        self.request: Request | None = None
        """The one that is being answered."""
        self._answer: Answer | None = None
        self._head = b""
        """Of a response in pieces, until its first piece."""
        self.is_started = False
        """The head of the response is settled."""
        self.num_written = 0
        """Pieces of responses."""
        self.is_stuck = False
        """The client has not taken in what was written: more has to wait for `Answer.flush`."""

    # --- coming and going

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        connections, limits = self._connections, self._connections.limits
        peername = transport.get_extra_info("peername")
        self.transport, self.address = transport, plain_address(peername[0]) if peername else ""
        self._reader = RequestReader(
            self.address,
            connections.scheme,
            limits.max_header_bytes,
            connections.max_body_bytes,
            limits.root_path,
            connections.proxies if connections.proxies.trusts(self.address) else None,
        )
        if (error := connections.arrived(self)) is not None:
            connections.counters.add("connections_refused")
            self._write_refusal(error)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.left(self)
        self._reader.close()
        self._queue.clear()
        answer, request = self._answer, self.request
        self._answer = self.request = None
        if answer is not None:
            answer.client_gone()
        if request is not None:
            self._log.left(request)

    def close_if_idle(self) -> None:
        """The server stops: a connection that owes no answer closes now, others with their answer."""
        if self.request is None and not self._queue:
            self.transport.close()

    def check(self, now_s: float) -> bool:
        """Look at the deadlines; True if the connection was closed for one."""
        progress, counters = self._progress, self._connections.counters
        self._note_progress(now_s)
        verdict = progress.verdict(now_s, self._connections.limits)
        if verdict is Verdict.WAIT:
            if self._answer is not None:
                self._answer.look_after(now_s)
            return False
        if verdict is Verdict.TIMED_OUT:
            what = "headers" if progress.stage is Stage.HEAD else "body"
            counters.add("clients_timed_out")
            self._refuse(RequestTimedOut(f"the rest of the request's {what} did not come in time"))
        elif progress.stage is Stage.IDLE and verdict is Verdict.CLOSE:
            self.transport.close()
            progress.enter(Stage.LINGER, now_s)  # if its last response is still unread, it is cut off later
        else:
            if verdict is Verdict.TOO_SLOW:
                counters.add("clients_too_slow")
            self.transport.abort()
        return True

    # --- requests

    def data_received(self, data: bytes) -> None:
        if self._progress.stage is Stage.LINGER:
            return
        try:
            self._queue += self._reader.feed(data)
        except MeshserveError as error:
            # a client would take the refusal for the response to its first request that waits
            self._queue += self._reader.complete
            self._refuse(error)
            return
        if self._queue:
            self._serve_next()
        if self._queue and self._is_reading and not self.transport.is_closing():
            self._is_reading = False
            self.transport.pause_reading()
        if self._reader.request is not None:
            self._look_at_head(self._reader.request)

    def _note_progress(self, now_s: float) -> None:
        """See what the connection waits for now, and since when: at the earliest since the last sweep.

        Only the sweep needs to know, so that a request pays for nothing but counting.
        """
        progress, reader, seen_s = self._progress, self._reader, self._seen_s
        self._seen_s = now_s
        if progress.stage is Stage.LINGER:
            return
        progress.has_begun, progress.num_body_bytes = reader.num_begun > 0, reader.num_body_bytes
        progress.is_answering = self.request is not None or bool(self._queue)
        if reader.is_in_head or not progress.has_begun:
            stage = Stage.HEAD
        elif reader.request is not None:
            stage = Stage.BODY
        else:
            stage = Stage.ANSWER if progress.is_answering else Stage.IDLE
        # What came of the next request while an earlier one was answered had no deadline: its time begins with the answer's end.
        passed = reader.num_begun, self._num_answered
        if stage is not progress.stage or passed != self._passed:
            self._passed = passed
            progress.enter(stage, seen_s)

    def _look_at_head(self, request: Request) -> None:
        """The body is still to come: refuse it if the guard does, else tell a client that waits for a word to send it."""
        if request.is_expected or self.request is not None or self._queue:
            return
        request.is_expected = True
        try:
            self._application.admit(request)
        except MeshserveError as error:
            self._refuse(error, request.extra_headers)
            return
        # a client of HTTP/1.0 would take it for the response (RFC 9110, section 10.1.1)
        if request.takes_chunks and request.headers.get(b"expect", b"").lower() == b"100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _serve_next(self) -> None:
        """Answer the next request, if its turn has come and the client takes in what was written before."""
        if not self._queue or self.request is not None or self.is_stuck or self.transport.is_closing():
            return
        request = self.request = self._queue.popleft()
        if not self._queue and not self._is_reading:
            self._is_reading = True
            self.transport.resume_reading()  # who does not read sees no client go
        try:
            answered = self._application.admit(request) or self._application.answer(request)
        except MeshserveError as error:
            self.fail(error)
        except Exception as error:
            self.went_wrong(error)
        else:
            if isinstance(answered, Response):
                self.respond(answered.status, answered.headers, answered.body)
            else:
                self._answer = answered
                answered.begin(self)

    def answer_with(self, answered: Response | Answer) -> None:
        """Answer the request with this, instead of the answer that had begun to make it."""
        if isinstance(answered, Response):
            self.respond(answered.status, answered.headers, answered.body)
        else:
            self._answer = answered
            answered.begin(self)

    def run(self, answering: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that answers the request. The server waits for the task when it stops."""
        tasks = self._connections.tasks
        task = self._connections.loop.create_task(answering)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    # --- responses

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        """Write a whole response. `headers` are as `header_lines` gives them."""
        assert self.request is not None
        head = self._head_of(status, headers, b"" if status == 204 else b"content-length: %d\r\n" % len(body))
        self.transport.write(head if self.request.method == "HEAD" else head + body)
        self._end()

    def start(self, status: int, headers: bytes) -> None:
        """Begin a response in pieces. The head leaves with the first piece."""
        assert self.request is not None
        self._head = self._head_of(status, headers, b"transfer-encoding: chunked\r\n" if self.request.takes_chunks else b"")
        self.is_started = True

    def write(self, piece: bytes, is_last: bool) -> None:
        """Write the next piece of the body."""
        if self.request is None or self.transport.is_closing():
            return
        if self.request.takes_chunks:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
            piece = piece + b"0\r\n\r\n" if is_last else piece
        self.transport.write(self._head + piece)
        self._head = b""
        self.num_written += 1
        if is_last:
            self._end()

    def fail(self, error: MeshserveError) -> None:
        """Answer with this error, if that can still be said."""
        if self.is_started:
            self.break_off()
        elif self.request is not None:
            self.request.failed(error.code)
            response = self._application.error_response(self.request.path, error)
            self.respond(response.status, response.headers, response.body)

    def break_off(self) -> None:
        """End a response that cannot be completed together with its connection, so that nobody takes it for whole."""
        self.transport.close()

    def went_wrong(self, error: Exception) -> None:
        """A bug: the log says which, and the client only that."""
        if self.request is not None:
            is_debug = _log.isEnabledFor(logging.DEBUG)
            _log.error("%s %s failed: %r", self.request.method, self.request.path, error, exc_info=error if is_debug else None)
        self.fail(MeshserveError())

    def _head_of(self, status: int, headers: bytes, length: bytes) -> bytes:
        request = self.request
        assert request is not None
        request.status = status
        close = b"" if request.keeps_alive and not self._connections.is_stopping else b"connection: close\r\n"
        return b"".join((_STATUS_LINES[status], self._connections.date, headers, request.extra_headers, length, close, b"\r\n"))

    def _end(self) -> None:
        """The response is written: on to the next request."""
        request, log = self.request, self._log
        assert request is not None
        account = request.account
        try:  # `RequestLog.count` in line: every request passes here
            log.counts[request.route, request.status, account.outcome, account.model] += 1
        except KeyError:
            log.count(request)
        if log.is_writing:
            log.write(request)
        is_last = not request.keeps_alive or self._connections.is_stopping
        self.request, self._answer, self.is_started = None, None, False
        self._num_answered += 1
        if is_last:
            self._queue.clear()
            self.transport.close()
        elif self._queue:
            # Not by a call from here: requests that came in one read would hold up other connections, and go as deep as they are many.
            self._connections.loop.call_soon(self._serve_next)
        elif self._reader.request is not None:
            self._look_at_head(self._reader.request)

    def pause_writing(self) -> None:
        self.is_stuck, self._progress.stuck_since_s = True, self._connections.now_s

    def resume_writing(self) -> None:
        self.is_stuck, self._progress.stuck_since_s = False, None
        if self._answer is not None:
            self._answer.flush()
        else:
            self._serve_next()

    # --- refusing

    def _refuse(self, error: MeshserveError, extra_headers: bytes = b"") -> None:
        """Say what is wrong if no response is under way, then close, but not before the client could read it."""
        if self.request is not None or self._queue or self.transport.is_closing():
            self.transport.abort()
            return
        self._write_refusal(error, extra_headers)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _write_refusal(self, error: MeshserveError, extra_headers: bytes = b"") -> None:
        self._log.refused(self._reader, self.address, error)
        response = self._application.error_response(self._reader.path, error)
        length = b"content-length: %d\r\nconnection: close\r\n\r\n" % len(response.body)
        head = _STATUS_LINES[response.status] + self._connections.date + response.headers + extra_headers + length
        self.transport.write(head + response.body)
        self._progress.enter(Stage.LINGER, self._connections.now_s)
