"""The dashboard and what it reads: its files at `/`, and the mesh's events as a stream at `/mesh/events`."""

import asyncio
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import meshserve.observe.dashboard
from meshserve.errors import Overloaded
from meshserve.observe.mesh_feed import MeshFeed
from meshserve.roles.frontend import shapes
from meshserve.roles.frontend.asgi import Receive, Scope, Send, error_headers, send_whole
from meshserve.roles.frontend.pages import PageFiles

_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
_STUCK_S = 15.0
"""A reader that takes nothing for so long is let go."""


class Dashboard:
    """The routes, and the feed behind them. Nothing of it runs before somebody opens the page."""

    def __init__(self, feed: MeshFeed) -> None:
        self.feed = feed
        self._files = PageFiles(Path(meshserve.observe.dashboard.__file__).parent)

    def routes(self) -> list[BaseRoute]:
        """For the frontend's application."""
        return [Route("/", self._page), Route("/dashboard/{name}", self._file), Route("/mesh/events", _Events(self.feed), methods=["GET"])]

    async def _page(self, request: Request) -> Response:
        return self._files.named("index.html")

    async def _file(self, request: Request) -> Response:
        return self._files.named(request.path_params["name"])


class _Events:
    """`GET /mesh/events`, as raw ASGI: one task a reader, which ends with it."""

    def __init__(self, feed: MeshFeed) -> None:
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await send_whole(send, 200, b"", _EVENTS)
            return
        try:
            reader = self._feed.join()
        except Overloaded as error:
            await send_whole(send, error.http_status, shapes.error_body(error), error_headers(error))
            return
        gone = asyncio.get_running_loop().create_task(_until_gone(receive))
        gone.add_done_callback(lambda _: reader.close())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
            while update := await reader.next():
                async with asyncio.timeout(_STUCK_S):
                    await send({"type": "http.response.body", "body": update, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            return
        finally:
            self._feed.leave(reader)
            gone.cancel()


async def _until_gone(receive: Receive) -> Any:
    while (await receive())["type"] != "http.disconnect":
        pass
