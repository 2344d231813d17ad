"""Connections that cannot be held for ever, nor made to hold much: deadlines, limits, and a clear word where one can still be said.

uvicorn keeps half a header or half a body for ever and takes headers of any length. Deadlines are looked at by one sweep over all
connections, so that a request pays for no timer; the keep-alive timer that uvicorn sets for every response goes the same way.

A request that every token passes, and whose body is short, is given to its route when its last byte is there, with no task and no ASGI
between: both cost as much as all else about HTTP. Whatever is unusual about a request takes the common way.
"""

import asyncio
import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Protocol

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from meshserve.config import FrontConfig
from meshserve.errors import HeaderTooLarge, InvalidRequest, MeshserveError, Overloaded, RateLimited, RequestTimedOut
from meshserve.roles.frontend.apis import error_body_for
from meshserve.roles.frontend.asgi import body_too_large, error_headers
from meshserve.roles.frontend.progress import Progress, Stage, Verdict
from meshserve.telemetry import Counters

CONNECTION, CYCLE = "meshserve.connection", "meshserve.cycle"
"""In the scope of every request: the connection that it came on, and uvicorn's state of its answer. Weak references, as both hold the
scope: only the collector could free them else."""

_SWEEP_S = 0.5
_SWEEP_AGAIN_S = 0.02
_MAX_CLOSED_PER_SWEEP = 64
"""Refusing a connection costs some 30 us: hundreds at once would hold up everybody's tokens."""
_MAX_HEADERS = 128
_MAX_PIPELINED = 128
_MAX_PARTS_PER_READ = 4096
"""Pieces of a body in one read of 256 KiB at most: chunks of a byte each would keep the parser busy for longer than 10 ms."""


_MAX_SHORT_BODY_BYTES = 65_536


class Answering(Protocol):
    """What answers a connection's request."""

    def client_gone(self) -> None:
        """The client went away."""

    def write(self) -> None:
        """The client can take something in again."""


class _NoEvent:
    """For those who wait for more of a request: nobody waits for a request that came whole."""

    def set(self) -> None:
        """Nothing."""


class ShortRequest:
    """A request whose body is short, and its answer as uvicorn's connection sees it: it stands for a `RequestResponseCycle`."""

    __slots__ = (
        "began_s",
        "body",
        "chunked_encoding",
        "default_headers",
        "disconnected",
        "flow",
        "headers",
        "keep_alive",
        "more_body",
        "on_response",
        "path",
        "response_complete",
        "response_started",
        "transport",
        "waiting_for_100_continue",
    )
    message_event = _NoEvent()

    def __init__(self, connection: "FrontProtocol", path: str, headers: Mapping[bytes, bytes], keep_alive: bool) -> None:
        self.path, self.headers, self.keep_alive = path, headers, keep_alive
        self.began_s = time.monotonic()
        self.flow: FlowControl = connection.flow
        self.transport, self.on_response = connection.transport, connection.on_response_complete
        self.default_headers = connection.server_state.default_headers
        self.body = b""
        self.more_body = True
        self.disconnected = self.response_started = self.response_complete = self.waiting_for_100_continue = False
        self.chunked_encoding: bool | None = None


Door = Callable[["FrontProtocol", ShortRequest], None]
"""Where short requests go in. It must not raise."""


class _Refused(Exception):
    """Raised in a callback of the parser, which stops it at once."""

    def __init__(self, error: MeshserveError) -> None:
        super().__init__(error.message)
        self.error = error


class Connections:
    """All connections of one server: their limits, their number by address, and the sweep."""

    def __init__(self, limits: FrontConfig, max_connections: int, max_body_bytes: int, counters: Counters) -> None:
        self.limits, self.max_connections, self.max_body_bytes, self.counters = limits, max_connections, max_body_bytes, counters
        self.doors: dict[bytes, Door] = {}
        """By path, for short requests by POST."""
        self.open: set[FrontProtocol] = set()
        self.num_by_address: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()
        self.now_s = self._loop.time()
        """As of the last sweep: close enough for deadlines of seconds, and free."""
        self._timer = self._loop.call_later(_SWEEP_S, self._sweep)

    def admit(self, address: str) -> MeshserveError | None:
        """Why there must not be one more connection of this address, if so."""
        if len(self.open) > self.max_connections:
            return Overloaded(f"this frontend has {self.max_connections} connections open; try again")
        if self.num_by_address[address] > self.limits.max_connections_per_address:
            return RateLimited(f"{address} has {self.limits.max_connections_per_address} connections open; close some")
        return None

    def left(self, address: str) -> None:
        """A connection of this address is gone."""
        self.num_by_address[address] -= 1
        if self.num_by_address[address] <= 0:
            del self.num_by_address[address]

    def _sweep(self) -> None:
        self.now_s = self._loop.time()
        num_closed = 0
        for connection in list(self.open):
            num_closed += connection.check(self.now_s)
            if num_closed >= _MAX_CLOSED_PER_SWEEP:
                break
        self._timer = self._loop.call_later(_SWEEP_AGAIN_S if num_closed >= _MAX_CLOSED_PER_SWEEP else _SWEEP_S, self._sweep)

    def close(self) -> None:
        """Look no more, and cut off what is still open."""
        self._timer.cancel()
        for connection in list(self.open):
            connection.transport.abort()


