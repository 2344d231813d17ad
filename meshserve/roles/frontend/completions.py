"""The routes that complete: raw ASGI, as every token passes through here.

All text that is ready at one turn of the event loop leaves in one write. A client that goes away cancels its request at every hop.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from meshserve.config import ServeConfig
from meshserve.errors import Cancelled, Draining, MeshserveError, NoWorker, Overloaded
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipt_store import Fronts
from meshserve.observe.receipts import Front, with_front
from meshserve.roles.frontend import apis
from meshserve.roles.frontend.answers import Answer
from meshserve.roles.frontend.apis import Api
from meshserve.roles.frontend.asgi import ClientGone, Header, Receive, Scope, Send, error_headers, send_whole
from meshserve.roles.frontend.bodies import read_json
from meshserve.roles.frontend.cancelling import UnderWay
from meshserve.roles.frontend.connections import CONNECTION, FrontProtocol
from meshserve.roles.frontend.desk import Desk, request_timeout_s
from meshserve.roles.frontend.parsing import MAX_SESSION_CHARACTERS, ResponseOptions, parse_generate
from meshserve.roles.frontend.writers import Reply, Writer
from meshserve.wire.completion import CompletionRequest, Ending
from meshserve.wire.trace_context import read_traceparent

if TYPE_CHECKING:
    from meshserve.observe.otlp import Exporter

Label = list[Header]

_log = logging.getLogger(__name__)
_LONG_BODY_BYTES = 65_536


class Completions:
    """Takes requests in and passes them on to a processor."""

    def __init__(self, mesh: Mesh, config: ServeConfig, exporter: "Exporter | None" = None) -> None:
        self._mesh, self._config = mesh, config
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._turn = itertools.count()
        self._lines = apis.lines(self._parse_generate)
        self._desk = Desk(mesh, config)
        self.under_way = UnderWay(mesh)
        self._fronts = Fronts(mesh, config.receipts_kept) if config.observe else None
        self._exporter = exporter
        self.num_open = 0
        """Requests under way."""
        mesh.levels.derive("http_requests", lambda: self.num_open)

    async def completion(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/completions`."""
        await self._serve(scope, receive, send, apis.COMPLETIONS)

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/chat/completions`."""
        await self._serve(scope, receive, send, apis.CHATS)

    async def response(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/responses`."""
        await self._serve(scope, receive, send, apis.RESPONSES)

    async def message(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/messages`."""
        await self._serve(scope, receive, send, apis.MESSAGES)

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /generate`: text as it comes, a JSON object a line."""
        await self._serve(scope, receive, send, self._lines)

    def _parse_generate(self, body: bytes, request_id: str, client_id: str) -> tuple[CompletionRequest, ResponseOptions]:
        return parse_generate(body, request_id, client_id, self.first_model()), ResponseOptions(is_stream=True)

    def first_model(self) -> str:
        """For those who name none. Raises NoWorker if there is none."""
        cards = [info.card.model for info in self._mesh.peers_with("decode") if info.card is not None]
        if not cards:
            raise NoWorker("no decode worker is in the mesh yet")
        return cards[0]

    def new_id(self) -> str:
        """The mesh's name for another request."""
        return f"{self._mesh.incarnation}-{next(self._ids)}"

    async def _serve(self, scope: Scope, receive: Receive, send: Send, api: Api) -> None:
        began_s = time.monotonic()
        request_id = self.new_id()
        client_id = _header(scope, b"x-request-id")[:128]
        label = [(b"x-request-id", (client_id or request_id).encode("latin-1", "replace"))]
        answer, front = Answer(self._loop, self._config.front.max_unread_texts), Front(request_id, client_id, began_s)
        connection: FrontProtocol = scope[CONNECTION]
        self.num_open += 1
        try:
            deadline_s = began_s + request_timeout_s(scope, self._config.request_timeout_s)
            request, options = await self._parse(api, await read_json(receive, self._config.max_body_bytes), request_id, client_id)
            request = self._marked(request, scope, front)
            front.set_out(request.client_id, request.model, time.monotonic())
            writer = api.writer(Reply(api.response_id(request_id), int(time.time()), request, options))
            self.under_way.add(request_id, client_id, answer)
            self._open(request, answer, scope, deadline_s)
            connection.on_lost = answer.client_gone
            connection.flow.resume_reading()  # a long body may have paused it, and who does not read sees no client go
            if connection.is_lost:  # meanwhile
                answer.client_gone()
            await (self._stream if options.is_stream else self._whole)(writer, answer, send, label, front)
        except ClientGone:
            self._mesh.counters.add("clients_gone")
            front.failed(Cancelled("the client left"))
        except MeshserveError as error:
            self._passed(front, answer)
            front.failed(error)
            await _send_error(send, api, error, label)
        except Exception:  # a mistake of ours; once a response has begun, all that is left is to break it off
            _log.exception("%s failed", scope["path"])
            with contextlib.suppress(RuntimeError):
                await _send_error(send, api, MeshserveError(), label)
        finally:
            self.num_open -= 1
            answer.cancel()
            self._keep(front, answer)
            self.under_way.remove(request_id, client_id)
            connection.on_lost = None

    async def _parse(self, api: Api, body: bytes, request_id: str, client_id: str) -> tuple[CompletionRequest, ResponseOptions]:
        """Raises InvalidRequest. A long body is parsed beside the event loop, where other requests' tokens need not wait for it."""
        if len(body) <= _LONG_BODY_BYTES:
            return api.parse(body, request_id, client_id)
        return await self._loop.run_in_executor(None, api.parse, body, request_id, client_id)

    def _open(self, request: CompletionRequest, answer: Answer, scope: Scope, deadline_s: float) -> None:
        """Pass it on, now or when there is a place for it. Raises Overloaded or RateLimited, or NoWorker if there is no processor."""
        if self._mesh.own.is_draining:
            raise Draining("this frontend is shutting down")
        if self.num_open > self._config.max_requests:
            raise Overloaded(f"this frontend has {self._config.max_requests} requests under way; try again")
        self._desk.ask(scope, request.model, request.num_choices, deadline_s, answer, lambda: self._pass_on(request, answer, deadline_s))

    def _pass_on(self, request: CompletionRequest, answer: Answer, deadline_s: float) -> None:
        peer = self.processor()
        body = request if peer == self._mesh.incarnation else request.to_wire()
        answer.passed_s = time.monotonic()
        answer.call = self._mesh.open(peer, "complete", body, answer, max(0.001, deadline_s - answer.passed_s))

    def _marked(self, request: CompletionRequest, scope: Scope, front: Front) -> CompletionRequest:
        """With what its headers say: whose session it is, and of which trace; if spans leave from here, one begins if need be."""
        if session := _header(scope, b"x-session-id"):
            request = replace(request, session=session[:MAX_SESSION_CHARACTERS])
        if given := _header(scope, b"traceparent"):
            front.traceparent = given if read_traceparent(given) is not None else ""
        traceparent = front.traceparent if self._exporter is None else self._exporter.trace(front)
        return replace(request, traceparent=traceparent) if traceparent else request

    def _keep(self, front: Front, answer: Answer) -> None:
        if self._fronts is not None:
            if not front.ended_s:
                self._passed(front, answer)
            if answer.error is not None:
                front.failed(answer.error)
            self._fronts.keep(front)
        if self._exporter is not None:
            self._exporter.front_ended(front)

    @staticmethod
    def _passed(front: Front, answer: Answer) -> None:
        """What is known of this frontend's part when all that is left is to write the end: from then on the client may have it."""
        front.passed_s, front.answered_s, front.ended_s = answer.passed_s, answer.over_s, time.monotonic()
        front.processor = answer.call.peer if answer.call is not None else ""

    def close(self) -> None:
        """No more places for anybody."""
        self._desk.close()

    def processor(self) -> str:
        """This peer itself if it can, else each in turn. Raises NoWorker."""
        able = self._mesh.peers_with("processor")
        if not able:
            raise NoWorker("no processor is in the mesh yet", role="processor")
        if able[0].incarnation == self._mesh.incarnation:
            return self._mesh.incarnation
        return able[next(self._turn) % len(able)].incarnation

    # --- answers

    async def _whole(self, writer: Writer, answer: Answer, send: Send, label: Label, front: Front) -> None:
        while answer.end is None:
            writer.feed(await answer.wait())
            if answer.error is not None:
                raise answer.error
        writer.feed(answer.items)
        body = writer.end(self._ending(answer, front))
        await send_whole(send, 200, body, [(b"content-type", writer.media_type.encode()), *label])

    async def _stream(self, writer: Writer, answer: Answer, send: Send, label: Label, front: Front) -> None:
        """Headers go out with the first text, so that what fails before it is an HTTP error and not a broken stream."""
        is_started = False
        while True:
            items = await answer.wait()
            if answer.error is not None and not is_started:
                raise answer.error
            out, is_last = self._written(writer, items, answer, front)
            if not out and not is_last and not is_started:
                continue  # what was said so far is not for the client yet
            if not is_started:
                is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": [*_stream_headers(writer), *label]})
            if is_last:
                await send({"type": "http.response.body", "body": out})
                return
            if out:
                await send({"type": "http.response.body", "body": out, "more_body": True})

    def _written(self, writer: Writer, items: list[Any], answer: Answer, front: Front) -> tuple[bytes, bool]:
        """What these items come to, and whether it is the last of the response. A failure is worded here: the status is sent already."""
        try:
            out = writer.feed(items)
            if answer.error is not None:
                self._passed(front, answer)
                return out + writer.fail(answer.error), True
            if answer.end is not None:
                return out + writer.end(self._ending(answer, front)), True
        except MeshserveError as error:
            return writer.fail(error), True
        return out, False

    def _ending(self, answer: Answer, front: Front) -> Ending:
        """The end, and the receipt with this frontend's part. Raises ProtocolError for what a processor must not say."""
        ending = Ending.from_wire(answer.end)
        self._passed(front, answer)
        if ending.receipt is None:
            return ending
        return ending._replace(receipt=with_front(ending.receipt, front.to_wire(self._mesh.own.name)))


async def _send_error(send: Send, api: Api, error: MeshserveError, label: Label) -> None:
    await send_whole(send, error.http_status, api.error_body(api.named(error)), [*error_headers(error), *label])


def _stream_headers(writer: Writer) -> Label:
    return [(b"content-type", writer.media_type.encode()), (b"cache-control", b"no-cache")]


def _header(scope: Scope, name: bytes) -> str:
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return ""
