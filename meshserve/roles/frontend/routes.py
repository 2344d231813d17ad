"""The table of routes: which handler answers which method and path, and how a handler's coroutine becomes an answer."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any
from urllib.parse import quote

from meshserve.errors import InvalidRequest, MeshserveError
from meshserve.roles.frontend.http.codings import inflated
from meshserve.roles.frontend.http.connection import Answer, Connection
from meshserve.roles.frontend.http.messages import JSON, Request, Response, header_lines

Handler = Callable[[Request], Response | Answer]
AsyncHandler = Callable[[Request], Coroutine[Any, Any, Response]]
Methods = dict[str, Handler]


class Routes:
    """Paths are exact, or have a `{name}` (one part) or end in `{path}` (whatever follows), neither of them empty: `Request.name` has
    what stands there.

    A route for GET answers HEAD too.
    """

    def __init__(self, error_body: Callable[[str, MeshserveError], bytes], max_body_bytes: int, root_path: str = "") -> None:
        self._error_body, self._max_body_bytes, self._root_path = error_body, max_body_bytes, root_path
        self._exact: dict[str, Methods] = {}
        self._open: dict[str, Methods] = {}

    def add(self, method: str, path: str, handler: Handler) -> None:
        """One row of the table."""
        methods = (self._open if "{" in path else self._exact).setdefault(path, {})
        methods[method] = handler
        if method == "GET":
            methods["HEAD"] = handler

    def add_async(self, method: str, path: str, handler: AsyncHandler) -> None:
        """The same for a coroutine, which is run as a task, and cancelled when the client leaves."""
        self.add(method, path, partial(_Awaited, handler))

    def answer(self, request: Request) -> Response | Answer:
        """What the handler of this request gives back, or a response that there is none."""
        if request.coding:
            return _Inflated(self.answer, request, self._max_body_bytes)
        methods = self._exact.get(request.path)
        if methods is not None:
            request.route = request.path
        elif (methods := self._open_route(request)) is None:
            return self._nothing_here(request)
        handler = methods.get(request.method)
        if handler is None and "POST" in methods and request.headers.get(b"upgrade", b"").lower() == b"websocket":
            # a client that would rather have a WebSocket falls back at once, and not after several tries (Codex)
            words = f"{request.path} is served by POST, and there is no WebSocket"
            return self._refusal(request, 426, words, b"upgrade: HTTP/1.1\r\nconnection: upgrade\r\n")
        if handler is None:
            words = f"{request.method} is not for {request.path}"
            return self._refusal(request, 405, words, b"allow: %b\r\n" % ", ".join(methods).encode())
        return handler(request)

    def _open_route(self, request: Request) -> Methods | None:
        found = self._open_pattern(request.path)
        if found is None:
            return None
        request.route, request.name = found
        return self._open[request.route]

    def _open_pattern(self, path: str) -> tuple[str, str] | None:
        """The row whose path is open, and what stands there."""
        for pattern in self._open:
            prefix, _, rest = pattern.partition("{")
            kind, _, suffix = rest.partition("}")
            name = path[len(prefix) : len(path) - len(suffix)]
            if name and path.startswith(prefix) and path.endswith(suffix) and (kind == "path" or "/" not in name):
                return pattern, name
        return None

    def route_of(self, path: str) -> str | None:
        """The row for this path; None if there is none."""
        if path in self._exact:
            return path
        found = self._open_pattern(path)
        return None if found is None else found[0]

    def _nothing_here(self, request: Request) -> Response:
        path = request.path
        request.path = path.rstrip("/") if path.endswith("/") else path + "/"
        if request.path in self._exact or self._open_route(request):  # a slash too many, or one too few
            query = b"?" + request.query if request.query else b""
            # without scheme and host, which a proxy may have changed
            location = quote(self._root_path + request.path).encode() + query
            return Response(307, b"", header_lines([(b"location", location)]))
        request.path = path
        return self._refusal(request, 404, f"there is no {path} here")

    def _refusal(self, request: Request, status: int, words: str, headers: bytes = b"") -> Response:
        error = InvalidRequest(words)
        request.failed(error.code)
        return Response(status, self._error_body(request.path, error), JSON + headers)


class _TaskAnswer:
    """Answers with a task."""

    def __init__(self) -> None:
        self._resumed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self, connection: Connection) -> None:
        self._task = connection.run(self._run(connection))

    def flush(self) -> None:
        self._resumed.set()

    def look_after(self, now_s: float) -> None:
        """Its task does that."""

    def client_gone(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self, connection: Connection) -> None:
        try:
            await self._answer(connection)
        except MeshserveError as error:
            connection.fail(error)
        except Exception as error:
            connection.went_wrong(error)

    async def _answer(self, connection: Connection) -> None:
        raise NotImplementedError


class _Awaited(_TaskAnswer):
    """The response that a handler's coroutine returns."""

    def __init__(self, handler: AsyncHandler, request: Request) -> None:
        super().__init__()
        self._handler, self._request = handler, request

    async def _answer(self, connection: Connection) -> None:
        response = await self._handler(self._request)
        connection.respond(response.status, response.headers, response.body)


class _Inflated(_TaskAnswer):
    """The answer to a request whose body comes compressed. A thread inflates it: tokens of others need not wait for that."""

    def __init__(self, answer: Handler, request: Request, max_body_bytes: int) -> None:
        super().__init__()
        self._answer_plain, self._request, self._max_body_bytes = answer, request, max_body_bytes

    async def _answer(self, connection: Connection) -> None:
        request = self._request
        request.body = await asyncio.to_thread(inflated, request.body, request.coding, self._max_body_bytes)
        request.coding = ""
        connection.answer_with(self._answer_plain(request))


class Streamed(_TaskAnswer):
    """A response with status 200 that leaves in chunks as they come, and its head with the first of them."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], headers: bytes) -> None:
        super().__init__()
        self._pieces, self._headers = pieces, headers

    async def _answer(self, connection: Connection) -> None:
        async with aclosing(self._pieces) as pieces:
            if connection.request is None or connection.request.method == "HEAD":
                connection.respond(200, self._headers, b"")
                return
            async for piece in pieces:
                if not connection.is_started:
                    connection.start(200, self._headers)
                connection.write(piece, is_last=False)
                if connection.is_stuck:
                    self._resumed.clear()
                    await self._resumed.wait()
            connection.write(b"", is_last=True)


def json_response(value: Any, status: int = 200, headers: bytes = b"") -> Response:
    """`value` as JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(status, text.encode(), JSON + headers)
