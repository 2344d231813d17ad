"""The frontend's API keys over real sockets: which requests need a key, how clients show it, the login form, and pages of other sites."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.harness import ALL_ROLES, Process, meshserve_command
from tests.roles.frontends import BODY, BROWSER, KEYS, Frontend, error_of, request_head, started

ORIGIN = "https://chat.example.org"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Frontend]:
    yield from started(*KEYS, "--mesh", "frontend-keys", "--cors-origin", ORIGIN, "--log-level", "debug")


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


# --- the login form


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


# --- pages of other sites


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


# --- where keys come from


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
