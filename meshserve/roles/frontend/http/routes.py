"""The table of routes: which handler answers which method and path."""

from collections.abc import Callable
from urllib.parse import quote

from meshserve.errors import InvalidRequest, MeshserveError
from meshserve.roles.frontend.http.connection import Answered
from meshserve.roles.frontend.http.messages import JSON, Request, Response, header_lines

Handler = Callable[[Request], Answered]
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

    def answer(self, request: Request) -> Answered:
        """What the handler of this request gives back, or a response that there is none."""
        methods = self._exact.get(request.path) or self._open_route(request)
        if methods is None:
            return self._nothing_here(request)
        handler = methods.get(request.method)
        if handler is None:
            words = f"{request.method} is not for {request.path}"
            return self._refusal(request, 405, words, b"allow: %b\r\n" % ", ".join(methods).encode())
        return handler(request)

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
