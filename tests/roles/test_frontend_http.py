"""The frontend over real sockets: what it refuses, whom it lets in, what it ends."""

import json
import re
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness import Process, meshserve_command, run_command, wait_until
from tests.harness.pressure import allowance_s
from tests.roles.frontends import ALL_ROLES, BODY, Frontend, error_of, started

KEYS = ("--api-key", "secret", "--api-key", "other")
ORIGIN = "https://chat.example.org"
LONG = {**BODY, "max_tokens": 20_000, "ignore_eos": True}
BROWSER = {"accept": "text/html,application/xhtml+xml", "sec-fetch-site": "same-origin"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Frontend]:
    yield from started(*KEYS, "--mesh", "frontend-keys", "--cors-origin", ORIGIN, "--log-level", "debug")


@pytest.fixture(scope="module")
def frontend() -> Iterator[Frontend]:
    options = ("--max-body-bytes", "200000", "--engine-opt", "step_ms=5", "--request-timeout", "60")
    yield from started("--mesh", "frontend-open", *options)


# --- keys


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/v1/models/dummy",
        "/mesh/peers",
        "/metrics",
        "/",
        "/nowhere",
        "/health/",
        "/Health",
        "//health",
        "/health/../v1/models",
        "/%2e/v1/models",
        "/v1%2fmodels",
        "/ready%00",
        "/health;/v1/models",
        "/v1/models?/health",
        "/v1/models#/health",
        "/login",
        "/logout",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT"])
def test_no_path_and_no_method_passes_without_a_key(guarded: Frontend, path: str, method: str) -> None:
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    assert guarded.raw(head.encode()).startswith(b"HTTP/1.1 401 "), path


@pytest.mark.parametrize("target", ["/health", "/ready", "/health?x=1", "/%68ealth", "http://localhost/health"])
def test_health_and_ready_need_no_key(guarded: Frontend, target: str) -> None:
    for method in ("GET", "HEAD"):
        head = f"{method} {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        assert guarded.raw(head.encode()).startswith(b"HTTP/1.1 200 "), target


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "Bearer secret"}, 200),
        ({"authorization": "bearer other"}, 200),
        ({"x-api-key": "secret"}, 200),
        ({"api-key": "secret"}, 200),
        ({"api-key": "wrong"}, 401),
        ({"api-key": "secret", "x-api-key": "wrong"}, 401),
        ({"x-api-key": "wrong", "authorization": "Bearer secret"}, 200),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "secret"}, 401),
        ({"authorization": "Basic c2VjcmV0"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"x-api-key": ""}, 401),
        ({"cookie": "meshserve_session=secret"}, 401),
        ({"cookie": "meshserve_session=0.9999999999.ab.cd"}, 401),
    ],
)
def test_each_way_to_show_a_key(guarded: Frontend, headers: dict[str, str], status: int) -> None:
    for _ in range(2):
        response = guarded.client.get("/v1/models", headers=headers)
        assert response.status_code == status
    if status == 401:
        assert error_of(response)["code"] == "invalid_api_key" and response.headers["www-authenticate"] == "Bearer"


def test_who_shows_no_key_is_told_before_the_body_is_taken_in(guarded: Frontend) -> None:
    head = request_head("/v1/completions", "content-length: 100000", "expect: 100-continue", f"origin: {ORIGIN}")
    told = guarded.raw(head)
    assert told.startswith(b"HTTP/1.1 401 ") and b"access-control-allow-origin: " in told and b"www-authenticate: Bearer" in told


def log_in(frontend: Frontend, key: str, **headers: str) -> httpx.Response:
    return frontend.client.post("/login?next=/v1/models", data={"key": key}, headers={**BROWSER, **headers})


