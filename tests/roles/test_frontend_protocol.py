"""What clients of all kinds speak: upgrades, HTTP/1.0, compressed bodies, one `Host`, half of
everything.
"""

import gzip
import json
import sys
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.roles.frontends import BODY, Frontend, error_of, started

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

UPGRADES = ("h2c", "TLS/1.2", "websocket")


@pytest.fixture(scope="module")
def frontend() -> Iterator[Frontend]:
    yield from started(
        "--mesh", "frontend-protocol", "--max-body-bytes", "200000", "--log-level", "debug"
    )


def request_head(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "host: localhost", *headers, "", ""]).encode()


@pytest.mark.parametrize("protocol", UPGRADES)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_row_47_a_request_that_asks_for_another_protocol_keeps_its_body(
    frontend: Frontend, protocol: str, is_streamed: bool
) -> None:
    body = json.dumps({**BODY, "stream": is_streamed}).encode()
    asks = (
        "connection: Upgrade, HTTP2-Settings",
        f"upgrade: {protocol}",
        "http2-settings: AAMAAABkAAQCAAAAAAIAAAAA",
    )
    head = request_head("/v1/completions", *asks, f"content-length: {len(body)}")
    with frontend.connect() as connection:
        connection.sendall(head)
        connection.sendall(body)  # Java sends it apart
        last = (
            request_head("/v1/completions", "connection: close", f"content-length: {len(body)}")
            + body
        )
        connection.sendall(last)
        told = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert told.count(b"HTTP/1.1 200 OK\r\n") == 2 and b"101 " not in told, told


def test_row_47_a_client_of_http_1_0_gets_no_chunks_and_no_word_to_go_on(
    frontend: Frontend,
) -> None:
    body = json.dumps({**BODY, "stream": True}).encode()
    head = (
        b"POST /v1/completions HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
        % len(body)
    )
    told = frontend.raw(head + body)
    answered, _, text = told.partition(b"\r\n\r\n")
    assert (
        answered.startswith(b"HTTP/1.1 200 ")
        and b"transfer-encoding" not in answered
        and b"connection: close" in answered
    )
    assert text.startswith(b"data: {") and text.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ((), b"400"),
        (("host: localhost", "host: localhost"), b"400"),
        (("host: localhost",), b"200"),
    ],
)
def test_row_47_a_request_names_its_host_once(
    frontend: Frontend, lines: tuple[str, ...], status: bytes
) -> None:
    head = "\r\n".join(["GET /health HTTP/1.1", *lines, "connection: close", "", ""])
    assert frontend.raw(head.encode()).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize(
    ("coding", "compress"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("zstd", zstd.compress)],
)
def test_row_47_a_compressed_body_is_read_and_counts_as_it_is_inflated(
    frontend: Frontend, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    def ask(body: bytes) -> httpx.Response:
        return frontend.client.post(
            "/v1/completions", content=compress(body), headers={"content-encoding": coding}
        )

    assert ask(json.dumps(BODY).encode()).status_code == 200
    assert error_of(ask(json.dumps(BODY).encode() + b" " * 300_000))["code"] == "request_too_large"
    broken = frontend.client.post(
        "/v1/completions", content=compress(b"{}")[:-3], headers={"content-encoding": coding}
    )
    assert broken.status_code == 400 and error_of(broken)["code"] == "invalid_request"


def test_row_47_a_body_in_another_coding_is_415(frontend: Frontend) -> None:
    response = frontend.client.post(
        "/v1/completions", content=b"x", headers={"content-encoding": "br"}
    )
    assert response.status_code == 415 and error_of(response)["code"] == "unsupported_coding"


@pytest.mark.parametrize("lines", [("content-length: 300000",), ("transfer-encoding: chunked",)])
def test_row_47_a_body_that_is_too_long_is_refused_where_its_client_waits_to_send_it(
    frontend: Frontend, lines: tuple[str, ...]
) -> None:
    head = request_head("/v1/completions", "expect: 100-continue", *lines)
    with frontend.connect() as connection:
        connection.sendall(head)
        told = connection.recv(65_536)
        if told.startswith(b"HTTP/1.1 100 "):
            connection.sendall(b"493e0\r\n" + b"x" * 300_000 + b"\r\n0\r\n\r\n")
            told = connection.recv(65_536)
    assert told.startswith(
        b"HTTP/1.1 413 "
    )  # that no traceback is logged is looked at when the frontend ends


def test_row_47_half_of_everything_loses_nobody_elses_body(frontend: Frontend) -> None:
    body = json.dumps(BODY).encode()
    whole = (
        request_head(
            "/v1/completions", "connection: upgrade", "upgrade: h2c", f"content-length: {len(body)}"
        )
        + body
    )
    halves = [frontend.connect() for _ in range(len(whole))]
    try:
        for length, connection in enumerate(halves):
            connection.sendall(whole[:length])
        assert (
            frontend.client.post(
                "/v1/completions", content=gzip.compress(body), headers={"content-encoding": "gzip"}
            ).status_code
            == 200
        )
        for length, connection in enumerate(halves):
            connection.sendall(whole[length:])
        assert {connection.recv(12) for connection in halves} == {b"HTTP/1.1 200"}
    finally:
        for connection in halves:
            connection.close()
