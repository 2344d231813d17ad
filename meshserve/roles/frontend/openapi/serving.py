"""`/openapi.json` and `/docs`: made at the first question, kept from then on."""

import asyncio
from pathlib import Path

import meshserve.roles.frontend.openapi.page
from meshserve.config import ServeConfig
from meshserve.roles.frontend.http.messages import JSON, Response
from meshserve.roles.frontend.http.routes import Routes
from meshserve.roles.frontend.pages import page_file


def add_documents(routes: Routes, config: ServeConfig) -> None:
    """The routes."""
    folder = Path(meshserve.roles.frontend.openapi.page.__file__).parent
    document: bytes | None = None

    def make() -> bytes:
        from meshserve.roles.frontend.openapi.document import document_bytes  # nobody pays for it who does not ask

        return document_bytes(bool(config.api_keys), config.observe)

    async def openapi() -> Response:
        nonlocal document
        if document is None:
            document = await asyncio.to_thread(make)  # tokens of requests need not wait for it
        return Response(200, document, JSON + b"cache-control: no-cache\r\n")

    routes.add("GET", "/openapi.json", lambda request: openapi())
    routes.add("GET", "/docs", lambda request: page_file(folder, "docs.html"))
    routes.add("GET", "/docs/{name}", lambda request: page_file(folder, request.name))