def test_a_browser_is_sent_to_the_form_and_back_with_a_cookie_that_is_not_the_key(guarded: Frontend) -> None:
    asked = guarded.client.get("/v1/models?a=b", headers=BROWSER)
    assert asked.status_code == 303 and asked.headers["location"] == "/login?next=/v1/models%3Fa%3Db"
    form = guarded.client.get(asked.headers["location"], headers=BROWSER)
    assert form.status_code == 200 and 'action="/login?next=/v1/models%3Fa%3Db"' in form.text
    assert not re.search(r"(src|href)=|url\(|<script", form.text), "nothing from outside"
    assert "default-src 'none'" in form.headers["content-security-policy"]
    answered = log_in(guarded, "secret")
    assert answered.status_code == 303 and answered.headers["location"] == "/v1/models"
    cookie = answered.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; ")) and "secret" not in cookie and "Secure" not in cookie
    guarded.client.cookies.clear()
    session = {"cookie": cookie.partition(";")[0]}
    assert guarded.client.get("/v1/models", headers=session).status_code == 200
    ended = guarded.client.post("/logout", headers={**session, **BROWSER})
    assert ended.status_code == 303 and "Max-Age=0" in ended.headers["set-cookie"]
    assert guarded.client.get("/v1/models", headers=session).status_code == 401


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nset-cookie: x=y"])
def test_the_form_leads_nowhere_else(guarded: Frontend, target: str) -> None:
    answered = guarded.client.post("/login", params={"next": target}, data={"key": "secret"}, headers=BROWSER)
    assert answered.status_code == 303 and answered.headers["location"] == "/"
    guarded.client.cookies.clear()


def test_a_session_serves_the_fronts_own_pages_only(guarded: Frontend) -> None:
    session = {"cookie": log_in(guarded, "secret").headers["set-cookie"].partition(";")[0]}
    guarded.client.cookies.clear()
    origin = guarded.url
    for extra, status in (
        ({"origin": origin}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": ORIGIN}, 403),
        ({}, 403),
    ):
        response = guarded.client.post("/v1/completions", json=BODY, headers={**session, **extra})
        assert response.status_code == status, extra
    for extra in ({"sec-fetch-site": "cross-site"}, {"origin": "https://evil.example"}):
        assert guarded.client.post("/logout", headers={**session, **BROWSER, **extra}).status_code == 403
        assert log_in(guarded, "secret", **extra).status_code == 403


def test_guessing_keys_in_the_form_is_slow(guarded: Frontend) -> None:
    assert [log_in(guarded, f"guess {number}").status_code for number in range(5)] == [401] * 5
    refused = log_in(guarded, "secret")
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 10
    assert guarded.client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200, "programs are not concerned"


# --- pages of others


def test_cors_answers_those_who_were_named_before_any_key_is_asked_for(guarded: Frontend) -> None:
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = guarded.client.options("/v1/chat/completions", headers={**asking, "origin": ORIGIN})
    assert allowed.status_code == 204 and allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in allowed.headers["access-control-allow-methods"] and allowed.headers["access-control-allow-headers"] == "authorization"
    refused = guarded.client.options("/v1/chat/completions", headers={**asking, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers and refused.headers["vary"] == "Origin"
    with_key = {"authorization": "Bearer secret"}
    for origin, header in ((ORIGIN, ORIGIN), ("https://evil.example", None)):
        response = guarded.client.post("/v1/completions", json=BODY, headers={**with_key, "origin": origin})
        assert response.status_code == 200 and response.headers.get("access-control-allow-origin") == header
        assert response.headers["vary"] == "Origin"
    wrong = guarded.client.get("/v1/models", headers={"origin": ORIGIN})
    assert wrong.status_code == 401 and wrong.headers["access-control-allow-origin"] == ORIGIN, "pages can read why"


def test_without_keys_other_sites_and_their_names_are_turned_away(frontend: Frontend) -> None:
    assert frontend.client.get("/v1/models", headers={"origin": "https://evil.example"}).headers.get("access-control-allow-origin") is None
    by_page = frontend.client.post("/v1/completions", json=BODY, headers={"sec-fetch-site": "cross-site", "origin": "https://evil.example"})
    assert by_page.status_code == 403 and error_of(by_page)["code"] == "forbidden"
    rebound = frontend.client.get("/v1/models", headers={"host": "evil.example:8000"})
    assert rebound.status_code == 403 and "--allow-host evil.example" in error_of(rebound)["message"]
    assert frontend.client.get("/v1/models", headers={"host": "localhost:8000"}).status_code == 200


# --- limits


def request_head(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "host: localhost", *headers, "", ""]).encode()


def status_and_error(data: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), json.loads(body)["error"]


BIG = b"x" * 100_000


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\ncookie: " + BIG + b"\r\n\r\n", 431, "longer than 16384 bytes"),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\ncookie: " + BIG, 431, "longer than 16384 bytes"),
        (b"GET /" + BIG + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 431, "longer than 16384 bytes"),
        (b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431, "more than 128 headers"),
        (request_head("/v1/completions", "content-length: 200001"), 413, "longer than 200000 bytes"),
        (request_head("/v1/completions", f"content-length: {'9' * 18}"), 413, "longer than 200000 bytes"),
        (request_head("/v1/completions", "content-length: 300000") + b"x" * 300_000, 413, "longer than 200000 bytes"),
        (request_head("/v1/completions", "transfer-encoding: chunked") + (b"186a0\r\n" + BIG + b"\r\n") * 3, 413, "200000"),
        (request_head("/v1/completions", "transfer-encoding: chunked") + b"1\r\nx\r\n" * 9000, 400, "chunks are too small"),
        (request_head("/v1/completions", "transfer-encoding: chunked", "content-length: 5") + b"0\r\n\r\n", 400, "not an HTTP request"),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400, "not an HTTP request"),
        (b"GET /a b c HTTP/1.1\r\n\r\n", 400, "not an HTTP request"),
    ],
)
def test_row_23_what_is_too_large_or_no_http_is_refused_in_words_that_arrive(
    frontend: Frontend, data: bytes, status: int, words: str
) -> None:
    found, error = status_and_error(frontend.raw(data))
    assert found == status and words in error["message"]
    assert frontend.client.get("/health").status_code == 200


