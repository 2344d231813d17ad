"""The table of routes: which handler answers which method and path, and how a handler's coroutine becomes an answer."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from meshserve.errors import InvalidRequest, MeshserveError
from meshserve.roles.frontend.http.connection import Answer, Connection
from meshserve.roles.frontend.http.messages import JSON, Request, Response, header_lines


@dataclass(frozen=True, slots=True)
class Streamed:
    """A response with status 200 that leaves in chunks as they come, and its head with the first of them."""

    pieces: AsyncGenerator[bytes, None]
    headers: bytes


Handler = Callable[[Request], Response | Streamed | Coroutine[Any, Any, Response] | Answer]
"""A coroutine is run as a task, and cancelled when the client leaves."""
Methods = dict[str, Handler]


class Routes:
    """Paths are exact, or end in `{name}` (one part, not empty) or `{path}` (whatever follows): `Request.name` has what stands there.

    A route for GET answers HEAD too.
    """

    def __init__(self, error_body: Callable[[str, MeshserveError], bytes]) -> None:
        self._error_body = error_body
        self._exact: dict[str, Methods] = {}
        self._open: dict[str, Methods] = {}

    def add(self, method: str, path: str, handler: Handler) -> None:
        """One row of the table."""
        methods = (self._open if path.endswith("}") else self._exact).setdefault(path, {})
        methods[method] = handler
        if method == "GET":
            methods["HEAD"] = handler

    def answer(self, request: Request) -> Response | Answer:
        """What the handler of this request gives back, or a response that there is none."""
        methods = self._exact.get(request.path) or self._open_route(request)
        if methods is None:
            return self._nothing_here(request)
        handler = methods.get(request.method)
        if handler is None:
            words = f"{request.method} is not for {request.path}"
            return self._refusal(request, 405, words, b"allow: %b\r\n" % ", ".join(methods).encode())
        answered = handler(request)
        return _TaskAnswer(answered) if isinstance(answered, (Streamed, Coroutine)) else answered

    def _open_route(self, request: Request) -> Methods | None:
        for pattern, methods in self._open.items():
            prefix, _, kind = pattern.partition("{")
            request.name = request.path.removeprefix(prefix)
            if request.path.startswith(prefix) and (kind == "path}" or (request.name and "/" not in request.name)):
                return methods
        return None

    def _nothing_here(self, request: Request) -> Response:
        path = request.path
        request.path = path.rstrip("/") if path.endswith("/") else path + "/"
        if request.path in self._exact or self._open_route(request):  # a slash too many, or one too few
            query = b"?" + request.query if request.query else b""
            return Response(307, b"", header_lines([(b"location", quote(request.path).encode() + query)]))
        request.path = path
        return self._refusal(request, 404, f"there is no {path} here")

    def _refusal(self, request: Request, status: int, words: str, headers: bytes = b"") -> Response:
        return Response(status, self._error_body(request.path, InvalidRequest(words)), JSON + headers)


class _TaskAnswer:
    """Answers with a task: runs a handler's coroutine, or writes pieces as they come."""

    def __init__(self, answered: Streamed | Coroutine[Any, Any, Response]) -> None:
        self._answered = answered
        self._resumed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self, connection: Connection) -> None:
        self._task = connection.run(self._run(connection))

    def flush(self) -> None:
        self._resumed.set()

    def client_gone(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self, connection: Connection) -> None:
        try:
            if isinstance(self._answered, Streamed):
                async with aclosing(self._answered.pieces) as pieces:
                    await self._write(connection, self._answered.headers, pieces)
            else:
                response = await self._answered
                connection.respond(response.status, response.headers, response.body)
        except MeshserveError as error:
            connection.fail(error)
        except Exception as error:
            connection.went_wrong(error)

    async def _write(self, connection: Connection, headers: bytes, pieces: AsyncGenerator[bytes, None]) -> None:
        if connection.request is None or connection.request.method == "HEAD":
            connection.respond(200, headers, b"")
            return
        async for piece in pieces:
            if not connection.is_started:
                connection.start(200, headers)
            connection.write(piece, is_last=False)
            if connection.is_stuck:
                self._resumed.clear()
                await self._resumed.wait()
        connection.write(b"", is_last=True)


def json_response(value: Any, status: int = 200, headers: bytes = b"") -> Response:
    """`value` as JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(status, text.encode(), JSON + headers)
