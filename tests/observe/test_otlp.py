"""Spans for an OpenTelemetry collector: where they go, and what they say by its conventions."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from meshserve.cli.otlp_options import otlp_config
from meshserve.config import OtlpConfig
from meshserve.errors import (
    Cancelled,
    EngineFailed,
    InvalidRequest,
    MeshserveError,
    Overloaded,
    UsageError,
    http_status_of,
)
from meshserve.observe.otlp import SCHEMA_URL, export_body, frontend_span, receipt_spans
from meshserve.observe.receipts import FrontendReceipt, Receipt
from meshserve.roles.frontend.http.messages import Request
from meshserve.roles.frontend.http.span_attributes import span_attributes
from meshserve.wire.completion import TraceContext
from tests.harness import ALL_ROLES, Process, meshserve_command, run_command, wait_until

READY_S = 10.0
OWN = TraceContext("a" * 32, "b" * 16)
BASE = "OTEL_EXPORTER_OTLP_"
Post = tuple[dict[str, str], bytes]
"""Headers, by lower-case names, and the body."""


def url_of(option: str | None, **environment: str) -> str | None:
    found = otlp_config(option, environment, True)
    return None if found is None else found.url


@pytest.mark.parametrize(
    ("option", "environment", "url"),
    [
        (None, {}, None),
        ("http://c:4318/", {}, "http://c:4318/v1/traces"),
        (
            "http://c:4318",
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://other"},
            "http://c:4318/v1/traces",
        ),
        (
            None,
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/otlp"},
            "http://c:4318/otlp/v1/traces",
        ),
        (
            None,
            {
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/as-it-is",
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x",
            },
            "http://c/as-it-is",
        ),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "  "}, None),
        (None, {"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4318/v1/traces"),
        (None, {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, None),
        (None, {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, None),
        (None, {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c"}, None),
    ],
)
def test_where_spans_go_is_as_the_specification_says(
    option: str | None, environment: dict[str, str], url: str | None
) -> None:
    assert url_of(option, **environment) == url
    assert otlp_config(None, environment, False) is None, "with --no-observe"


def test_headers_timeout_compression_certificates_and_resource_come_from_the_environment() -> None:
    environment = {
        f"{BASE}HEADERS": "unused=1",
        f"{BASE}TRACES_HEADERS": "authorization=Bearer%20a%3Db, x-tenant = one,",
        f"{BASE}TIMEOUT": "750",
        f"{BASE}COMPRESSION": "gzip",
        f"{BASE}CERTIFICATE": "ca.pem",
        f"{BASE}CLIENT_CERTIFICATE": "me.pem",
        f"{BASE}CLIENT_KEY": "me.key",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=lab,service.name=unused",
        "OTEL_SERVICE_NAME": "chat",
    }
    headers = (("authorization", "Bearer a=b"), ("x-tenant", "one"))
    resource = (("deployment.environment.name", "lab"), ("service.name", "chat"))
    found = otlp_config("http://c", environment, True)
    assert found == OtlpConfig(
        "http://c/v1/traces", headers, 0.75, True, "ca.pem", "me.pem", "me.key", resource
    )
    assert "Bearer" not in repr(found)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ENDPOINT", "localhost:4318", "ENDPOINT 'localhost:4318' is not a URL"),
        ("ENDPOINT", "http://[::1", "ENDPOINT 'http://[::1' is not a URL"),
        ("ENDPOINT", "http://c:http", "is not a URL"),
        ("ENDPOINT", "http://c:65536", "is not a URL"),
        ("ENDPOINT", "http://c/a b", "is not a URL"),
        ("ENDPOINT", "https://me:secret@c", "HEADERS is for credentials"),
        ("PROTOCOL", "grpc", "over HTTP; set http/json"),
        ("TIMEOUT", "2s", "TIMEOUT '2s' is not a number of milliseconds"),
        ("TIMEOUT", "\u0663", "is not a number of milliseconds"),
        ("TIMEOUT", "9" * 5000, "is not a number of milliseconds"),
        ("TIMEOUT", "1".zfill(9) + "0" * 5000, "is not a number of milliseconds"),
        ("COMPRESSION", "zstd", "gzip or none"),
        ("HEADERS", "authorization secret", "part 1 is not NAME=VALUE"),
        ("HEADERS", "a b=secret", "'a b' is not a valid header name"),
        ("HEADERS", "a=secret%0d%0ab", "the value of a has"),
    ],
)
def test_what_cannot_be_heeded_is_refused_by_its_name_without_its_secret(
    name: str, value: str, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        otlp_config(None, {f"{BASE}ENDPOINT": "http://c", f"{BASE}{name}": value}, True)
    assert (
        words in caught.value.message
        and f"{BASE}{name}" in caught.value.message
        and "secret" not in caught.value.message
    )


# --- what spans say


def attributes(span: dict[str, Any]) -> dict[str, Any]:
    return {pair["key"]: next(iter(pair["value"].values())) for pair in span["attributes"]}


def test_a_frontends_span_is_that_of_an_http_server() -> None:
    headers = {b"host": b"[::1]:8000", b"user-agent": b"openai"}
    request = Request(
        "POST", "/v1/completions", b"", b"key=secret", headers, "10.0.0.1", "https", True, True, 0.0
    )
    request.route, request.status = "/v1/completions", 200
    span = frontend_span(
        FrontendReceipt("r", "", 0.0, ended_s=1.0),
        span_attributes(request),
        10**18,
        OWN,
        "",
        "front",
    )
    assert span["name"] == "POST /v1/completions" and span["kind"] == 2 and "status" not in span
    found = attributes(span)
    assert (
        found["http.request.method"] == "POST"
        and found["http.route"] == found["url.path"] == "/v1/completions"
    )
    assert (
        found["http.response.status_code"] == "200"
        and found["url.scheme"] == "https"
        and found["client.address"] == "10.0.0.1"
    )
    assert (
        found["server.address"] == "::1"
        and found["server.port"] == "8000"
        and found["user_agent.original"] == "openai"
    )
    assert "secret" not in json.dumps(span) and "error.type" not in found


@pytest.mark.parametrize(("host", "port"), [(b"a:65535", "65535"), (b"a:65536", None), (b"a:99999999999999999999", None)])
def test_a_port_that_is_none_spoils_no_message_of_spans(host: bytes, port: str | None) -> None:
    request = Request("GET", "/", b"", b"", {b"host": host}, "10.0.0.1", "http", True, True, 0.0)
    span = frontend_span(FrontendReceipt("r", "", 0.0, ended_s=1.0), span_attributes(request), 10**18, OWN, "", "front")
    assert attributes(span)["server.address"] == "a" and attributes(span).get("server.port") == port


def test_a_processors_span_is_that_of_an_inference() -> None:
    receipt = Receipt(
        "r",
        "",
        "m",
        num_prompt_tokens=7,
        num_completion_tokens=3,
        outcome="ok",
        kind="chat",
        reason="length",
        total_ms=5.0,
    )
    span, *_ = receipt_spans(receipt, 10**18, OWN, "c" * 16)
    assert span["name"] == "chat m" and span["kind"] == 3
    found = attributes(span)
    assert found["gen_ai.operation.name"] == "chat" and found["gen_ai.provider.name"] == "meshserve"
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "m"
    assert found["gen_ai.response.finish_reasons"] == {"values": [{"stringValue": "length"}]}
    assert found["gen_ai.usage.input_tokens"] == "7" and found["gen_ai.usage.output_tokens"] == "3"
    receipt.kind = "completion"
    assert receipt_spans(receipt, 10**18, OWN, "")[0]["name"] == "text_completion m"
    body = export_body([span], {}, "1")["resourceSpans"][0]
    assert body["schemaUrl"] == body["scopeSpans"][0]["schemaUrl"] == SCHEMA_URL


@pytest.mark.parametrize(
    ("error", "is_error"),
    [
        (InvalidRequest, False),
        (Cancelled, False),
        (Overloaded, True),
        (EngineFailed, True),
        (MeshserveError, True),
    ],
)
def test_an_error_of_the_clients_is_named_and_is_no_error_of_the_server(
    error: type[MeshserveError], is_error: bool
) -> None:
    receipt = Receipt("r", "", "m", outcome=error.code, error="words")
    part = FrontendReceipt("r", "", 0.0, outcome=error.code, error="words")
    for span in (
        receipt_spans(receipt, 10**18, OWN, "")[0],
        frontend_span(part, {}, 10**18, OWN, "", "front"),
    ):
        assert attributes(span)["error.type"] == error.code
        assert span.get("status") == ({"code": 2, "message": "words"} if is_error else None)
    assert (
        http_status_of(error.code) == error.http_status
        and http_status_of("of a newer peer") is None
    )


# --- sent


@contextmanager
def a_collector() -> Iterator[tuple[str, list[Post]]]:
    """Serves a collector: its URL, and the list of what was posted, to which each post is added."""
    posts: list[Post] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            posts.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", posts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def body_of(post: Post) -> dict[str, Any]:
    """The one resource of a post, and its spans."""
    found: dict[str, Any] = json.loads(gzip.decompress(post[1]))["resourceSpans"][0]
    return found


def spans_of(posts: list[Post]) -> list[dict[str, Any]]:
    """All spans, in the order in which they came."""
    return [span for post in list(posts) for span in body_of(post)["scopeSpans"][0]["spans"]]


def server_spans(posts: list[Post]) -> list[dict[str, Any]]:
    """The spans of frontends."""
    return [span for span in spans_of(posts) if span["kind"] == 2]


def send_two_requests(url: str) -> None:
    """Send one that is served, and one that is refused."""
    with httpx.Client(base_url=url, timeout=60.0) as client:
        for max_tokens in (2, -1):
            body = {"model": "dummy", "prompt": "hi", "max_tokens": max_tokens}
            client.post("/v1/completions", json=body)


def test_the_environment_alone_sends_spans_with_its_headers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with a_collector() as (url, posts):
        monkeypatch.setenv(f"{BASE}ENDPOINT", url)
        monkeypatch.setenv(f"{BASE}HEADERS", "authorization=Bearer%20hidden")
        monkeypatch.setenv(f"{BASE}COMPRESSION", "gzip")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
        with Process(meshserve_command(*ALL_ROLES, "--mesh", "otlp")) as peer:
            send_two_requests(peer.ready(READY_S)["http"])
            wait_until(lambda: len(server_spans(posts)) == 2, READY_S, "the spans of both requests")
            peer.terminate()
            assert peer.wait() == 0 and "hidden" not in peer.stderr_text
    headers = posts[0][0]
    assert headers["authorization"] == "Bearer hidden" and headers["content-encoding"] == "gzip"
    resource = attributes(body_of(posts[0])["resource"])
    assert resource["service.name"] == "chat" and resource["meshserve.mesh"] == "otlp"
    spans = server_spans(posts)
    statuses = [attributes(span)["http.response.status_code"] for span in spans]
    assert statuses == ["200", "400"] and not any("status" in span for span in spans_of(posts))


def test_certificates_that_cannot_be_used_are_one_line_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(f"{BASE}CERTIFICATE", "/nowhere/ca.pem")
    done = run_command(meshserve_command(*ALL_ROLES, "--otlp", "https://127.0.0.1:9"))
    assert (
        done.exit_code == 1
        and "OTEL_EXPORTER_OTLP_*" in done.stderr
        and "Traceback" not in done.stderr
    )