def test_a_client_that_sends_a_huge_body_whole_before_it_reads_gets_its_413(frontend: Frontend) -> None:
    response = httpx.post(f"{frontend.url}/v1/completions", content=b"x" * 20_000_000, timeout=60.0)
    assert response.status_code == 413
    streamed = httpx.post(f"{frontend.url}/v1/completions", content=iter([b"x" * 100_000] * 100), timeout=60.0)
    assert streamed.status_code == 413


# --- deadlines


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "1e999", "0x10"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused_by_name(frontend: Frontend, value: str) -> None:
    response = frontend.client.post("/v1/completions", json=BODY, headers={"x-request-timeout": value})
    assert response.status_code == 400 and error_of(response)["param"] == "x-request-timeout"


def test_a_deadline_ends_a_request_with_504_and_a_stream_with_an_error_event(frontend: Frontend) -> None:
    began_s = time.monotonic()
    response = frontend.client.post("/v1/completions", json=LONG, headers={"x-request-timeout": "0.5"})
    assert response.status_code == 504 and error_of(response)["code"] == "deadline_exceeded"
    assert 0.5 <= time.monotonic() - began_s < 2.0 + allowance_s(began_s)
    streamed = frontend.client.post("/v1/completions", json={**LONG, "stream": True}, headers={"x-request-timeout": "0.5"})
    events = [line for line in streamed.text.split("\n\n") if line]
    assert "[DONE]" not in streamed.text and json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    wait_until(lambda: frontend.running() == 0, 5.0, "the worker is free again")


