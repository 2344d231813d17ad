"""A frontend of a process of its own, and raw bytes to it."""

import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx

from tests.harness import ALL_ROLES, Process, meshserve_command

BODY = {"model": "dummy", "prompt": "hi", "max_tokens": 2}
KEYS = ("--api-key", "secret", "--api-key", "other")
BROWSER = {"accept": "text/html,application/xhtml+xml", "sec-fetch-site": "same-origin"}


class Frontend(NamedTuple):
    """A peer and how to reach it."""

    process: Process
    url: str
    client: httpx.Client

    def raw(self, data: bytes, timeout_s: float = 60.0) -> bytes:
        """Send these bytes and return everything until the other side closes, or is silent."""
        with self.connect(timeout_s) as connection:
            connection.sendall(data)
            parts = []
            while part := connection.recv(65_536):
                parts.append(part)
            return b"".join(parts)

    def connect(self, timeout_s: float = 60.0) -> socket.socket:
        host, port = self.url.rpartition("/")[2].split(":")
        return socket.create_connection((host, int(port)), timeout_s)

    def running(self) -> int:
        """Sequences on the worker."""
        peers = self.client.get("/mesh/peers", headers={"authorization": "Bearer secret"}).json()
        return sum(peer["load"]["num_running"] + peer["load"]["num_waiting"] for peer in peers)


def started(*options: str, headers: dict[str, str] | None = None) -> Iterator[Frontend]:
    with Process(meshserve_command(*ALL_ROLES, *options)) as process:
        url = process.ready()["http"]
        no_pool = httpx.Limits(max_keepalive_connections=0)  # a test leaves no connection to the next
        with httpx.Client(base_url=url, timeout=60.0, headers=headers, limits=no_pool) as client:
            yield Frontend(process, url, client)
        process.terminate()
        assert process.wait() == 0
        assert "Traceback" not in process.stderr_text and "secret" not in process.stderr_text


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def request_head(path: str, *headers: str) -> bytes:
    """The head of a `POST`."""
    return "\r\n".join([f"POST {path} HTTP/1.1", "host: localhost", *headers, "", ""]).encode()
