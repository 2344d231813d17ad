"""The routes that complete: where exchanges begin, how they are passed on to a processor, and what is kept of them."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from meshserve.config import ServeConfig
from meshserve.errors import Draining, MeshserveError, NoWorker, Overloaded
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipt_store import Fronts
from meshserve.observe.receipts import Front, with_front
from meshserve.roles.frontend import apis
from meshserve.roles.frontend.admission_slots import AdmissionSlots
from meshserve.roles.frontend.apis import Api
from meshserve.roles.frontend.asgi import ClientGone, Receive, Scope, Send
from meshserve.roles.frontend.bodies import check_small, read_json
from meshserve.roles.frontend.cancelling import UnderWay
from meshserve.roles.frontend.connections import CONNECTION, CYCLE, FrontProtocol
from meshserve.roles.frontend.exchange import Exchange
from meshserve.roles.frontend.guard import CLIENT, EXTRA_HEADERS
from meshserve.roles.frontend.models.common import MAX_SESSION_CHARACTERS, Parsed, ResponseOptions
from meshserve.roles.frontend.models.completions import parse_generate
from meshserve.roles.frontend.responding import Responder
from meshserve.roles.frontend.timeouts import request_timeout_s
from meshserve.roles.frontend.writers import Reply
from meshserve.wire.completion import CompletionRequest, Ending, read_traceparent
from meshserve.wire.messages import COMPLETE
from meshserve.wire.structs import replace

if TYPE_CHECKING:
    from meshserve.observe.otlp import Exporter

_LONG_BODY_BYTES = 65_536
_MAX_LABEL_BYTES = 128


class Completions:
    """Takes requests in and passes them on to a processor."""

    def __init__(self, mesh: Mesh, config: ServeConfig, exporter: "Exporter | None" = None) -> None:
        self._mesh, self._config = mesh, config
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._turn = itertools.count()
        self._slots = AdmissionSlots(mesh, config.front)
        self.leave = self._slots.leave
        self.after_turn = mesh.turn.afterwards
        self.counters, self.max_unread = mesh.counters, config.front.max_unread_texts
        self.under_way = UnderWay(mesh)
        self._fronts = Fronts(mesh, config.receipts_kept) if config.observe else None
        self._exporter = exporter
        self.num_open = 0
        """Requests under way."""
        mesh.gauges.derive("http_requests", lambda: self.num_open)
        self.apis: dict[str, Api] = {api.path: api for api in (*apis.APIS, apis.lines(self._parse_generate))}
        """By the path of the route, all with POST."""

    def _parse_generate(self, body: bytes, request_id: str, client_id: str) -> Parsed:
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

    # --- where exchanges begin

    def begin(
        self, api: Api, connection: FrontProtocol, response: Responder, headers: Mapping[bytes, bytes], client: str, began_s: float
    ) -> Exchange:
        """A request whose head is read; `client` is whose it is."""
        label = headers.get(b"x-request-id")
        front = Front(self.new_id(), label[:_MAX_LABEL_BYTES].decode("latin-1") if label else "", began_s)
        self.num_open += 1
        return Exchange(self, api, connection, response, headers, client, front)

    def take(self, exchange: Exchange, body: bytes) -> None:
        """A body of at most 64 KiB that came whole: read it, and pass the request on."""
        try:
            check_small(body)
            self._go(exchange, *exchange.api.parse(body, exchange.front.request_id, exchange.front.client_id))
        except MeshserveError as error:
            exchange.refuse(error)
        except Exception:  # nobody else's request must suffer
            exchange.went_wrong()

    def route(self, path: str) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        """The ASGI application of one path, for requests that come in pieces, or behind another."""
        return partial(self._serve, self.apis[path])

    async def _serve(self, api: Api, scope: Scope, receive: Receive, send: Send) -> None:
        """The response leaves by the connection's own way, as that of a request that came whole."""
        response = Responder(scope[CYCLE](), scope.get(EXTRA_HEADERS, ()))
        headers = dict(reversed(scope["headers"]))
        exchange = self.begin(api, scope[CONNECTION](), response, headers, scope.get(CLIENT, ""), time.monotonic())
        over = asyncio.Event()
        exchange.on_done = over.set
        try:
            await self._read(exchange, receive)
            await over.wait()
        finally:
            exchange.client_gone()  # harmless after the end: the server stops, and with it this task

    async def _read(self, exchange: Exchange, receive: Receive) -> None:
        """A long body is parsed beside the event loop, where other requests' tokens need not wait for it."""
        request_id, client_id, parse = exchange.front.request_id, exchange.front.client_id, exchange.api.parse
        try:
            body = await read_json(receive, self._config.max_body_bytes)
            if len(body) <= _LONG_BODY_BYTES:
                parsed = parse(body, request_id, client_id)
            else:
                parsed = await self._loop.run_in_executor(None, parse, body, request_id, client_id)
            self._go(exchange, *parsed)
        except ClientGone:
            exchange.client_gone()
        except MeshserveError as error:
            exchange.refuse(error)
        except Exception:
            exchange.went_wrong()

    def _go(self, exchange: Exchange, request: CompletionRequest, options: ResponseOptions) -> None:
        front, headers, api = exchange.front, exchange.headers, exchange.api
        timeout_s = request_timeout_s(headers.get(b"x-request-timeout"), self._config.request_timeout_s)
        request = self._marked(request, headers, front)
        front.client_id, front.model, front.asked_s = request.client_id, request.model, time.monotonic()
        writer = api.writer(Reply(api.response_id(front.request_id), int(time.time()), request, options))
        exchange.go(request, writer, front.began_s + timeout_s)

    def _marked(self, request: CompletionRequest, headers: Mapping[bytes, bytes], front: Front) -> CompletionRequest:
        """With what its headers say: whose session it is, and of which trace; if spans leave from here, one begins if need be."""
        if session := headers.get(b"x-session-id"):
            request = replace(request, session=session.decode("latin-1")[:MAX_SESSION_CHARACTERS])
        if given := headers.get(b"traceparent", b"").decode("latin-1"):
            front.traceparent = given if read_traceparent(given) is not None else ""
        traceparent = front.traceparent if self._exporter is None else self._exporter.trace(front)
        return replace(request, traceparent=traceparent) if traceparent else request

    # --- on its way

    def enter(self, exchange: Exchange) -> None:
        """Pass it on, now or when there is a place for it. Raises Draining, Overloaded or RateLimited."""
        if self._mesh.own.is_draining:
            raise Draining("this frontend is shutting down")
        if self.num_open > self._config.max_requests:
            raise Overloaded(f"this frontend has {self._config.max_requests} requests under way; try again")
        self.under_way.add(exchange.front.request_id, exchange.front.client_id, exchange)
        self._slots.ask(exchange)

    def pass_on(self, exchange: Exchange) -> None:
        """Its place is there. Raises NoWorker if there is no processor, or PeerLost."""
        request = exchange.request
        assert request is not None
        peer = self.processor()
        exchange.front.passed_s = now_s = time.monotonic()
        exchange.call = self._mesh.open(peer, COMPLETE, request, exchange, max(0.001, exchange.deadline_s - now_s))

    def processor(self) -> str:
        """This peer itself if it can, else each in turn. Raises NoWorker."""
        able = self._mesh.peers_with("processor")
        if not able:
            raise NoWorker("no processor is in the mesh yet", role="processor")
        if able[0].incarnation == self._mesh.incarnation:
            return self._mesh.incarnation
        return able[next(self._turn) % len(able)].incarnation

    # --- the end

    def with_receipt(self, ending: Ending, front: Front) -> Ending:
        """With this frontend's part in the receipt that the client asked for."""
        assert ending.receipt is not None
        return replace(ending, receipt=with_front(ending.receipt, front.to_wire(self._mesh.own.name)))

    def over(self, exchange: Exchange) -> None:
        """No longer under way."""
        self.num_open -= 1
        front = exchange.front
        self.under_way.remove(front.request_id, front.client_id)
        if self._fronts is not None:
            self._fronts.keep(front)
        if self._exporter is not None:
            self._exporter.front_ended(front)

    def close(self) -> None:
        """No more places for anybody."""
        self._slots.close()