# --- cancelling


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("by_label", [False, True])
def test_a_request_is_cancelled_by_its_id_or_its_label(frontend: Frontend, is_streamed: bool, by_label: bool) -> None:
    headers = {"x-request-id": "my-label"} if by_label else {}

    def ask() -> httpx.Response:
        return httpx.post(f"{frontend.url}/v1/completions", json={**LONG, "stream": is_streamed}, headers=headers, timeout=60.0)

    probe = frontend.client.post("/v1/completions", json=BODY).headers["x-request-id"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask)
        wait_until(lambda: frontend.running() == 1, 5.0, "it runs")
        incarnation, _, number = probe.partition("-")
        name = "my-label" if by_label else f"{incarnation}-{int(number) + 1}"
        cancelled = frontend.client.delete(f"/mesh/requests/{name}")
        response = running.result()
    assert cancelled.status_code == 200 and cancelled.json()["cancelled"].startswith(incarnation)
    if is_streamed:
        assert "[DONE]" not in response.text and '"code":"cancelled"' in response.text
    else:
        assert response.status_code == 499 and error_of(response)["code"] == "cancelled"
    wait_until(lambda: frontend.running() == 0, 5.0, "the worker is free again")
    gone = frontend.client.delete(f"/mesh/requests/{name}")
    assert gone.status_code == 404 and error_of(gone)["code"] == "request_not_found"


def test_a_label_that_several_requests_have_names_none_of_them(frontend: Frontend) -> None:
    def ask(_: int) -> int:
        return httpx.post(f"{frontend.url}/v1/completions", json=LONG, headers={"x-request-id": "twin"}, timeout=60.0).status_code

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, number) for number in range(2)]
        wait_until(lambda: frontend.running() == 2, 5.0, "both run")
        refused = frontend.client.delete("/mesh/requests/twin")
        assert refused.status_code == 400
        for request_id in re.findall(r"[0-9a-f]{16}-\d+", error_of(refused)["message"]):
            assert frontend.client.delete(f"/mesh/requests/{request_id}").status_code == 200
        assert [future.result() for future in running] == [499, 499]


@pytest.mark.parametrize("name", ["nobody", "0123456789abcdef-1", "a" * 300, "%00", "a-b-c"])
def test_what_is_not_under_way_cannot_be_cancelled(frontend: Frontend, name: str) -> None:
    assert frontend.client.delete(f"/mesh/requests/{name}").status_code == 404


# --- limits of numbers


def test_connections_are_bounded_in_all_and_by_address() -> None:
    for options, status in ((("--max-connections", "3"), 503), (("--max-connections-per-address", "3"), 429)):
        for frontend in started("--mesh", "frontend-connections", *options):
            held = [frontend.connect() for _ in range(3)]
            told = frontend.raw(b"")
            assert told.startswith(b"HTTP/1.1 %d " % status) and b"retry-after: " in told and b"connections open" in told
            for connection in held:
                connection.close()
            asked = b"GET /health HTTP/1.0\r\n\r\n"
            wait_until(lambda raw=frontend.raw, asked=asked: raw(asked).startswith(b"HTTP/1.1 200"), 5.0, "room again")  # type: ignore[misc]


