"""The frontend over real sockets: pages of other sites, limits, deadlines, cancelled requests, and TLS."""

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

from tests.harness import ALL_ROLES, Process, meshserve_command, run_command, wait_until
from tests.harness.pressure import allowance_s
from tests.roles.frontends import BODY, BROWSER, KEYS, Frontend, error_of, request_head, started

LONG = {**BODY, "max_tokens": 20_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def frontend() -> Iterator[Frontend]:
    options = ("--max-body-bytes", "200000", "--engine-opt", "step_ms=5", "--request-timeout", "60")
    yield from started("--mesh", "frontend-open", *options)


# --- pages of other sites


def test_without_keys_other_sites_and_their_names_are_turned_away(frontend: Frontend) -> None:
    assert frontend.client.get("/v1/models", headers={"origin": "https://evil.example"}).headers.get("access-control-allow-origin") is None
    by_page = frontend.client.post("/v1/completions", json=BODY, headers={"sec-fetch-site": "cross-site", "origin": "https://evil.example"})
    assert by_page.status_code == 403 and error_of(by_page)["code"] == "forbidden"
    rebound = frontend.client.get("/v1/models", headers={"host": "evil.example:8000"})
    assert rebound.status_code == 403 and "--allow-host evil.example" in error_of(rebound)["message"]
    assert frontend.client.get("/v1/models", headers={"host": "localhost:8000"}).status_code == 200


# --- limits


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
