"""The HTTP server of a frontend: its routes, its socket, its life."""

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from meshserve.config import ServeConfig
from meshserve.errors import InvalidRequest, MeshserveError, ModelNotFound
from meshserve.mesh.mesh import Mesh
from meshserve.observe.mesh_feed import MeshFeed
from meshserve.observe.receipt_store import find_receipt
from meshserve.observe.status import list_peers
from meshserve.roles.frontend import apis, shapes
from meshserve.roles.frontend.asgi import Receive, Scope, Send, error_headers
from meshserve.roles.frontend.completions import Completions
from meshserve.roles.frontend.connections import Connections, FrontProtocol, ShortRequest
from meshserve.roles.frontend.events import Dashboard
from meshserve.roles.frontend.guard import Guard
from meshserve.roles.frontend.listening import Server, bind, possible_connections, tls_context, url_of
from meshserve.roles.frontend.login import challenge
from meshserve.roles.frontend.openapi.serving import Documents
from meshserve.roles.frontend.responding import Responder, encode_headers, responder
from meshserve.roles.frontend.tokenizing import Tokenizing, hot_routes

if TYPE_CHECKING:
    from meshserve.observe.otlp import Exporter

_log = logging.getLogger(__name__)

_START_CHECK_S = 0.002


class _HotRoutes:
    """The routes that every token passes, ahead of Starlette's routing and its wrappers around each write."""

    def __init__(self, application: Any, routes: dict[str, Any]) -> None:
        self._application, self._routes = application, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is not None:
            await route(scope, receive, responder(scope, send))
        else:
            await self._application(scope, receive, send)


class _Door:
    """Where requests for a completion come in that came whole: past the guard, and on as an exchange. No task, and no ASGI."""

    def __init__(self, guard: Guard, completions: Completions, api: apis.Api) -> None:
        self._guard, self._completions, self._api = guard, completions, api

    def __call__(self, connection: FrontProtocol, request: ShortRequest) -> None:
        """Never raises: a refusal is the answer."""
        guard, headers = self._guard, request.headers
        response = Responder(request, guard.extra_headers(headers))
        try:
            client = guard.admit(connection.scheme or "", connection.address, headers)
        except Exception as error:
            if not isinstance(error, MeshserveError):
                _log.exception("%s failed", request.path)
            self._refuse(response, request.path, error if isinstance(error, MeshserveError) else MeshserveError())
            return
        exchange = self._completions.begin(self._api, connection, response, headers, client, request.began_s)
        self._completions.take(exchange, request.body)

    @staticmethod
    def _refuse(response: Responder, path: str, error: MeshserveError) -> None:
        headers = encode_headers([*error_headers(error), *challenge(error)])
        response.whole(error.http_status, apis.error_body_for(path, error), headers)


class FrontendRole:
    """Listens; `start` returns the URL once it does."""

    def __init__(self, mesh: Mesh, config: ServeConfig, exporter: "Exporter | None" = None) -> None:
        self._mesh, self._config = mesh, config
        self._completions = Completions(mesh, config, exporter)
        self._dashboard = Dashboard(MeshFeed(mesh)) if config.observe else None
        self._started_s = int(time.time())
        self._server: Server | None = None
        self._connections: Connections | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        """No request is under way."""
        return not self._completions.num_open

    async def start(self) -> str:
        """Bind and serve. Raises StartupFailed if the port is taken, the address not this host's, or the certificate cannot be used."""
        limits = self._config.front
        context = tls_context(limits)
        listening = bind(self._config.http_host, self._config.http_port, limits)
        num_possible = possible_connections(limits.max_connections)
        self._connections = Connections(limits, num_possible, self._config.max_body_bytes, self._mesh.counters)
        open_now = self._connections.open
        self._mesh.gauges.derive("http_connections", lambda: len(open_now))
        completions = self._completions
        hot = hot_routes(completions, Tokenizing(self._mesh, self._config, completions))
        guard = Guard(_HotRoutes(self._routes(hot), hot), self._config)
        self._connections.doors = {path.encode(): _Door(guard, completions, api) for path, api in completions.apis.items()}
        self._server = Server(guard, self._connections, context)
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listening]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(_START_CHECK_S)
        return url_of(listening, context is not None)

    def _routes(self, hot: Iterable[str]) -> Starlette:
        return Starlette(
            routes=[
                *(Route(path, _only_post, methods=["POST"]) for path in hot),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._model),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/mesh/peers", self._peers),
                *self._request_routes(),
                *Documents(self._config).routes(),
                *([Route("/metrics", self._metrics)] if self._config.observe else []),
                *(self._dashboard.routes() if self._dashboard else []),
            ],
            exception_handlers={HTTPException: _http_error, MeshserveError: _own_error, Exception: _unexpected},
        )

    def _request_routes(self) -> list[BaseRoute]:
        methods = ["GET", "DELETE"] if self._config.observe else ["DELETE"]
        return [Route("/mesh/requests/{name}", self._request, methods=methods)]

    async def _request(self, request: Request) -> Response:
        return await (self._cancel if request.method == "DELETE" else self._receipt)(request)

    async def _models(self, request: Request) -> Response:
        return JSONResponse(shapes.models_body([info.card for info in self._mesh.peers_with("decode") if info.card], self._started_s))

    async def _model(self, request: Request) -> Response:
        cards = {name: info.card for info in self._mesh.peers_with("decode") if info.card for name in info.card.names}
        name = request.path_params["model"]
        if name in cards:
            return JSONResponse(shapes.model_entry(name, cards[name], self._started_s))
        raise ModelNotFound(f"the model {name!r} is not served here; there are: {', '.join(sorted(cards)) or 'none yet'}", param="model")

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "alive", "name": self._mesh.own.name})

    async def _ready(self, request: Request) -> Response:
        missing = [role for role in ("processor", "decode") if not self._mesh.peers_with(role)]
        if self._mesh.own.is_draining:
            return JSONResponse({"status": "draining", "missing": missing}, 503, {"retry-after": "1"})
        if missing:
            return JSONResponse({"status": "waiting", "missing": missing}, 503, {"retry-after": "1"})
        return JSONResponse({"status": "ready"})

    async def _peers(self, request: Request) -> Response:
        return JSONResponse(await list_peers(self._mesh))

    async def _cancel(self, request: Request) -> Response:
        return JSONResponse({"cancelled": await self._completions.under_way.cancel(request.path_params["name"])})

    async def _receipt(self, request: Request) -> Response:
        return JSONResponse(await find_receipt(self._mesh, request.path_params["name"]))

    async def _metrics(self, request: Request) -> Response:
        from meshserve.observe import metrics  # a slow import that only those who scrape need wait for, once

        return Response(metrics.metrics_text(await list_peers(self._mesh)), media_type=metrics.CONTENT_TYPE)

    async def close(self) -> None:
        """Stop listening; connections that still stream are cut after a second."""
        if self._dashboard is not None:
            self._dashboard.feed.close()
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
        if self._connections is not None:
            self._connections.close()
        self._completions.close()


async def _only_post(request: Request) -> Response:
    """Never called: a POST took the hot route. It is there so that other methods are answered 405 and not 404."""
    raise HTTPException(405)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not for {request.url.path}"}
    body = apis.error_body_for(request.url.path, InvalidRequest(words.get(error.status_code, error.detail)))
    return Response(body, error.status_code, dict(error.headers or {}), "application/json")


async def _own_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MeshserveError)
    return Response(shapes.error_body(error), error.http_status, media_type="application/json")


async def _unexpected(request: Request, error: Exception) -> Response:
    return Response(shapes.error_body(MeshserveError("internal error")), 500, media_type="application/json")
