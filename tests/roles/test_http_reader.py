"""The pure parts of the HTTP door: from bytes to requests in any split, and the table of routes."""

import gzip
import sys
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.errors import HeaderTooLarge, InvalidRequest, MeshserveError, RequestTooLarge, UnsupportedCoding
from meshserve.roles.frontend.http.codings import coding_of, inflated
from meshserve.roles.frontend.http.messages import Request, Response
from meshserve.roles.frontend.http.reader import RequestReader
from meshserve.roles.frontend.routes import Routes

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

HEAD = b"POST /a%20b?c=d HTTP/1.1\r\nHost: here\r\nX-Twice: first\r\nx-twice: second\r\n"
STREAM = (
    HEAD
    + b"content-length: 5\r\n\r\nhello"
    + HEAD
    + b"transfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\nhost: a trailer\r\n\r\n"
    + b"GET http://elsewhere/a%20b?c=d HTTP/1.0\r\nhost: here\r\nx-twice: first\r\n\r\n"
)

UPGRADE = HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
UPGRADES = (
    UPGRADE
    + b"content-length: 5\r\n\r\nhello"
    + UPGRADE
    + b"transfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\nhost: a trailer\r\n\r\n"
    + UPGRADE.replace(b"h2c", b"websocket").replace(b"POST", b"GET")
    + b"\r\n"
    + HEAD.replace(b"1.1", b"1.0")
    + b"connection: upgrade\r\nupgrade: TLS/1.2\r\ncontent-length: 5\r\n\r\nhello"
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


@given(st.lists(st.integers(0, len(UPGRADES)), max_size=20))
def test_row_47_another_protocol_that_is_asked_for_costs_no_body(cuts: list[int]) -> None:
    first, second, third, old = read(UPGRADES, cuts)
    assert [request.body for request in (first, second, third, old)] == [b"hello", b"hello", b"", b"hello"]
    assert (third.method, third.headers[b"upgrade"]) == ("GET", b"websocket")
    assert first.keeps_alive and second.keeps_alive and third.keeps_alive and not old.keeps_alive


@given(st.lists(st.integers(0, 200), max_size=20))
def test_row_47_connect_is_a_request_like_others(cuts: list[int]) -> None:
    first, second = read(b"CONNECT /a HTTP/1.1\r\nhost: here\r\ncontent-length: 5\r\n\r\nhelloGET /b HTTP/1.1\r\nhost: here\r\n\r\n", cuts)
    assert [(request.method, request.path, request.body) for request in (first, second)] == [
        ("CONNECT", "/a", b"hello"),
        ("GET", "/b", b""),
    ]


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
        (HEAD + b"content-length: 1001\r\n\r\n", RequestTooLarge),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001, RequestTooLarge),
        (b"GET / HTTP/1.1\r\nhost: here\r\n\r\n" * 129, InvalidRequest),
        (b"CONNECT elsewhere:80 HTTP/1.1\r\nhost: here\r\n\r\n", InvalidRequest),
        (b"GET / HTTP/1.1\r\n\r\n", InvalidRequest),
        (b"GET / HTTP/1.1\r\nhost: here\r\nhost: here\r\n\r\n", InvalidRequest),
        (b"GET / HTTP/1.0\r\nhost: here\r\nHost: there\r\n\r\n", InvalidRequest),
        (HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", InvalidRequest),
        (HEAD + b"content-length: 5\r\ncontent-length: 5\r\n\r\n", InvalidRequest),
        (UPGRADE + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", InvalidRequest),
        (UPGRADE + b"content-length: 1001\r\n\r\n", RequestTooLarge),
        (UPGRADE + b"transfer-encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001, RequestTooLarge),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", InvalidRequest),
        (HEAD + b"content-encoding: br\r\n\r\n", UnsupportedCoding),
        (HEAD + b"content-encoding: gzip\r\ncontent-encoding: gzip\r\n\r\n", UnsupportedCoding),
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
    routes = Routes(lambda path, error: error.message.encode(), 1000)
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
        ("GET /any/", 404, "there is no /any/ here"),
        ("GET /Exact", 404, "there is no /Exact here"),
        ("GET //exact", 404, "there is no //exact here"),
        ("POST /exact/", 307, ""),
        ("GET /any", 404, "there is no /any here"),
    ],
)
def test_a_path_finds_its_handler_or_is_told_why_not(line: str, status: int, text: str) -> None:
    (request,) = reader().feed(f"{line} HTTP/1.1\r\nhost: here\r\n\r\n".encode())
    response = table().answer(request)
    assert isinstance(response, Response) and (response.status, response.body) == (status, text.encode())
    if status == 405:
        assert b"allow: " in response.headers


def test_a_websocket_is_refused_in_the_way_in_which_clients_fall_back_at_once() -> None:
    for path, status in (("/exact", 200), ("/one/a", 405)):
        (request,) = reader().feed(f"GET {path} HTTP/1.1\r\nhost: here\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n".encode())
        response = table().answer(request)
        assert isinstance(response, Response) and response.status == status
    routes = Routes(lambda path, error: error.message.encode(), 1000)
    routes.add("POST", "/asks", lambda request: Response(200))
    for name in ("websocket", "WebSocket"):
        (request,) = reader().feed(f"GET /asks HTTP/1.1\r\nhost: here\r\nconnection: upgrade\r\nupgrade: {name}\r\n\r\n".encode())
        response = routes.answer(request)
        assert isinstance(response, Response) and response.status == 426 and b"upgrade: HTTP/1.1" in response.headers


# --- bodies that come compressed


def compressed(body: bytes, coding: str) -> bytes:
    return gzip.compress(body) if coding == "gzip" else zstd.compress(body)


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
@given(body=st.binary(max_size=2000), num_pieces=st.integers(1, 3))
def test_row_47_a_compressed_body_is_what_it_was_and_its_limit_counts_that(coding: str, body: bytes, num_pieces: int) -> None:
    sent = compressed(body, coding) * num_pieces
    assert inflated(sent, coding, len(body) * num_pieces) == body * num_pieces
    if body:
        with pytest.raises(RequestTooLarge):
            inflated(sent, coding, len(body) * num_pieces - 1)
    with pytest.raises(InvalidRequest):
        inflated(sent[:-1], coding, 10_000)


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_row_47_a_bomb_is_refused_before_it_goes_off(coding: str) -> None:
    bomb = compressed(bytes(256 * 1024 * 1024), coding)
    tracemalloc.start()
    try:
        with pytest.raises(RequestTooLarge):
            inflated(bomb, coding, 1024 * 1024)
        assert tracemalloc.get_traced_memory()[1] < 32 * 1024 * 1024
    finally:
        tracemalloc.stop()
    with pytest.raises(InvalidRequest):
        inflated(compressed(b"", coding) * 10_000, coding, 1024)


@pytest.mark.parametrize("body", [b"", b"no such thing", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"])
@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_what_is_not_compressed_as_it_says_is_refused(coding: str, body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        inflated(body, coding, 1000)


@pytest.mark.parametrize(
    ("values", "coding"),
    [([b"gzip"], "gzip"), ([b"X-GZip"], "gzip"), ([b" zstd "], "zstd"), ([b"identity"], ""), ([b""], ""), ([b"identity", b"gzip"], "gzip")],
)
def test_the_coding_of_a_body_has_one_name(values: list[bytes], coding: str) -> None:
    assert coding_of(values) == coding
