"""`/openapi.json` and `/docs`: made at the first question, kept from then on."""

import asyncio
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import meshserve.roles.frontend.openapi.page
from meshserve.config import ServeConfig
from meshserve.roles.frontend.pages import PageFiles


class Documents:
    """The routes."""

    def __init__(self, config: ServeConfig) -> None:
        self._has_keys, self._observes = bool(config.api_keys), config.observe
        self._files = PageFiles(Path(meshserve.roles.frontend.openapi.page.__file__).parent)
        self._document: bytes | None = None

    def routes(self) -> list[BaseRoute]:
        """For the frontend's application."""
        return [Route("/openapi.json", self._openapi), Route("/docs", self._page), Route("/docs/{name}", self._file)]

    async def _openapi(self, request: Request) -> Response:
        if self._document is None:
            self._document = await asyncio.to_thread(self._made)  # tokens of requests need not wait for it
        return Response(self._document, media_type="application/json", headers={"cache-control": "no-cache"})

    def _made(self) -> bytes:
        from meshserve.roles.frontend.openapi.document import document_bytes  # nobody pays for it who does not ask

        return document_bytes(self._has_keys, self._observes)

    async def _page(self, request: Request) -> Response:
        return self._files.named("docs.html")

    async def _file(self, request: Request) -> Response:
        return self._files.named(request.path_params["name"])
