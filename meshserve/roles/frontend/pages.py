"""Pages for people, and what they read: the dashboard at `/` with the mesh's events, and the HTTP API's document at `/docs`."""

import asyncio
import functools
from collections.abc import AsyncGenerator
from pathlib import Path

import meshserve.observe.dashboard
import meshserve.roles.frontend.openapi.page
from meshserve.config import ServeConfig
from meshserve.observe.mesh_feed import MeshFeed
from meshserve.roles.frontend.http.messages import JSON, Response, header_lines
from meshserve.roles.frontend.routes import Routes, Streamed
from meshserve.roles.frontend.shapes import dump

_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".svg": b"image/svg+xml",
}
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY),
    (b"cache-control", b"no-cache"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
_EVENTS = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-store\r\nx-accel-buffering: no\r\n"


@functools.cache
def _files(folder: Path) -> dict[str, Response]:
    """Read once, by the names that are there and no others."""
    heads = {suffix: header_lines([(b"content-type", kind), *_HEADERS]) for suffix, kind in _TYPES.items()}
    return {path.name: Response(200, path.read_bytes(), heads[path.suffix]) for path in folder.iterdir() if path.suffix in heads}


def _page_file(folder: Path, name: str) -> Response:
    """The file of this name as a response; 404 if there is none."""
    missing = Response(404, f"there is no {name[:64]} here\n".encode(), b"content-type: text/plain; charset=utf-8\r\n")
    return _files(folder).get(name, missing)


def add_dashboard(routes: Routes, feed: MeshFeed) -> None:
    """The dashboard's routes. Nothing of the feed runs before somebody opens the page."""
    folder = Path(meshserve.observe.dashboard.__file__).parent
    routes.add("GET", "/", lambda request: _page_file(folder, "index.html"))
    routes.add("GET", "/dashboard/{name}", lambda request: _page_file(folder, request.name))
    routes.add("GET", "/mesh/events", lambda request: Streamed(_updates(feed), _EVENTS))


async def _updates(feed: MeshFeed) -> AsyncGenerator[bytes, None]:
    """As server-sent events, until the feed ends. Raises Overloaded before the first if there are too many readers."""
    reader = feed.join()
    try:
        while update := await reader.next():
            yield update
    finally:
        feed.leave(reader)


def add_documents(routes: Routes, config: ServeConfig) -> None:
    """The routes."""
    folder = Path(meshserve.roles.frontend.openapi.page.__file__).parent
    made: bytes | None = None

    def make() -> bytes:
        from meshserve.roles.frontend.openapi.document import document  # nobody pays for it who does not ask

        return dump(document(bool(config.api_keys), config.observe, config.frontend.root_path)).encode()

    async def openapi() -> Response:
        nonlocal made
        if made is None:
            made = await asyncio.to_thread(make)  # tokens of requests need not wait for it
        return Response(200, made, JSON + b"cache-control: no-cache\r\n")

    routes.add_async("GET", "/openapi.json", lambda request: openapi())
    routes.add("GET", "/docs", lambda request: _page_file(folder, "docs.html"))
    routes.add("GET", "/docs/{name}", lambda request: _page_file(folder, request.name))
