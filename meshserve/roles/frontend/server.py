"""The frontend role: its routes, its socket, its life."""

import asyncio
import gzip
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from meshserve.config import ServeConfig
from meshserve.errors import ModelNotFound
from meshserve.mesh.keys import owner_secret
from meshserve.mesh.mesh import Mesh
from meshserve.observe.mesh_feed import MeshFeed
from meshserve.observe.receipt_store import find_receipt
from meshserve.observe.status import list_peers
from meshserve.roles.frontend import apis, shapes
from meshserve.roles.frontend.completions import Completions
from meshserve.roles.frontend.guard import Guard
from meshserve.roles.frontend.handlers import handlers_of
from meshserve.roles.frontend.http.connection import Application, Connection
from meshserve.roles.frontend.http.connections import Connections
from meshserve.roles.frontend.http.messages import Request, Response, takes_encoding
from meshserve.roles.frontend.http.request_log import RequestLog
from meshserve.roles.frontend.kept_responses import KeptResponses
from meshserve.roles.frontend.listening import BACKLOG, bind, possible_connections, tls_context, url_of
from meshserve.roles.frontend.ollama import OllamaModels
from meshserve.roles.frontend.pages import add_dashboard, add_documents
from meshserve.roles.frontend.routes import Routes, json_response
from meshserve.roles.frontend.tokenizing import Tokenizing

if TYPE_CHECKING:
    from meshserve.observe.otlp import Exporter

_STOP_GRACE_S = 1.0
_GZIP_LEVEL = 1
"""Makes a ninth of the metrics; 9 takes twice as long for another eighth off (measured)."""
_RETRY_SOON = b"retry-after: 1\r\n"


class FrontendRole:
    """Listens; `start` returns the URL once it does."""

    def __init__(self, mesh: Mesh, config: ServeConfig, exporter: "Exporter | None" = None) -> None:
        self._mesh, self._config = mesh, config
        self._completions = Completions(mesh, config, exporter)
        self._feed = MeshFeed(mesh) if config.observe else None
        self._started_s = int(time.time())
        self._server: asyncio.Server | None = None
        self._connections: Connections | None = None

    @property
    def num_under_way(self) -> int:
        """Requests whose answers are not all written."""
        return self._completions.num_open

    async def start(self) -> str:
        """Bind and serve. Raises StartupFailed if the port is taken, the address not this host's, or the certificate cannot be used."""
        limits = self._config.frontend
        limits = replace(limits, max_connections=possible_connections(limits.max_connections))
        context = tls_context(limits)
        listening = bind(self._config.http_host, self._config.http_port, limits)
        guard = Guard(self._config, owner_secret(self._mesh.key, self._mesh.own.mesh))
        routes = self._routes(guard)
        application = Application(guard.admit, routes.answer, apis.error_response)
        scheme, mesh = "http" if context is None else "https", self._mesh
        log = RequestLog(mesh.request_counts, routes.route_of, self._is_served)
        connections = Connections(limits, self._config.max_body_bytes, scheme, mesh.counters, log)
        self._connections = connections
        self._mesh.gauges.derive("http_connections", lambda: len(connections.open))
        self._server = await asyncio.get_running_loop().create_server(
            partial(Connection, connections, application),
            sock=listening,
            backlog=BACKLOG,
            ssl=context,
            # Without limits of ours, a client that says nothing has a minute to agree on TLS.
            ssl_handshake_timeout=None if context is None else limits.header_timeout_s,
            ssl_shutdown_timeout=None if context is None else limits.linger_s,
        )
        return url_of(listening, context is not None)

    async def close(self) -> None:
        """Stop listening; connections that still stream are cut after a second."""
        if self._feed is not None:
            self._feed.close()
        if self._server is not None:
            self._server.close()
        if self._connections is not None:
            await self._connections.close(_STOP_GRACE_S)
        self._completions.close()

    # --- routes

    def _routes(self, guard: Guard) -> Routes:
        routes = Routes(apis.error_body_for, self._config.max_body_bytes, self._config.frontend.root_path)
        kept = KeptResponses(self._mesh)
        for path, handler in handlers_of(self._completions, kept).items():
            routes.add("POST", path, handler)
        kept.add_routes(routes)
        Tokenizing(self._mesh, self._completions, kept).add_routes(routes)
        OllamaModels(self._completions, self._started_s).add_routes(routes)
        routes.add("GET", "/v1/models", self._models)
        routes.add("GET", "/v1/models/{path}", self._model)
        routes.add("GET", "/health", lambda request: json_response({"status": "alive", "name": self._mesh.own.name}))
        routes.add("GET", "/ready", self._ready)
        routes.add_async("GET", "/mesh/peers", self._peers)
        routes.add_async("DELETE", "/mesh/requests/{name}", self._cancel)
        add_documents(routes, self._config)
        if guard.login is not None:
            guard.login.add_routes(routes)
        if self._feed is not None:
            routes.add_async("GET", "/mesh/requests/{name}", self._receipt)
            routes.add_async("GET", "/metrics", self._metrics)
            add_dashboard(routes, self._feed)
        return routes

    def _models(self, request: Request) -> Response:
        return json_response(shapes.models_body(self._mesh.peers_with("decode"), self._started_s))

    def _model(self, request: Request) -> Response:
        name = request.name
        if self._is_served(name):
            return json_response(shapes.model_entry(name, self._mesh.peers_with("decode"), self._started_s))
        known = {served for info in self._mesh.peers_with("decode") if info.card for served in info.card.names}
        raise ModelNotFound(f"the model {name!r} is not served here; there are: {', '.join(sorted(known)) or 'none yet'}", param="model")

    def _is_served(self, model: str) -> bool:
        return any(info.card is not None and info.card.is_called(model) for info in self._mesh.peers_with("decode"))

    def _ready(self, request: Request) -> Response:
        missing = [role for role in ("processor", "decode") if not self._mesh.has_or_awaits(role)]
        if self._mesh.own.is_draining:
            return json_response({"status": "draining", "missing": missing}, 503, _RETRY_SOON)
        if missing:
            return json_response({"status": "waiting", "missing": missing}, 503, _RETRY_SOON)
        return json_response({"status": "ready"})

    async def _peers(self, request: Request) -> Response:
        return json_response(await list_peers(self._mesh))

    async def _cancel(self, request: Request) -> Response:
        return json_response({"cancelled": await self._completions.under_way.cancel(request.name)})

    async def _receipt(self, request: Request) -> Response:
        return json_response(await find_receipt(self._mesh, request.name))

    async def _metrics(self, request: Request) -> Response:
        peers, takes_gzip = await list_peers(self._mesh), takes_encoding(request.headers.get(b"accept-encoding", b""), b"gzip")
        # In a thread: of a large mesh it takes long enough to hold tokens up, and so does the first time, which imports a library.
        return await asyncio.to_thread(_metrics_response, peers, self._config.metrics_vllm, takes_gzip)


def _metrics_response(peers: list[dict[str, Any]], is_with_vllm: bool, takes_gzip: bool) -> Response:
    from meshserve.observe.metrics import CONTENT_TYPE, metrics_text
    from meshserve.observe.vllm_metrics import vllm_metrics_text

    text = metrics_text(peers) + (vllm_metrics_text(peers) if is_with_vllm else b"")
    headers = f"content-type: {CONTENT_TYPE}\r\nvary: accept-encoding\r\n".encode()
    if takes_gzip:
        return Response(200, gzip.compress(text, _GZIP_LEVEL, mtime=0), headers + b"content-encoding: gzip\r\n")
    return Response(200, text, headers)
