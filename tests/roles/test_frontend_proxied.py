"""A frontend behind proxies, under their paths and names: the rules, and over real sockets."""

import socket
from collections.abc import Iterator

import httpx
import pytest

from meshserve.cli.frontend_options import frontend_config, http_address
from meshserve.errors import UsageError
from meshserve.roles.frontend.access import Origins, is_name_of_loopback
from meshserve.roles.frontend.http.forwarded import TrustedProxies, plain_address, scheme_of
from tests.harness import ALL_ROLES, Process, meshserve_command
from tests.roles.frontends import BODY, Frontend, started

BROWSER = {"accept": "text/html", "sec-fetch-site": "same-origin"}
PROXIED = ("--root-path", "/llm", "--forwarded-allow-ips", "127.0.0.1", "--api-key", "secret")


@pytest.fixture(scope="module")
def proxied() -> Iterator[Frontend]:
    yield from started("--mesh", "frontend-proxied", *PROXIED)


# --- rules


@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "client"),
    [
        ("10.0.0.1", "10.0.0.1", [b"192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", "10.0.0.1", [b"1.1.1.1, 192.0.2.7"], "192.0.2.7"),
        ("10.0.0.0/8", "10.0.0.1", [b"1.1.1.1, 192.0.2.7", b"10.0.0.9"], "192.0.2.7"),
        ("10.0.0.0/8, fd00::/8", "10.0.0.1", [b"192.0.2.7, fd00::5"], "192.0.2.7"),
        ("*", "10.0.0.1", [b"1.1.1.1, 192.0.2.7"], "1.1.1.1"),
        ("10.0.0.1", "10.0.0.1", [b"192.0.2.7:4711"], "192.0.2.7"),
        ("10.0.0.1", "10.0.0.1", [b"[2001:db8::7]:4711"], "2001:db8::7"),
        ("10.0.0.1", "10.0.0.1", [b"2001:db8::7"], "2001:db8::7"),
        ("10.0.0.1", "10.0.0.1", [b"::ffff:192.0.2.7"], "192.0.2.7"),
        ("10.0.0.0/8", "10.0.0.1", [b"192.0.2.7, unknown, 10.0.0.9"], "10.0.0.9"),
        ("10.0.0.1", "10.0.0.1", [b"unknown"], "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1", [b""], "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1", [], "10.0.0.1"),
    ],
)
def test_the_client_is_the_last_one_that_no_trusted_proxy_stands_for(
    proxies: str, peer: str, forwarded: list[bytes], client: str
) -> None:
    trusted = TrustedProxies(proxies)
    assert trusted.trusts(peer) and trusted.client(peer, forwarded) == client


def test_nobody_is_trusted_who_was_not_named() -> None:
    assert not TrustedProxies("").trusts("127.0.0.1") and not TrustedProxies("10.0.0.1").trusts(
        "10.0.0.2"
    )
    assert not TrustedProxies("10.0.0.1").trusts("") and TrustedProxies("::1").trusts("::1")
    with pytest.raises(UsageError, match="'proxy' is neither an address nor a network"):
        TrustedProxies("10.0.0.1,proxy")


@pytest.mark.parametrize(
    ("values", "scheme"),
    [
        ([b"https"], "https"),
        ([b"HTTP"], "http"),
        ([b"https, http"], "http"),
        ([b"gopher"], "http"),
        ([], "http"),
    ],
)
def test_the_scheme_is_the_one_that_the_nearest_proxy_names(
    values: list[bytes], scheme: str
) -> None:
    assert scheme_of(values, "http") == scheme


def test_an_address_of_a_socket_for_both_families_is_the_usual_one() -> None:
    assert [plain_address(text) for text in ("::ffff:10.0.0.1", "10.0.0.1", "::1")] == [
        "10.0.0.1",
        "10.0.0.1",
        "::1",
    ]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("8000", ("127.0.0.1", 8000)),
        (":8000", ("", 8000)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::]:8000", ("::", 8000)),
        ("localhost:80", ("localhost", 80)),
    ],
)
def test_an_address_to_listen_at_is_a_port_with_a_host_or_without(
    text: str, address: tuple[str, int]
) -> None:
    assert http_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "localhost", "localhost:", ":65536", "::", "host:http", "host:²"]
)
def test_what_names_no_port_is_no_address_to_listen_at(text: str) -> None:
    with pytest.raises(UsageError, match="is not HOST:PORT, :PORT or PORT"):
        http_address(text)


def test_all_ports_of_a_host_may_be_named_as_an_origin_and_no_other_pattern() -> None:
    origins = Origins(["http://localhost:*"])
    assert all(
        map(origins.allows, (b"http://localhost", b"http://localhost:3000", b"http://localhost:80"))
    )
    for other in (
        b"https://localhost:3000",
        b"http://localhost.evil.example:3000",
        b"http://localhost:",
        b"http://localhost:x",
        b"null",
    ):
        assert not origins.allows(other)
    settings = {"tls_cert": None, "tls_key": None, "root_path": "", "forwarded_allow_ips": ""}
    assert frontend_config({**settings, "cors_origins": ("http://localhost:*",)}).cors_origins == (
        "http://localhost:*",
    )
    for pattern in ("https://*.example.org", "http://localhost:30*", "*://localhost", "http://*:*"):
        with pytest.raises(UsageError, match="is not an origin"):
            frontend_config({**settings, "cors_origins": (pattern,)})