class FrontProtocol(HttpToolsProtocol):
    """uvicorn's connection with deadlines and limits. A refusal is answered in OpenAI's shape wherever no other answer has begun."""

    def __init__(self, registry: Connections, **settings: Any) -> None:
        super().__init__(**settings)
        self._registry = registry
        self.address = ""
        self.progress = Progress(registry.now_s)
        self._num_head_bytes = 0
        """Of the head that is coming, as far as they came in reads of its own."""
        self._is_own_read = False
        """Nothing of an earlier request is in what was read now."""
        self._num_read = 0
        self._num_parts = 0
        self._door: Door | None = None
        """Of the request that is coming, if it is a short one."""
        self.is_lost = False
        self.exchange: Answering | None = None
        """Of the request that is being answered. It is told if the client goes away: a task that waits for that would cost more."""

    # --- coming and going

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self._registry.open.add(self)
        self._registry.num_by_address[self.address] += 1
        error = self._registry.admit(self.address)
        if error is not None:
            self._registry.counters.add("connections_refused")
            transport.write(self._refusal(error))
            transport.close()
            self.progress.enter(Stage.LINGER, self._registry.now_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._registry.open.discard(self)
        self._registry.left(self.address)
        super().connection_lost(exc)
        self.is_lost = True
        if self.exchange is not None:
            self.exchange.client_gone()
        self.pipeline.clear()
        self.cycle = None  # type: ignore[assignment]  # as uvicorn does the parser: a short request's holds this connection

    def pause_writing(self) -> None:
        super().pause_writing()
        self.progress.stuck_since_s = self._registry.now_s

    def resume_writing(self) -> None:
        super().resume_writing()
        self.progress.stuck_since_s = None
        if self.exchange is not None:
            self.exchange.write()

    def check(self, now_s: float) -> bool:
        """Look at the deadlines; True if the connection was closed for one."""
        verdict = self.progress.verdict(now_s, self._registry.limits)
        if verdict is Verdict.WAIT:
            return False
        if verdict is Verdict.TIMED_OUT:
            what = "headers" if self.progress.stage is Stage.HEAD else "body"
            self._registry.counters.add("clients_timed_out")
            self._refuse(RequestTimedOut(f"the rest of the request's {what} did not come in time"))
            return True
        if verdict is Verdict.TOO_SLOW:
            self._registry.counters.add("clients_too_slow")
        if verdict is Verdict.CLOSE and self.progress.stage is Stage.IDLE:
            self.transport.close()
            self.progress.enter(Stage.LINGER, now_s)  # if its last answer is still unread, it is cut off later
        else:
            self.transport.abort()
        return True

    # --- bytes

    def data_received(self, data: bytes) -> None:
        progress = self.progress
        if progress.stage is Stage.LINGER:
            return
        if progress.stage is Stage.IDLE:
            progress.enter(Stage.HEAD, self._registry.now_s)
        self._is_own_read = progress.stage is Stage.HEAD
        if self._is_own_read:
            self._num_head_bytes += len(data)
        progress.has_begun = True
        self._num_read, self._num_parts = len(data), 0
        try:
            with contextlib.suppress(httptools.HttpParserUpgrade):  # there is nothing to upgrade to: the request is served as it stands
                self.parser.feed_data(data)
            if progress.stage is not Stage.ANSWER:
                self._check_size()
        except httptools.HttpParserError as error:
            refused = error.__context__
            self._refuse(refused.error if isinstance(refused, _Refused) else InvalidRequest("this is not an HTTP request"))
        except _Refused as refused:
            self._refuse(refused.error)

    def _check_size(self) -> None:
        """After a read that did not complete a request: what is known of its size already. Raises _Refused."""
        if self.progress.stage is Stage.HEAD:
            if self._num_head_bytes > self._registry.limits.max_header_bytes:
                raise _Refused(self._header_too_large())
        elif self.progress.stage is Stage.BODY and self.progress.num_body_bytes <= self._num_read:
            announced = next((value for name, value in self.headers if name == b"content-length"), b"0")
            if len(announced) > 18 or int(announced) > self._registry.max_body_bytes:
                raise _Refused(body_too_large(self._registry.max_body_bytes))

    def _header_too_large(self) -> MeshserveError:
        limit = self._registry.limits.max_header_bytes
        return HeaderTooLarge(f"the request line and headers are longer than {limit} bytes, or more than {_MAX_HEADERS} headers")

    # --- callbacks of the parser

    def on_message_begin(self) -> None:
        """uvicorn's own follows once it is known that the request goes its way."""
        self.url, self.headers, self.expect_100_continue, self._door = b"", [], False, None
        progress = self.progress
        progress.is_answering = self.cycle is not None and not self.cycle.response_complete
        progress.enter(Stage.HEAD, self._registry.now_s)
        if not self._is_own_read:
            self._num_head_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= _MAX_HEADERS:
            raise _Refused(self._header_too_large())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise _Refused(InvalidRequest("too many requests at once on one connection"))
        limit = self._registry.limits.max_header_bytes
        if self._num_read > limit or self._num_head_bytes > limit:  # body and all: only now is it worth adding up
            size_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size_bytes > limit:
                raise _Refused(self._header_too_large())
        self.progress.enter(Stage.BODY, self._registry.now_s)
        self.progress.num_body_bytes = 0
        door = self._registry.doors.get(self.url)
        short = self._as_short() if door is not None else None
        if short is not None:
            self._door, self.cycle = door, short  # type: ignore[assignment]  # it stands for uvicorn's
        else:
            self._take_the_common_way()

    def _as_short(self) -> ShortRequest | None:
        """None if anything about the request is unusual."""
        parser, before = self.parser, self.cycle
        if parser.get_method() != b"POST" or parser.get_http_version() != "1.1" or parser.should_upgrade() or self.expect_100_continue:
            return None
        headers = dict(reversed(self.headers))  # of a header that comes twice, the first counts
        size = headers.get(b"content-length", b"")
        if not 0 < len(size) < 6 or int(size) > _MAX_SHORT_BODY_BYTES or not (before is None or before.response_complete):
            return None
        return ShortRequest(self, self.url.decode("ascii"), headers, parser.should_keep_alive())

    def _take_the_common_way(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers  # the list that uvicorn's scope has
        self.scope[CONNECTION] = weakref.ref(self)  # type: ignore[literal-required]  # ours, for those on the way
        super().on_headers_complete()
        self.scope[CYCLE] = weakref.ref(self.cycle)  # type: ignore[literal-required]

    def on_body(self, body: bytes) -> None:
        self.progress.num_body_bytes += len(body)
        self._num_parts += 1
        if self.progress.num_body_bytes > self._registry.max_body_bytes:
            raise _Refused(body_too_large(self._registry.max_body_bytes))
        if self._num_parts > _MAX_PARTS_PER_READ:
            raise _Refused(InvalidRequest("the body's chunks are too small"))
        if self._door is None:
            super().on_body(body)
        else:
            self.cycle.body += body

    def on_message_complete(self) -> None:
        is_answered = self.cycle.response_complete
        self.progress.enter(Stage.IDLE if is_answered else Stage.ANSWER, self._registry.now_s)
        self._is_own_read, self._num_head_bytes = False, 0
        door, self._door = self._door, None
        if door is None:
            super().on_message_complete()
        else:
            self.cycle.more_body = False
            door(self, self.cycle)  # type: ignore[arg-type]  # a short one has a door

    def on_response_complete(self) -> None:
        """As uvicorn's, but that the sweep closes idle connections and no timer does."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self.progress.stage is Stage.ANSWER:
            self.progress.enter(Stage.IDLE, self._registry.now_s)
        self.progress.is_answering = bool(self.pipeline)
        if self.progress.stage is not Stage.IDLE:
            self.progress.since_s = self._registry.now_s  # of a request that began to come while an earlier one was answered

    # --- refusing

    def _refuse(self, error: MeshserveError) -> None:
        """Answer with an error if no other answer is under way, then close, but not before the client could read it."""
        cycle, is_answered = self.cycle, self.cycle is None or self.cycle.response_complete
        if self.pipeline or self.transport.is_closing() or self.progress.is_answering or not (is_answered or not cycle.response_started):
            self.transport.abort()
            return
        if not is_answered:  # what was begun for it ends as if the client had left
            cycle.disconnected = True
            cycle.message_event.set()
            if self.exchange is not None:
                self.exchange.client_gone()
        self.transport.write(self._refusal(error))
        self.flow.resume_reading()
        self.progress.enter(Stage.LINGER, self._registry.now_s)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _refusal(self, error: MeshserveError) -> bytes:
        url: bytes = getattr(self, "url", b"")  # uvicorn sets it with the first byte of the first request
        body = error_body_for(url.decode("latin-1"), error)
        status = HTTPStatus(error.http_status)
        headers = [*self.server_state.default_headers, *error_headers(error), (b"connection", b"close")]
        lines = [b"%s: %s\r\n" % header for header in headers]
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-length: {len(body)}\r\n"
        return b"".join([head.encode(), *lines, b"\r\n", body])
