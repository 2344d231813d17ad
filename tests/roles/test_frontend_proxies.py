"""Streams that take long to begin, through the proxies and clients that cut what looks dead."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.harness import run_command, wait_until
from tests.harness.browser import Page, page_or_skip
from tests.harness.proxies import PROXIES, is_installed, proxy_before
from tests.roles.frontends import Frontend, started

needs_all = pytest.mark.skipif(
    not all(map(is_installed, (*PROXIES, "java", "curl"))),
    reason="nginx, caddy, haproxy, java or curl is missing: Debian has them all",
)

PREFILL_S, TOKENS_PER_S = 90, 50
READ_TIMEOUT_S = 10
_ASK = """import java.net.URI;
import java.net.http.*;
import java.time.Duration;
class Ask {
  public static void main(String[] given) throws Exception {
    var body = HttpRequest.BodyPublishers.ofString(given[1]);
    var request = HttpRequest.newBuilder(URI.create(given[0])).POST(body);
    if (given.length > 2) request.timeout(Duration.ofSeconds(Integer.parseInt(given[2])));
    var client = HttpClient.newHttpClient();
    System.out.print(client.send(request.build(), HttpResponse.BodyHandlers.ofString()).body());
  }
}
"""
Client = Callable[[], str]


@pytest.fixture(scope="module")
def quick() -> Iterator[Frontend]:
    yield from started(
        "--mesh",
        "frontend-proxies",
        "--root-path",
        "/llm",
        "--forwarded-allow-ips",
        "127.0.0.1",
        "--api-key",
        "secret",
    )


@pytest.fixture(scope="module")
def below() -> Iterator[Frontend]:
    yield from started("--mesh", "frontend-below", "--root-path", "/llm")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    yield from page_or_skip()


def through(socket: Path, timeout_s: float | None = None) -> httpx.Client:
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=str(socket)),
        base_url="http://localhost",
        timeout=timeout_s,
    )


@pytest.mark.parametrize("proxy", PROXIES)
def test_row_47_each_proxy_passes_streams_whole_answers_and_redirects_on(
    quick: Frontend, proxy: str, tmp_path: Path
) -> None:
    if not is_installed(proxy):
        pytest.skip(f"no {proxy}: Debian's package of that name")
    with (
        proxy_before(quick.url.rpartition("/")[2], proxy, tmp_path / proxy) as socket,
        through(socket, 60.0) as client,
    ):
        client.headers["authorization"] = "Bearer secret"
        body = {"model": "dummy", "prompt": "hi", "max_tokens": 3}
        whole = client.post("/llm/v1/completions", json=body)
        streamed = client.post("/llm/v1/completions", json={**body, "stream": True})
        assert whole.status_code == streamed.status_code == 200 and streamed.text.endswith(
            "data: [DONE]\n\n"
        )
        texts = [
            json.loads(line[6:])["choices"][0]["text"] for line in streamed.text.split("\n\n")[:-2]
        ]
        assert "".join(texts) == whole.json()["choices"][0]["text"]
        moved = client.get("/llm/v1/models/")
        assert (moved.status_code, moved.headers["location"]) == (307, "/llm/v1/models")
        page = client.get("/llm/")
        assert page.status_code == 200 and client.get("/llm/dashboard/app.js").status_code == 200
        assert client.get("/llm/openapi.json").json()["servers"] == [{"url": "/llm"}]


def test_dashboard_and_document_are_whole_below_a_path(below: Frontend, page: Page) -> None:
    page.open(f"{below.url}/llm/")
    page.wait_for("document.querySelectorAll('#peers li').length === 1", 20.0)
    page.open(f"{below.url}/llm/docs")
    page.wait_for("document.querySelectorAll('.operation').length > 10", 20.0)
    assert page.errors == []
    assert all(
        address.startswith((f"{below.url}/llm/", "about:blank")) for address in page.addresses
    ), page.addresses


def clients_of(
    url: str, body: bytes, folder: Path, timeout_s: int | None, stack: ExitStack
) -> dict[str, Client]:
    """What asks, by name: each returns the whole answer."""
    (folder / "Ask.java").write_text(_ASK)
    (folder / "body").write_bytes(body)
    path = f"{url}/v1/completions"
    java = [
        shutil.which("java") or "",
        str(folder / "Ask.java"),
        path,
        body.decode(),
        *([] if timeout_s is None else [str(timeout_s)]),
    ]
    curl = [
        shutil.which("curl") or "",
        "-sS",
        "--http2",
        "--data-binary",
        f"@{folder / 'body'}",
        path,
    ]
    if timeout_s is not None:
        curl += ["--speed-limit", "1", "--speed-time", str(timeout_s)]

    def command(arguments: list[str]) -> Client:
        return lambda: run_command(arguments, deadline_s=400.0).stdout

    def asked(client: httpx.Client) -> Client:
        return lambda: client.post("/v1/completions", content=body).text

    found = {"java": command(java), "curl": command(curl)}
    found["httpx"] = asked(stack.enter_context(httpx.Client(base_url=url, timeout=timeout_s)))
    for proxy in PROXIES:
        socket = stack.enter_context(
            proxy_before(url.rpartition("/")[2], proxy, folder / proxy, timeout_s)
        )
        found[proxy] = asked(stack.enter_context(through(socket)))
    return found


@pytest.fixture
def slow() -> Iterator[Frontend]:
    yield from started(
        "--mesh", "frontend-slow", "--engine-opt", f"prefill_tokens_per_s={TOKENS_PER_S}"
    )


@needs_all
@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "timeout_s", [None, READ_TIMEOUT_S], ids=["their own timeouts", "read timeouts of 10 s"]
)
def test_row_47_no_stream_is_cut_by_any_proxy_or_client_during_a_prefill_of_90_s(
    slow: Frontend, timeout_s: int | None, tmp_path: Path
) -> None:
    body = {"model": "dummy", "prompt": "hi", "max_tokens": 3, "stream": True}
    # one step of the engine, for whose end all others wait
    long = {**body, "prompt": "x" * PREFILL_S * TOKENS_PER_S}
    with ExitStack() as stack:
        clients = clients_of(slow.url, json.dumps(body).encode(), tmp_path, timeout_s, stack)
        pool = stack.enter_context(ThreadPoolExecutor(1 + len(clients)))
        first = pool.submit(
            lambda: slow.client.post("/v1/completions", json=long, timeout=timeout_s).text
        )
        wait_until(lambda: slow.running() == 1, 20.0, "the long prompt is being computed")
        answers = dict(
            zip(clients, pool.map(lambda client: client(), clients.values()), strict=True)
        )
        answers["first"] = first.result()
    for name, answer in answers.items():
        assert answer.rstrip().endswith("data: [DONE]"), f"{name}: {answer[-300:]}"
        assert answer.count(": ping\n\n") >= PREFILL_S // 10, (
            f"{name} was not shown that its stream lives"
        )