@pytest.mark.parametrize(
    ("host", "is_fine"),
    [
        (b"llm.example.org:8000", True),
        (b"LLM.example.org:8000", True),
        (b"llm.example.org:8001", False),
        (b"llm.example.org", False),
        (b"any.example.org:1", True),
        (b"any.example.org", True),
    ],
)
def test_a_host_that_was_named_with_a_port_is_let_in_with_that_port(
    host: bytes, is_fine: bool
) -> None:
    assert is_name_of_loopback(host, ("llm.example.org:8000", "any.example.org")) is is_fine


@pytest.mark.parametrize("path", ["llm", "/llm/../x", "/a b", "//x", "/?x", "/"])
def test_a_root_path_that_is_none_is_refused(path: str) -> None:
    settings = {
        "tls_cert": None,
        "tls_key": None,
        "cors_origins": (),
        "forwarded_allow_ips": "",
        "root_path": path,
    }
    if path == "/":
        assert frontend_config(settings).root_path == ""
        return
    with pytest.raises(UsageError, match="is not a path like /llm"):
        frontend_config(settings)


# --- over sockets


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_a_root_path_is_served_with_and_without_and_told_in_every_place(
    proxied: Frontend, prefix: str
) -> None:
    client, key = proxied.client, {"authorization": "Bearer secret"}
    assert client.post(f"{prefix}/v1/completions", json=BODY, headers=key).status_code == 200
    assert client.get(f"{prefix}/health").status_code == 200
    assert client.get(f"{prefix}/v1/models/", headers=key).headers["location"] == "/llm/v1/models"
    assert client.get(f"{prefix}/openapi.json", headers=key).json()["servers"] == [{"url": "/llm"}]
    asked = client.get(f"{prefix}/docs", headers=BROWSER)
    assert (asked.status_code, asked.headers["location"]) == (303, "/llm/login?next=/docs")
    form = client.get(f"{prefix}/login?next=/docs", headers=BROWSER)
    assert 'action="/llm/login?next=/docs"' in form.text
    page = (
        client.get(f"{prefix}/", headers=key).text + client.get(f"{prefix}/docs", headers=key).text
    )
    assert 'src="dashboard/app.js"' in page and 'src="docs/docs.js"' in page and '="/' not in page


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_what_is_refused_before_routing_has_the_shape_of_its_api(
    proxied: Frontend, prefix: str
) -> None:
    told = proxied.client.post(
        f"{prefix}/v1/messages", content=b"x", headers={"content-encoding": "br"}
    )
    assert told.status_code == 415 and told.json()["type"] == "error"


def test_the_path_itself_leads_to_the_page_below_it(proxied: Frontend) -> None:
    found = proxied.client.get("/llm", headers={"authorization": "Bearer secret"})
    assert (found.status_code, found.headers["location"]) == (307, "/llm/")
    assert proxied.client.get("/llmx/health").status_code == 401


@pytest.mark.parametrize(("scheme", "is_secure"), [("https", True), ("http", False)])
def test_a_trusted_proxy_that_ends_tls_has_secure_cookies_and_its_own_origin(
    proxied: Frontend, scheme: str, is_secure: bool
) -> None:
    host = proxied.url.rpartition("/")[2]
    told = {
        **BROWSER,
        "x-forwarded-proto": scheme,
        "x-forwarded-for": "192.0.2.7",
        "origin": f"{scheme}://{host}",
    }
    answered = proxied.client.post("/login?next=/docs", data={"key": "secret"}, headers=told)
    assert (answered.status_code, answered.headers["location"]) == (303, "/llm/docs")
    cookie = answered.headers["set-cookie"]
    assert ("Secure" in cookie.split("; ")) is is_secure and "Path=/llm" in cookie.split("; ")
    session = {**told, "cookie": cookie.partition(";")[0]}
    proxied.client.cookies.clear()
    assert proxied.client.post("/v1/completions", json=BODY, headers=session).status_code == 200
    assert (
        proxied.client.post(
            "/v1/completions", json=BODY, headers={**session, "origin": "http://elsewhere"}
        ).status_code
        == 403
    )


def test_guesses_of_one_client_of_a_proxy_are_not_those_of_another(proxied: Frontend) -> None:
    def guess(client: str) -> int:
        return proxied.client.post(
            "/login", data={"key": "wrong"}, headers={**BROWSER, "x-forwarded-for": client}
        ).status_code

    assert {guess("198.51.100.1") for _ in range(9)} == {401, 429} and guess("198.51.100.2") == 401


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("address", [":0", "[::]:0"])
def test_an_address_of_both_families_is_reached_by_both(address: str) -> None:
    with Process(
        meshserve_command(
            *ALL_ROLES, "--mesh", "frontend-families", "--http", address, "--api-key", "secret"
        )
    ) as process:
        port = process.ready()["http"].rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{host}:{port}/health", timeout=30.0).status_code == 200
        process.terminate()
        assert process.wait() == 0
