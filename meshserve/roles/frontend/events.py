"""The dashboard and what it reads: its files at `/`, and the mesh's events as a stream at `/mesh/events`."""

from collections.abc import AsyncGenerator
from pathlib import Path

import meshserve.observe.dashboard
from meshserve.observe.mesh_feed import MeshFeed
from meshserve.roles.frontend.http.messages import Response
from meshserve.roles.frontend.http.routes import Routes
from meshserve.roles.frontend.pages import page_file

_EVENTS = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-store\r\nx-accel-buffering: no\r\n"


def add_dashboard(routes: Routes, feed: MeshFeed) -> None:
    """The dashboard's routes. Nothing of the feed runs before somebody opens the page."""
    folder = Path(meshserve.observe.dashboard.__file__).parent
    routes.add("GET", "/", lambda request: page_file(folder, "index.html"))
    routes.add("GET", "/dashboard/{name}", lambda request: page_file(folder, request.name))
    routes.add("GET", "/mesh/events", lambda request: Response(200, _updates(feed), _EVENTS))


async def _updates(feed: MeshFeed) -> AsyncGenerator[bytes, None]:
    """As server-sent events, until the feed ends. Raises Overloaded before the first if there are too many readers."""
    reader = feed.join()
    try:
        while update := await reader.next():
            yield update
    finally:
        feed.leave(reader)
