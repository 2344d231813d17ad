"""A frontend whose processor dies while hundreds wait for a place: every one of them is told."""

import json
import select
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.harness import Process, meshserve_command, wait_until
from tests.roles.frontends import BODY

MESH = ("--mesh", "frontend-lost", "--interface", "127.0.0.1", "--no-mdns")
NUM_CLIENTS = 300
DATA = json.dumps({**BODY, "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(DATA) + DATA


@contextmanager
def clients(url: str) -> Iterator[dict[int, socket.socket]]:
    """Each has asked and waits; by descriptor."""
    host, port = url.rpartition("/")[2].split(":")
    found = [socket.create_connection((host, int(port)), 10.0) for _ in range(NUM_CLIENTS)]
    try:
        for one in found:
            one.sendall(REQUEST)
        yield {one.fileno(): one for one in found}
    finally:
        for one in found:
            one.close()


def first_words(waiting: dict[int, socket.socket], deadline_s: float) -> list[bytes]:
    """The first of what each client gets, from those that get anything until then."""
    words: list[bytes] = []
    ends_s = time.monotonic() + deadline_s
    poller = select.poll()
    for descriptor in waiting:
        poller.register(descriptor, select.POLLIN)
    while len(words) < len(waiting) and time.monotonic() < ends_s:
        for descriptor, _ in poller.poll(100):
            words.append(waiting[descriptor].recv(12))
            poller.unregister(descriptor)
    return words


def num_waiting(client: httpx.Client) -> int:
    """For a place, at the frontend."""
    return sum(peer["held"].get("waiting_for_admission", 0) for peer in client.get("/mesh/peers").json())


def test_row_14_all_who_wait_for_a_place_are_told_when_the_processor_dies() -> None:
    roles = (
        "run",
        "--role",
        "frontend,router,decode",
        "--http",
        "127.0.0.1:0",
        "--engine-opt",
        "max_batch=2",
        "--engine-opt",
        "step_ms=50",
    )
    with Process(meshserve_command(*roles, *MESH)) as process:
        ready = process.ready()
        peer = ready["address"].removeprefix("tcp://")
        with Process(meshserve_command("run", "--role", "processor", "--peer", peer, *MESH)) as processor:
            processor.ready()
            with httpx.Client(base_url=ready["http"], timeout=60.0) as client:
                wait_until(lambda: client.get("/ready").status_code == 200, 10.0, "the frontend is ready")
                assert client.post("/v1/completions", json=BODY).status_code == 200  # by then it knows how many places there are
                with clients(ready["http"]) as waiting:
                    wait_until(lambda: num_waiting(client) > NUM_CLIENTS * 3 // 4, 10.0, "most of them wait for a place")
                    processor.kill()
                    words = first_words(waiting, 8.0)
            assert len(words) == NUM_CLIENTS
            assert words.count(b"HTTP/1.1 502") + words.count(b"HTTP/1.1 503") > NUM_CLIENTS // 2, Counter(words)
        process.terminate()
        assert process.wait() == 0
        assert "Traceback" not in process.stderr_text
