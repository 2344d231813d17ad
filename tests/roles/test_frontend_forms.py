"""One request in each of the forms that HTTP has for it: whatever the way, the answer is the same."""

import json
import re
import socket
from collections.abc import Iterator

import pytest

from tests.roles.frontends import BODY, Frontend, started

DATA = json.dumps({**BODY, "max_tokens": 9}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-request-id: mine\r\n"
SIZE = b"content-length: %d\r\n" % len(DATA)
CLOSE = b"connection: close\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"


@pytest.fixture(scope="module")
def frontend() -> Iterator[Frontend]:
    yield from started("--mesh", "frontend-forms", "--cors-origin", "https://chat.example.org")


def chunks(data: bytes) -> bytes:
    """A few, and their end."""
    parts = [data[first : first + 20] for first in range(0, len(data), 20)]
    return b"".join([b"%x\r\n%b\r\n" % (len(part), part) for part in parts]) + b"0\r\n\r\n"


def answer_of(received: bytes) -> tuple[str, list[str]]:
    """The text of one whole answer, and the names of its headers. Ids and dates differ between any two."""
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 200 OK" and "x-request-id: mine" in lines, received
    return json.loads(body)["choices"][0]["text"], sorted(line.partition(":")[0] for line in lines[1:])


FORMS = {
    "in chunks": [HEAD + CLOSE + CHUNKED + b"\r\n" + chunks(DATA)],
    "in two reads": [HEAD + CLOSE + SIZE + b"\r\n" + DATA[:9], DATA[9:]],
    "its head in two reads": [HEAD[:30], HEAD[30:] + CLOSE + SIZE + b"\r\n" + DATA],
    "with a query": [HEAD.replace(b"completions", b"completions?a=b") + CLOSE + SIZE + b"\r\n" + DATA],
    "after being told to go on": [HEAD + CLOSE + SIZE + b"expect: 100-continue\r\n\r\n", DATA],
    "for a page of another site": [HEAD + CLOSE + SIZE + b"origin: https://other.example.org\r\n\r\n" + DATA],
}


def exchanged(connection: socket.socket, parts: list[bytes]) -> bytes:
    """Send these one after the other, and return everything until the other side closes."""
    received = b""
    for number, part in enumerate(parts):
        connection.sendall(part)
        if number + 1 < len(parts) and b"100-continue" in part:
            received = connection.recv(65_536)
            assert received == b"HTTP/1.1 100 Continue\r\n\r\n"
            received = b""
    while part := connection.recv(65_536):
        received += part
    return received


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_request_has_the_same_answer(frontend: Frontend, form: str) -> None:
    expected = answer_of(frontend.raw(HEAD + CLOSE + SIZE + b"\r\n" + DATA))
    with frontend.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert answer_of(exchanged(connection, FORMS[form])) == expected


def test_an_older_client_gets_it_too(frontend: Frontend) -> None:
    expected, _ = answer_of(frontend.raw(HEAD + CLOSE + SIZE + b"\r\n" + DATA))
    assert answer_of(frontend.raw(HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + SIZE + b"\r\n" + DATA))[0] == expected


def test_an_older_client_gets_a_stream_to_the_connections_end_and_no_chunks(frontend: Frontend) -> None:
    body = json.dumps({**BODY, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.0\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
    told, _, events = frontend.raw(head + body).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in told and b"connection: close" in told
    assert events.startswith(b"data: {") and events.endswith(b"}\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/mesh/events", "/metrics"])
def test_a_head_is_told_what_a_get_would_be_without_the_body(frontend: Frontend, path: str) -> None:
    told = frontend.raw(f"HEAD {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    assert told.endswith(b"\r\n\r\n") and told.count(b"\r\n\r\n") == 1 and b"content-length: " in told
    assert told.startswith(b"HTTP/1.1 404" if path == "/nowhere" else b"HTTP/1.1 200")


def test_requests_that_come_before_the_first_is_answered_are_answered_in_turn(frontend: Frontend) -> None:
    plain, short = HEAD + SIZE + b"\r\n" + DATA, json.dumps({**BODY, "max_tokens": 1}).encode()
    last = HEAD + CLOSE + b"content-length: %d\r\n\r\n" % len(short) + short
    received = frontend.raw(plain * 3 + b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" + last)
    counts = [int(count) for count in re.findall(rb'"completion_tokens":(\d+)', received)]
    assert counts == [9, 9, 9, 1] and received.count(b"HTTP/1.1 200 OK") == 5


@pytest.mark.parametrize("then", [b"\x00 garbage\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"x" * 70_000 + b"\r\n\r\n"], ids=["garbage", "head"])
def test_what_is_refused_behind_a_request_in_one_read_is_not_taken_for_that_requests_response(frontend: Frontend, then: bytes) -> None:
    told = frontend.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" + then)
    assert told == b"" or told.startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_are_answered_in_turn_and_hundreds_of_them_are_too_many(frontend: Frontend) -> None:
    one = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    last = one.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    assert frontend.raw(one * 9 + last).count(b"HTTP/1.1 200 OK") == 10
    try:
        answered = frontend.raw(one * 500 + last)
    except ConnectionResetError:
        answered = b""
    assert answered.count(b"HTTP/1.1 200 OK") < 500
    assert frontend.client.get("/health").status_code == 200


def test_keep_alive_serves_one_request_after_the_other(frontend: Frontend) -> None:
    with frontend.connect() as connection:
        for _ in range(3):
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            told = b""
            while not told.endswith(b"}"):  # head and body may come one after the other
                told += connection.recv(65_536)
            assert told.startswith(b"HTTP/1.1 200 OK")