def test_workers_with_long_queues_refuse_and_the_next_is_asked_until_none_is_left() -> None:
    engine = ("--engine", "tests.harness.engines:ReticentEngine", "--engine-opt", "max_batch=1", "--engine-opt", "step_ms=10")
    common = ("--interface", "127.0.0.1", "--no-mdns", "--mesh", "frontend-queues")
    with Process(meshserve_command("run", "--role", "frontend,processor,router", *common, "--http", "127.0.0.1:0")) as frontend:
        ready = frontend.ready()
        worker = meshserve_command("run", "--role", "decode", *common, "--peer", ready["address"].removeprefix("tcp://"), *engine)
        with Process([*worker, "--max-decode-queue", "3"]), Process([*worker, "--max-decode-queue", "3"]):
            frontend.wait_for_line("^2 decode", 10.0)

            def ask(number: int) -> httpx.Response:
                body = {**BODY, "prompt": f"{number} asks", "max_tokens": 5000, "ignore_eos": True}
                return httpx.post(f"{ready['http']}/v1/completions", json=body, timeout=60.0, headers={"x-request-timeout": "3"})

            with ThreadPoolExecutor(10) as pool:  # none is done before the last one asks
                answers = list(pool.map(ask, range(10)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} == {503, 504}
    assert 2 <= len(refused) <= 4, "each has three waiting, and one running as soon as it has begun"
    assert all(answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert all(error_of(answer)["code"] == "overloaded" and "waiting" in error_of(answer)["message"] for answer in refused)


# --- TLS, and what stops a start


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    made = run_command(["openssl", "req", "-x509", *curve, "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2", *names])
    assert made.exit_code == 0, made.stderr
    return cert, key


def test_https_with_a_certificate_says_so_in_the_ready_line_and_cookies_are_secure(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    for frontend in started(*KEYS, "--mesh", "frontend-tls", "--tls-cert", str(cert), "--tls-key", str(key)):
        assert frontend.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=frontend.url, verify=trusting, headers={"authorization": "Bearer secret"}) as client:
            whole = client.post("/v1/completions", json=BODY)
            assert whole.status_code == 200
            assert client.post("/v1/completions", json={**BODY, "stream": True}).text.endswith("data: [DONE]\n\n")
            page = client.post("/login", data={"key": "secret"}, headers={**BROWSER, "origin": frontend.url})
            assert "; Secure" in page.headers["set-cookie"]


@pytest.mark.full
def test_row_22_a_client_that_does_not_agree_on_tls_is_cut_off(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    for frontend in started("--mesh", "frontend-tls-silent", "--tls-cert", str(cert), "--tls-key", str(key)):
        with frontend.connect(timeout_s=10.0) as silent:
            assert silent.recv(1) == b""


def test_a_start_without_its_files_fails_in_one_line(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    other = tmp_path / "nonsense.pem"
    other.write_text("nonsense\n")
    empty = tmp_path / "keys"
    empty.write_text("\n# none yet\n")
    for options, code, words in (
        (("--tls-cert", str(cert)), 2, "go together"),
        (("--tls-cert", str(cert), "--tls-key", str(tmp_path / "none")), 1, "No such file"),
        (("--tls-cert", str(other), "--tls-key", str(key)), 1, "cannot be used"),
        (("--api-key-file", str(tmp_path / "none")), 1, "No such file"),
        (("--api-key-file", str(empty)), 1, "no key in it"),
        (("--api-key", ""), 2, "--api-key is empty"),
        (("--cors-origin", "chat.example.org/"), 2, "not an origin"),
        (("--request-timeout", "0"), 2, "--request-timeout"),
    ):
        done = run_command(meshserve_command("run", "--role", "frontend", *ALL_ROLES[3:], "--mesh", "frontend-mistakes", *options))
        assert done.exit_code == code and words in done.stderr and "Traceback" not in done.stderr, done


def test_keys_come_from_a_file_too_and_an_open_front_beyond_loopback_says_so(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# who may ask\nfrom-file\n\n  # and\nanother\n")
    for frontend in started("--mesh", "frontend-file", "--api-key-file", str(keys)):
        statuses = [
            frontend.client.get("/v1/models", headers={"x-api-key": key}).status_code
            for key in ("from-file", "another", "", "# who may ask")
        ]
        assert statuses == [200, 200, 401, 401]
    with Process(meshserve_command("run", "--role", "frontend", *ALL_ROLES[3:6], "--mesh", "frontend-wide", "--http", "0.0.0.0:0")) as peer:
        peer.wait_for_line("^meshserve: OPEN HTTP: no --api-key", 10.0)
        peer.terminate()
        assert peer.wait() == 0
