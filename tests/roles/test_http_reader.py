"""The pure parts of the HTTP door: from bytes to requests in any split, and the table of routes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.errors import HeaderTooLarge, InvalidRequest, MeshserveError, RequestTooLarge
from meshserve.roles.frontend.http.messages import Request, Response
from meshserve.roles.frontend.http.reader import RequestReader
from meshserve.roles.frontend.routes import Routes

HEAD = b"POST /a%20b?c=d HTTP/1.1\r\nHost: here\r\nX-Twice: first\r\nx-twice: second\r\n"
STREAM = (
    HEAD
    + b"content-length: 5\r\n\r\nhello"
    + HEAD
    + b"transfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\nhost: a trailer\r\n\r\n"
    + b"GET http://elsewhere/a%20b?c=d HTTP/1.0\r\nhost: here\r\nx-twice: first\r\n\r\n"
)


def reader(max_header_bytes: int = 1000, max_body_bytes: int = 1000) -> RequestReader:
    return RequestReader("10.0.0.1", "http", max_header_bytes, max_body_bytes)


def read(data: bytes, cuts: list[int]) -> list[Request]:
    one, borders = reader(), [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [request for start, end in pairwise(borders) for request in one.feed(data[start:end])]


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_requests_are_the_same_in_any_split(cuts: list[int]) -> None:
    first, second, old = read(STREAM, cuts)
    for request in (first, second, old):
        assert (request.path, request.raw_path, request.query) == ("/a b", b"/a%20b", b"c=d")
        assert (request.headers[b"host"], request.headers[b"x-twice"]) == (b"here", b"first")
    assert first.body == second.body == b"hello" and first.method == "POST"
    assert first.takes_chunks and first.keeps_alive and not old.takes_chunks and not old.keeps_alive


@given(st.binary(max_size=300))
def test_what_is_no_http_is_refused_and_nothing_else_happens(data: bytes) -> None:
    try:
        assert isinstance(reader().feed(data), list)
    except MeshserveError as error:
        assert error.http_status in (400, 413, 431)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"GET / HTTP/1.1\r\ncookie: " + b"x" * 1000, HeaderTooLarge),
        (b"GET / HTTP/1.1\r\ncookie: " + b"x" * 1000 + b"\r\n\r\n", HeaderTooLarge),
        (b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 130, HeaderTooLarge),
        (b"POST / HTTP/1.1\r\ncontent-length: 1001\r\n\r\n", RequestTooLarge),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001, RequestTooLarge),
        (b"GET / HTTP/1.1\r\n\r\n" * 129, InvalidRequest),
        (b"CONNECT elsewhere:80 HTTP/1.1\r\n\r\n", InvalidRequest),
    ],
)
def test_each_limit_is_kept_in_one_read_and_in_many(data: bytes, error: type[MeshserveError]) -> None:
    with pytest.raises(error):
        reader().feed(data)
    if data.count(b"GET") < 2:  # so many in one read are too many, and not one after the other
        one = reader()
        with pytest.raises(error):
            for number in range(len(data)):
                one.feed(data[number : number + 1])


def table() -> Routes:
    routes = Routes(lambda path, error: error.message.encode())
    for method, path in (("GET", "/"), ("POST", "/exact"), ("GET", "/exact"), ("DELETE", "/one/{name}"), ("GET", "/any/{path}")):
        routes.add(method, path, lambda request: Response(200, f"{request.path}|{request.name}".encode()))
    return routes


@pytest.mark.parametrize(
    ("line", "status", "text"),
    [
        ("GET /", 200, "/|"),
        ("HEAD /exact", 200, "/exact|"),
        ("POST /exact", 200, "/exact|"),
        ("DELETE /exact", 405, "DELETE is not for /exact"),
        ("GET /one/a", 405, "GET is not for /one/a"),
        ("DELETE /one/a", 200, "/one/a|a"),
        ("DELETE /one/a/b", 404, "there is no /one/a/b here"),
        ("DELETE /one/", 404, "there is no /one/ here"),
        ("GET /any/a/b", 200, "/any/a/b|a/b"),
        ("GET /any/", 200, "/any/|"),
        ("GET /Exact", 404, "there is no /Exact here"),
        ("GET //exact", 404, "there is no //exact here"),
        ("POST /exact/", 307, ""),
        ("GET /any", 307, ""),
    ],
)
def test_a_path_finds_its_handler_or_is_told_why_not(line: str, status: int, text: str) -> None:
    (request,) = reader().feed(f"{line} HTTP/1.1\r\n\r\n".encode())
    response = table().answer(request)
    assert isinstance(response, Response) and (response.status, response.body) == (status, text.encode())
    if status == 405:
        assert b"allow: " in response.headers


def test_a_websocket_is_refused_in_the_way_in_which_clients_fall_back_at_once() -> None:
    for path, status in (("/exact", 200), ("/one/a", 405)):
        (request,) = reader().feed(f"GET {path} HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n".encode())
        response = table().answer(request)
        assert isinstance(response, Response) and response.status == status
    routes = Routes(lambda path, error: error.message.encode())
    routes.add("POST", "/asks", lambda request: Response(200))
    (request,) = reader().feed(b"GET /asks HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
    response = routes.answer(request)
    assert isinstance(response, Response) and response.status == 426 and b"upgrade: HTTP/1.1" in response.headers
