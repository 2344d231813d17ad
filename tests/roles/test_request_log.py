"""What an operator sees of HTTP requests: a line for each, and counts of a bounded number of series."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from meshserve.errors import NoWorker, PeerLost
from meshserve.observe.receipts import FrontendReceipt
from meshserve.roles.frontend.http.messages import Request
from meshserve.roles.frontend.http.request_log import RequestLog
from meshserve.telemetry import MAX_REQUEST_COUNTS, RequestCounts
from tests.harness import wait_until
from tests.roles.frontends import BODY, Frontend, started

READY_S = 10.0
ROUTES = ("/v1/completions", "/health")


def a_log(counts: RequestCounts) -> RequestLog:
    return RequestLog(
        counts, lambda path: path if path in ROUTES else None, lambda model: model == "served"
    )


def a_request(path: str, status: int, code: str = "ok", model: str = "") -> Request:
    request = Request(
        "POST", path, b"", b"", {}, "10.0.0.1", "http", True, True, 0.0, status=status
    )
    request.account = FrontendReceipt("id", "label", 0.0, model=model, outcome=code)
    return request


@pytest.mark.parametrize(
    ("request_", "key"),
    [
        (a_request("/health", 200), ("/health", 200, "ok", "")),
        (
            a_request("/v1/completions", 503, NoWorker.code, "served"),
            ("/v1/completions", 503, NoWorker.code, "served"),
        ),
        (
            a_request("/v1/completions", 404, "model_not_found", "gpt-9"),
            ("/v1/completions", 404, "model_not_found", "other"),
        ),
        (
            a_request("/v1/completions", 502, "of_a_newer_peer", "served"),
            ("/v1/completions", 502, "other", "served"),
        ),
        (a_request("/admin.php", 404, "invalid_request"), ("other", 404, "invalid_request", "")),
        (a_request("/health", 404), ("/health", 404, "other", "")),
    ],
)
def test_labels_are_names_that_the_mesh_knows(request_: Request, key: tuple[Any, ...]) -> None:
    counts: RequestCounts = {}
    log = a_log(counts)
    log.count(request_)
    log.count(request_)
    assert counts == {key: 2}


def test_a_flood_of_odd_requests_adds_a_bounded_number_of_series() -> None:
    counts: RequestCounts = {}
    log = RequestLog(
        counts, lambda path: path, lambda model: True
    )  # as if all that is asked were served
    for number in range(3 * MAX_REQUEST_COUNTS):
        log.count(a_request(f"/{number}", 200, "ok", f"m{number}"))
    assert len(counts) == MAX_REQUEST_COUNTS + 1 and sum(counts.values()) == 3 * MAX_REQUEST_COUNTS


def test_who_leaves_early_is_counted_with_what_was_sent_until_then() -> None:
    counts: RequestCounts = {}
    log = a_log(counts)
    log.left(Request("GET", "/health", b"", b"", {}, "10.0.0.1", "http", True, True, 0.0))
    log.left(a_request("/v1/completions", 200, PeerLost.code, "served"))
    assert counts == {
        ("/health", 499, "cancelled", ""): 1,
        ("/v1/completions", 200, PeerLost.code, "served"): 1,
    }
    assert (
        Request("GET", "/health", b"", b"", {}, "", "http", True, True, 0.0).account.outcome == "ok"
    ), "shared by all, changed by none"


# --- a frontend


@contextmanager
def a_frontend(*options: str) -> Iterator[Frontend]:
    yield from started("--api-key", "secret", *options, headers={"authorization": "Bearer secret"})


def raw(frontend: Frontend, data: bytes) -> None:
    with frontend.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65_536):
            pass


def ask_in_every_way(frontend: Frontend) -> list[tuple[Any, ...]]:
    """Returns what the log must say of each: method, route, status, code, model, tokens."""
    client = frontend.client
    client.post("/v1/completions", json=BODY)
    chat = {
        "model": "dummy",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 3,
        "stream": True,
    }
    client.post("/v1/chat/completions", json=chat)
    client.post("/v1/completions", json={**BODY, "model": "gpt 9"})
    client.post("/v1/completions", json={**BODY, "max_tokens": -1})
    client.get("/nowhere")
    client.get("/v1/models/dummy")
    client.get("/v1/completions")
    client.get("/health/")
    httpx.post(frontend.url + "/v1/completions", json=BODY)
    raw(frontend, b"GARBAGE\r\n\r\n")
    raw(
        frontend,
        b"POST /v1/completions?key=private HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\n\r\n",
    )
    raw(frontend, b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 20_000 + b"\r\n\r\n")
    return [
        ("POST", "/v1/completions", 200, "ok", "dummy", 2),
        ("POST", "/v1/chat/completions", 200, "ok", "dummy", 3),
        ("POST", "/v1/completions", 404, "model_not_found", "gpt 9", None),
        ("POST", "/v1/completions", 400, "invalid_request", None, None),
        ("GET", "/nowhere", 404, "invalid_request", None, None),
        ("GET", "/v1/models/{path}", 200, "ok", None, None),
        ("GET", "/v1/completions", 405, "invalid_request", None, None),
        ("GET", "/health", 307, "ok", None, None),
        ("POST", "/v1/completions", 401, "invalid_api_key", None, None),
        ("-", "-", 400, "invalid_request", None, None),
        ("POST", "/v1/completions", 413, "request_too_large", None, None),
        ("GET", "/health", 431, "header_too_large", None, None),
    ]


def entries(frontend: Frontend) -> list[dict[str, Any]]:
    found = [json.loads(line.text) for line in frontend.process.stderr]
    return [entry for entry in found if entry.get("event") == "http_request"]


def test_each_request_has_a_line_whatever_became_of_it() -> None:
    with a_frontend("--log-level", "info", "--log-json") as frontend:
        expected = ask_in_every_way(frontend)
        wait_until(lambda: len(entries(frontend)) == len(expected), READY_S, "a line of each")
        names = ("method", "route", "status", "code", "model", "completion_tokens")
        assert [tuple(entry.get(name) for name in names) for entry in entries(frontend)] == expected
        first = entries(frontend)[0]
        assert (
            first["client"] == "127.0.0.1"
            and first["key"] == 0
            and first["prompt_tokens"] == 2
            and first["ms"] > 0
        )
        assert frontend.client.get(f"/mesh/requests/{first['request_id']}").status_code == 200
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d{4}", first["time"])
        assert "private" not in frontend.process.stderr_text

        body = {**BODY, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with frontend.client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        left = wait_until(
            lambda: [entry for entry in entries(frontend) if entry["code"] == "cancelled"],
            READY_S,
            "its line",
        )
        assert left[0]["status"] == 200 and left[0]["model"] == "dummy"


def test_no_line_is_held_back_and_each_says_when_to_the_millisecond() -> None:
    with a_frontend("--log-level", "info") as frontend:
        for _ in range(50):
            frontend.client.get("/health")
        at = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d{4}"
        said = r"method=GET route=/health status=200 code=ok ms=\S+ client=127.0.0.1"
        form = f"{at} INFO: {said}"
        wait_until(
            lambda: len(re.findall(form, frontend.process.stderr_text)) == 50, READY_S, "all lines"
        )


def test_metrics_count_what_the_log_says_and_compress_for_those_who_ask() -> None:
    with a_frontend() as frontend:
        asked = ask_in_every_way(frontend)
        packed = frontend.client.get("/metrics", headers={"accept-encoding": "gzip"})
        plain = frontend.client.get("/metrics", headers={"accept-encoding": "gzip;q=0, identity"})
        assert (
            "content-encoding" not in plain.headers and packed.headers["content-encoding"] == "gzip"
        )
        assert (
            int(packed.headers["content-length"]) < len(plain.content) / 4
            and "vllm:" not in plain.text
        )
        labels = re.findall(
            r"^meshserve_http_requests_total\{(.*)\} (\S+)$", packed.text, re.MULTILINE
        )
        counted = {
            tuple(re.findall(r'(?:code|model|route|status)="([^"]*)"', found)): float(value)
            for found, value in labels
        }
        assert (
            sum(counted.values()) == len(asked)
            and "http_request" not in frontend.process.stderr_text
        )
        assert (
            counted["model_not_found", "other", "/v1/completions", "404"] == 1
            and counted["ok", "dummy", "/v1/completions", "200"] == 1
        )
        assert (
            counted["invalid_api_key", "", "/v1/completions", "401"] == 1
            and counted["invalid_request", "", "other", "404"] == 1
        )


def test_vllms_names_come_for_those_who_ask() -> None:
    with a_frontend("--metrics-vllm") as frontend:
        frontend.client.post("/v1/completions", json=BODY)
        text = frontend.client.get("/metrics").text
        assert re.search(
            r'^vllm:num_requests_running\{engine="[^"]+",model_name="dummy"\} 0.0$',
            text,
            re.MULTILINE,
        )
        assert re.search(
            r'^vllm:request_success_total\{engine="[^"]+",model_name="dummy"\} 1.0$',
            text,
            re.MULTILINE,
        )
        assert re.search(
            r'^vllm:time_to_first_token_seconds_count\{engine="[^"]+",model_name="dummy"\} 1.0$',
            text,
            re.MULTILINE,
        )
