"""The routes that complete: raw ASGI, as every token passes through here.

All text that is ready at one turn of the event loop leaves in one write. A client that goes away cancels its request at every hop.
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

from meshserve.config import ServeConfig
from meshserve.errors import DeadlineExceeded, Draining, MeshserveError, NoWorker, Overloaded, RequestTimedOut
from meshserve.mesh.calls import OutgoingCall
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipts import with_http
from meshserve.roles.frontend import shapes
from meshserve.roles.frontend.asgi import JSON, ClientGone, Receive, Scope, Send, error_headers, send_whole
from meshserve.roles.frontend.bodies import read_json
from meshserve.roles.frontend.cancelling import UnderWay
from meshserve.roles.frontend.desk import Desk, request_timeout_s
from meshserve.roles.frontend.parsing import ResponseOptions, parse_chat, parse_completion, parse_generate
from meshserve.wire.completion import CompletionRequest

_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Answer:
    """What comes back from the processor: the sink of its stream. `wait` gives all that is there."""

    __slots__ = ("_loop", "_max_unread", "_waiting", "call", "end", "error", "is_client_gone", "on_over", "texts")

    def __init__(self, loop: asyncio.AbstractEventLoop, max_unread: int) -> None:
        self._loop, self._max_unread = loop, max_unread
        self._waiting: asyncio.Future[None] | None = None
        self.texts: list[str] = []
        self.end: list[Any] | None = None
        self.error: MeshserveError | None = None
        self.is_client_gone = False
        self.call: OutgoingCall | None = None
        self.on_over: Callable[[bool], None] | None = None
        """Called once when nothing more comes: True if it came to its end."""

    def on_item(self, item: Any) -> None:
        self.texts.append(item)
        if len(self.texts) > self._max_unread:
            self.stop(RequestTimedOut("the client takes its answer in too slowly"))
        self._wake()

    def on_end(self, value: Any) -> None:
        self.end = value
        self._over(True)
        self._wake()

    def on_error(self, error: MeshserveError) -> None:
        self.error = error
        self._over(False)
        self._wake()

    def stop(self, error: MeshserveError) -> None:
        """Cancel at every hop; the client is told why. Harmless after the end."""
        if self.end is None and self.error is None:
            self.cancel()
            self.on_error(error)

    def client_gone(self, _: Any = None) -> None:
        """Cancel at every hop."""
        if self.end is None and self.error is None:
            self.is_client_gone = True
            self.cancel()
            self._wake()

    def cancel(self) -> None:
        """Nobody waits any more."""
        if self.call is not None:
            self.call.cancel()
        self._over(False)

    def _over(self, is_done: bool) -> None:
        on_over, self.on_over = self.on_over, None
        if on_over is not None:
            on_over(is_done)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self) -> list[str]:
        """Texts since the last call; empty only at the end. Raises ClientGone; an error is for the caller to look at."""
        while not self.texts and self.end is None and self.error is None and not self.is_client_gone:
            self._waiting = self._loop.create_future()
            await self._waiting
        if self.is_client_gone:
            raise ClientGone
        texts, self.texts = self.texts, []
        return texts


class Completions:
    """Takes requests in and passes them on to a processor."""

    def __init__(self, mesh: Mesh, config: ServeConfig) -> None:
        self._mesh, self._config = mesh, config
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._turn = itertools.count()
        self._desk = Desk(mesh, config)
        self.under_way = UnderWay(mesh)
        self.num_open = 0
        """Requests under way."""

    async def completion(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/completions`."""
        await self._serve(scope, receive, send, self._openai, parse_completion, "cmpl-")

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/chat/completions`."""
        await self._serve(scope, receive, send, self._openai, parse_chat, "chatcmpl-")

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /generate`: text as it comes, a JSON object a line."""
        await self._serve(scope, receive, send, self._lines, self._parse_generate, "")

    def _parse_generate(self, body: bytes, request_id: str, client_id: str) -> tuple[CompletionRequest, ResponseOptions]:
        cards = [info.card.model for info in self._mesh.peers_with("decode") if info.card is not None]
        if not cards:
            raise NoWorker("no decode worker is in the mesh yet")
        return parse_generate(body, request_id, client_id, cards[0]), ResponseOptions(is_stream=True)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, respond: Any, parse: Any, prefix: str) -> None:
        began_s = time.monotonic()
        request_id = f"{self._mesh.incarnation}-{next(self._ids)}"
        client_id = _header(scope, b"x-request-id")[:128]
        label = [(b"x-request-id", (client_id or request_id).encode("latin-1", "replace"))]
        answer = Answer(self._loop, self._config.front.max_unread_texts)
        gone: asyncio.Task[Any] | None = None
        self.num_open += 1
        try:
            timeout_s = request_timeout_s(scope, self._config.request_timeout_s)
            request, options = parse(await read_json(receive, self._config.max_body_bytes), request_id, client_id)
            self.under_way.add(request_id, client_id, answer)
            self._open(request, answer, scope, began_s + timeout_s)
            gone = self._loop.create_task(_until_gone(receive))
            gone.add_done_callback(answer.client_gone)
            await respond(request, options, answer, send, label, prefix, began_s)
        except ClientGone:
            self._mesh.counters.add("clients_gone")
        except MeshserveError as error:
            await send_whole(send, error.http_status, shapes.error_body(error), [*error_headers(error), *label])
        finally:
            self.num_open -= 1
            answer.cancel()
            self.under_way.remove(request_id, client_id)
            if gone is not None:
                gone.remove_done_callback(answer.client_gone)
                gone.cancel()

    def _open(self, request: CompletionRequest, answer: Answer, scope: Scope, deadline_s: float) -> None:
        """Pass it on, now or when there is a place for it. Raises Overloaded or RateLimited, or NoWorker if there is no processor."""
        if self._mesh.own.is_draining:
            raise Draining("this frontend is shutting down")
        if self.num_open > self._config.max_requests:
            raise Overloaded(f"this frontend has {self._config.max_requests} requests under way; try again")
        self._desk.ask(scope, request.model, 1, deadline_s, answer, lambda: self._pass_on(request, answer, deadline_s))

    def _pass_on(self, request: CompletionRequest, answer: Answer, deadline_s: float) -> None:
        peer = self.processor()
        body = request if peer == self._mesh.incarnation else request.to_wire()
        answer.call = self._mesh.open(peer, "complete", body, answer, max(0.001, deadline_s - time.monotonic()))

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

    async def _openai(
        self,
        request: CompletionRequest,
        options: ResponseOptions,
        answer: Answer,
        send: Send,
        label: list[Any],
        prefix: str,
        began_s: float,
    ) -> None:
        if options.is_stream:
            await self._stream(request, options, answer, send, label, prefix, began_s)
        else:
            await self._whole(request, answer, send, label, prefix, began_s)

    async def _whole(self, request: CompletionRequest, answer: Answer, send: Send, label: list[Any], prefix: str, began_s: float) -> None:
        texts: list[str] = []
        while answer.end is None:
            texts += await answer.wait()
            if answer.error is not None:
                raise answer.error
        texts += answer.texts
        reason, usage, receipt = self._ending(answer, began_s)
        body = shapes.whole_body(
            prefix + request.request_id,
            request.model,
            int(time.time()),
            "".join(texts),
            reason,
            usage,
            receipt,
            is_chat=request.kind == "chat",
        )
        await send_whole(send, 200, body, [JSON, *label])

    async def _stream(
        self,
        request: CompletionRequest,
        options: ResponseOptions,
        answer: Answer,
        send: Send,
        label: list[Any],
        prefix: str,
        began_s: float,
    ) -> None:
        """Headers go out with the first text, so that what fails before it is an HTTP error and not a broken stream."""
        writer = shapes.ChunkWriter(prefix + request.request_id, request.model, int(time.time()), is_chat=request.kind == "chat")
        is_started = False
        while True:
            texts = await answer.wait()
            if answer.error is not None and not is_started:
                raise answer.error
            out = b""
            if not is_started:
                is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": [*_EVENTS, *label]})
                out = writer.role() if request.kind == "chat" else b""
            if texts:
                out += writer.texts([text for text in texts if text])
            if answer.error is not None:
                await send({"type": "http.response.body", "body": out + shapes.error_event(answer.error)})
                return
            if answer.end is not None:
                reason, usage, receipt = self._ending(answer, began_s)
                out += writer.finish(reason, usage if options.wants_usage else None, receipt)
                await send({"type": "http.response.body", "body": out})
                return
            await send({"type": "http.response.body", "body": out, "more_body": True})

    async def _lines(
        self,
        request: CompletionRequest,
        options: ResponseOptions,
        answer: Answer,
        send: Send,
        label: list[Any],
        prefix: str,
        began_s: float,
    ) -> None:
        request_id = request.client_id or request.request_id
        is_started = False
        while True:
            texts = await answer.wait()
            if answer.error is not None and not is_started:
                raise answer.error
            if not is_started:
                is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-ndjson"), *label]})
            out = b"".join(shapes.line({"request_id": request_id, "text": text}) for text in texts if text)
            if answer.error is not None:
                await send({"type": "http.response.body", "body": out + shapes.error_body(answer.error) + b"\n"})
                return
            if answer.end is not None:
                reason, usage, receipt = self._ending(answer, began_s)
                last = {"request_id": request_id, "finish_reason": reason, "usage": usage}
                out += shapes.line({**last, "meshserve": receipt} if receipt else last)
                await send({"type": "http.response.body", "body": out})
                return
            await send({"type": "http.response.body", "body": out, "more_body": True})

    def _ending(self, answer: Answer, began_s: float) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
        """Finish reason, usage, and the receipt with this frontend's part."""
        if not isinstance(answer.end, list) or len(answer.end) < 3 or not isinstance(answer.end[1], list):
            raise DeadlineExceeded("the processor's answer cannot be read")
        reason, (num_prompt, num_completion, num_cached), receipt = answer.end[:3]
        if receipt is not None:
            receipt = with_http(receipt, self._mesh.own.name, (time.monotonic() - began_s) * 1000)
        return str(reason), shapes.usage_of(num_prompt, num_completion, num_cached), receipt


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _header(scope: Scope, name: bytes) -> str:
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return ""
