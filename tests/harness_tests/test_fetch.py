"""HTTP from inside a host."""

import asyncio
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.harness import Host, Lan, Process, run_async

SERVER = """
import http.server, threading
pause = threading.Event()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def do_GET(self):
        if self.path == "/lines": return self.lines()
        self.answer(404 if self.path == "/missing" else 200, self.path.encode())
    def do_POST(self):
        self.answer(200, self.rfile.read(int(self.headers["content-length"])))
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-From", self.client_address[0])
        try:
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client had enough
            self.close_connection = True
    def lines(self):
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for n in range(1000):
                self.wfile.write(b"line %d\\n" % n)
                pause.wait(0.02)
        except OSError:
            print("hung up", flush=True)
        self.close_connection = True
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 100
server = Server(("", 8000), Handler)
print("up", flush=True)
server.serve_forever()
"""

pytestmark = pytest.mark.lan


@pytest.fixture
def client(lan: Lan) -> Host:
    return lan.add_host("client")


@pytest.fixture
def server(lan: Lan) -> Iterator[Process]:
    with lan.add_host("server").start(sys.executable, "-c", SERVER) as process:
        process.wait_for_line("^up$", 5.0)
        yield process


@pytest.fixture
def url(client: Host, server: Process, lan: Lan) -> str:
    return f"http://{lan.hosts[1].address}:8000"


def test_requests_come_from_the_host_and_bring_the_whole_response(client: Host, url: str) -> None:
    response = client.get(f"{url}/a?b=c")
    assert (response.status, response.body, response.headers["x-from"]) == (200, b"/a?b=c", client.address)
    assert client.get(f"{url}/missing").status == 404
    assert client.post_json(url, {"prompt": "hi"}).json() == {"prompt": "hi"}


def test_a_stream_gives_lines_as_they_come_and_hangs_up_when_left(client: Host, server: Process, url: str) -> None:
    with client.stream("GET", f"{url}/lines") as lines:
        assert [next(lines), next(lines)] == ["line 0", "line 1"]
    server.wait_for_line("hung up", 2.0)


def test_a_server_that_does_not_answer_is_given_up(client: Host, server: Process, url: str) -> None:
    server.stop()
    with pytest.raises(TimeoutError):
        client.get(url, timeout_s=0.1)


def test_many_requests_at_once(client: Host, url: str) -> None:
    async def ask() -> list[httpx.Response]:
        async with client.async_client() as http:
            return await asyncio.gather(*(http.post(url, json=number) for number in range(50)))

    responses = run_async(ask())
    assert [response.json() for response in responses] == list(range(50))
    assert {response.headers["x-from"] for response in responses} == {client.address}


def test_an_asynchronous_stream_can_be_left(client: Host, server: Process, url: str) -> None:
    async def ask() -> list[str]:
        async with client.async_client() as http, http.stream("GET", f"{url}/lines") as response:
            lines = response.aiter_lines()
            return [await anext(lines), await anext(lines)]

    assert run_async(ask()) == ["line 0", "line 1"]
    server.wait_for_line("hung up", 2.0)


def test_asynchronous_failures_are_httpx_errors(client: Host, server: Process, url: str) -> None:
    async def ask() -> None:
        async with client.async_client(timeout_s=0.1) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get(url.replace("8000", "8001"))
            assert (await http.get(url)).status_code == 200
            server.stop()
            with pytest.raises(httpx.ReadTimeout):
                await http.get(url)
            server.resume()

    start = time.monotonic()
    run_async(ask())
    assert time.monotonic() - start < 5.0


def test_a_connection_that_the_server_has_closed_is_not_used_again(client: Host, server: Process, url: str) -> None:
    async def ask() -> None:
        async with client.async_client() as http:
            await http.get(url)
            server.kill()
            server.wait(2.0)
            with pytest.raises(httpx.ConnectError):
                await http.get(url)

    run_async(ask())
