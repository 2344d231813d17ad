"""The front under load and under hostile clients, from HTTP to the last worker: every role on a peer of its own."""

import contextlib
import json
import os
import re
import signal
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from meshserve.cli.bench.compare import ratio_of
from meshserve.config import ServeConfig
from tests.harness import Lan, Process, meshserve_command, pace, wait_until
from tests.harness.held import held
from tests.harness.pressure import allowance_s
from tests.harness.records import Event, Record
from tests.lan.meshes import HTTP, READY_S, LanMesh, long_prompts
from tests.lan.test_handoff_faults import all_free, leave_after, num_events, wait_for_event

SLOW_CLOSED_S = 10.0
LOOP_BLOCKED_MS = 10.0
ALONE = ("--interface", "127.0.0.1", "--no-mdns")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where all peers write their record."""
    return tmp_path / "record.jsonl"


def start_apart(lan: Lan, record: Path, *worker: str, num_decode: int = 1, front: tuple[str, ...] = ()) -> LanMesh:
    """Every role a peer of its own, on three hosts; all write one record."""
    hosts, common = [lan.add_host() for _ in range(3)], ("--record", str(record))
    mesh = LanMesh(hosts[0], hosts[0].run("--role", "frontend", *front, *common))
    hosts[1].run("--role", "processor", *common)
    router = hosts[1].run("--role", "router", *common)
    mesh.decode = [hosts[1 + number % 2].run("--role", "decode", *worker, *common) for number in range(num_decode)]
    mesh.prefill = [hosts[2].run("--role", "prefill", *worker, *common)]
    router.wait_for_line(rf"^{num_decode} decode, 1 prefill ready", READY_S)
    wait_until(lambda: all(peer["num_reached"] == 3 + num_decode for peer in mesh.peers()), READY_S, "all peers reach each other")
    wait_until(lambda: mesh.front.get(f"{HTTP}/ready").status == 200, READY_S, "the front is ready")
    return mesh


# --- rows 12 and 13: from HTTP to the last worker


def test_row_12_a_client_that_leaves_is_struck_out_at_every_hop(lan: Lan, path: Path) -> None:
    mesh = start_apart(lan, path, "--engine-opt", "prefill_tokens_per_s=2000")
    prompts = long_prompts(4, repeats=30)
    struck: list[Event] = []
    with ThreadPoolExecutor(1) as pool:
        for is_streamed in (False, True):
            running = pool.submit(mesh.complete, prompts.pop())
            count = len(struck) + 1
            wait_until(lambda count=count: num_events(path, "prefill_begun") == count, READY_S, "one is being prefilled")  # type: ignore[misc]
            closed_at = leave_after(mesh, prompts.pop(), 8, is_streamed, path, "ticket", num_events(path, "ticket"))
            wait_until(lambda count=count: num_events(path, "struck") == count, READY_S, "the other's ticket was struck out")  # type: ignore[misc]
            struck = Record(path).of("struck")
            print(f"struck out {(struck[-1].at_s - closed_at) * 1000:.1f} ms after its client left")
            assert struck[-1].at_s - closed_at <= 0.1 + allowance_s(closed_at, struck[-1].at_s)
            running.result()
    record = Record(path)
    record.check()
    assert not {event.request for event in struck} & {event.request for event in record.of("prefill_begun")}


def test_row_13_a_client_that_leaves_midway_frees_everything_at_every_hop(lan: Lan, path: Path) -> None:
    mesh = start_apart(lan, path, "--engine-opt", "prefill_tokens_per_s=3000", "--engine-opt", "step_ms=20")
    prompts = long_prompts(4, repeats=30)
    for kind in ("prefill_begun", "tokens"):
        for is_streamed in (False, True):
            closed_at = leave_after(mesh, prompts.pop(), 500, is_streamed, path, kind, num_events(path, kind))
            wait_until(lambda: all_free(mesh), READY_S, "all blocks are free")
            took_s = time.monotonic() - closed_at
            print(f"all was free {took_s * 1000:.0f} ms after a client left at an event {kind}, streamed: {is_streamed}")
            assert took_s <= 1.0 + allowance_s(closed_at)
    wait_until(lambda: not held(mesh.peers()), READY_S, "nothing is held anywhere")
    Record(path).check()


def test_row_12_a_client_that_leaves_while_it_waits_at_the_front_never_reaches_the_mesh(lan: Lan, path: Path) -> None:
    mesh = start_apart(lan, path, "--engine-opt", "step_ms=10", "--engine-opt", "max_batch=1")
    body = json.dumps({"model": "dummy", "prompt": "wait", "max_tokens": 50, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(mesh.complete, "first", 100, ignore_eos=True)
        wait_for_event(path, lambda event: event.event == "tokens", "the first runs")
        waiting = [mesh.front.connect("127.0.0.1", 8000) for _ in range(5)]
        for connection in waiting:
            connection.sendall(head + body)
        pace(0.1)  # they wait by now; whether or not, they leave
        for connection in waiting:
            connection.close()
        running.result()
    mesh.complete("after them", 2)
    submits = Record(path).of("submit")
    assert len(submits) == 2, "nobody prefilled or decoded for those who left"
    Record(path).check()


def test_a_request_is_cancelled_by_way_of_any_frontend(lan: Lan, path: Path) -> None:
    mesh = start_apart(lan, path, "--engine-opt", "step_ms=10")
    other = lan.add_host()
    other.run("--role", "frontend").ready()
    wait_until(lambda: all(peer["num_reached"] == 5 for peer in mesh.peers()), READY_S, "all peers reach each other")
    body = {"model": "dummy", "prompt": "long", "max_tokens": 5000, "ignore_eos": True}
    for name in ("by its id", "by-its-label"):
        headers = {"x-request-id": name} if name == "by-its-label" else {}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(mesh.front.http, "POST", f"{HTTP}/v1/completions", body, headers)
            seen = len(Record(path).of("submit")) if path.exists() else 0
            submit = wait_until(lambda seen=seen: Record(path).of("submit")[seen:], READY_S, "it was submitted")[0]  # type: ignore[misc]
            wanted = name if headers else submit.request
            cancelled_at = time.monotonic()
            answer = other.http("DELETE", f"{HTTP}/mesh/requests/{wanted}")
            assert (answer.status, answer.json()) == (200, {"cancelled": submit.request})
            assert running.result().status == 499
        wait_until(lambda: all_free(mesh), READY_S, "the worker is free")
        assert time.monotonic() - cancelled_at <= 1.0 + allowance_s(cancelled_at)
    assert other.http("DELETE", f"{HTTP}/mesh/requests/by-its-label").status == 404
    Record(path).check()


# --- rows 22 and 23, on loopback


class Apart(NamedTuple):
    """A frontend alone in its process, and one with the other roles."""

    front: Process
    others: Process
    port: int


@pytest.fixture
def apart() -> Iterator[Apart]:
    options = (*ALONE, "--mesh", "front-faults")
    with Process(meshserve_command("run", "--role", "processor,router,decode,prefill", *options, "--engine-opt", "step_ms=1")) as others:
        seed = others.ready()["address"].removeprefix("tcp://")
        run = meshserve_command("run", "--role", "frontend", *options, "--peer", seed, "--http", "127.0.0.1:0")
        with Process(run) as front:
            port = int(front.ready()["http"].rpartition(":")[2])
            wait_until(lambda: ask(port, b"GET /ready").startswith(b"HTTP/1.1 200"), READY_S, "the front is ready")
            yield Apart(front, others, port)
            for process in (front, others):
                process.terminate()
                assert process.wait() == 0 and "Traceback" not in process.stderr_text


def ask(port: int, line: bytes, body: bytes = b"", timeout_s: float = 20.0) -> bytes:
    """One request on a connection of its own; its response."""
    with socket.create_connection(("127.0.0.1", port), timeout_s) as connection:
        head = line + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        parts = []
        while part := connection.recv(65_536):
            parts.append(part)
        return b"".join(parts)


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "dummy", "prompt": "hi", "max_tokens": 4, "ignore_eos": True, **fields}).encode()


STREAM = completion(max_tokens=60_000, stream=True)
SLOW = {
    "half a header": b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-half: ",
    "half a body": b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{",
    "half a chunk": b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n100\r\n{",
    "nothing": b"",
    "no reading": b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(STREAM) + STREAM,
}


class SlowClients:
    """So many, in equal parts of each kind; those that never read are few, as each has a worker generate for it."""

    def __init__(self, port: int, count: int, num_unread: int) -> None:
        kinds = [kind for kind in SLOW if kind != "no reading"]
        self.kinds = ["no reading"] * num_unread + [kinds[number % len(kinds)] for number in range(count - num_unread)]
        self.connections = [self._connect(port, kind) for kind in self.kinds]
        self.opened_at = time.monotonic()

    @staticmethod
    def _connect(port: int, kind: str) -> socket.socket:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60.0)
        connection.connect(("127.0.0.1", port))
        connection.sendall(SLOW[kind])
        return connection

    def drain(self) -> Iterator[tuple[str, bytes]]:
        """What each was told in the end; those that read nothing do not begin to."""
        for kind, connection in zip(self.kinds, self.connections, strict=True):
            if kind != "no reading":
                told = b""
                with contextlib.suppress(ConnectionResetError):
                    while part := connection.recv(65_536):
                        told += part
                yield kind, told

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


def num_connections(process: Process) -> int:
    """TCP connections that a process has open on its side, whatever their state; its listening socket is not one."""
    inodes = set()
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(link.readlink().name)
    lines = Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]
    return sum(f"socket:[{line.split()[9]}]" in inodes and line.split()[3] != "0A" for line in lines)


def running(port: int) -> int:
    """Sequences on the worker."""
    peers = json.loads(ask(port, b"GET /mesh/peers").partition(b"\r\n\r\n")[2])
    return sum((peer["load"] or {}).get("num_running", 0) for peer in peers)


def test_row_22_five_hundred_slow_clients_are_closed_by_deadline_and_hold_no_worker(apart: Apart) -> None:
    before = num_connections(apart.front)
    clients = SlowClients(apart.port, 500, num_unread=20)
    try:
        wait_until(lambda: running(apart.port) >= 10, READY_S, "those who do not read are served")
        began_at = time.monotonic()
        served = ask(apart.port, b"POST /v1/completions", completion())
        assert served.startswith(b"HTTP/1.1 200") and time.monotonic() - began_at < 1.0 + allowance_s(began_at), "others are served"
        told = list(clients.drain())
        wait_until(lambda: num_connections(apart.front) <= before, 15.0, "all connections are gone")
        took_s = time.monotonic() - clients.opened_at
        print(f"500 slow clients were gone after {took_s:.1f} s")
        assert took_s <= SLOW_CLOSED_S + allowance_s(clients.opened_at)
        for kind, text in told:
            assert text == b"" if kind == "nothing" else text.startswith(b"HTTP/1.1 408 "), kind
        wait_until(lambda: running(apart.port) == 0, 5.0, "no worker works for them")
    finally:
        clients.close()


@pytest.mark.full
@pytest.mark.timeout(600)
def test_row_22_slow_clients_cost_others_a_fifth_of_their_p99_at_most(apart: Apart) -> None:
    def p99_s() -> float:
        """Of requests one after the other, for as long as slow clients come, wait, are refused and are gone."""
        taken, until_s = [], time.perf_counter() + 8.0
        while time.perf_counter() < until_s:
            began_s = time.perf_counter()
            assert ask(apart.port, b"POST /v1/completions", completion()).startswith(b"HTTP/1.1 200")
            taken.append(time.perf_counter() - began_s)
        return statistics.quantiles(taken, n=100)[98]

    beside, alone = [], []
    for _ in range(12):
        clients = SlowClients(apart.port, 500, num_unread=0)
        beside.append(p99_s())
        clients.close()
        wait_until(lambda: num_connections(apart.front) < 50, 15.0, "they are gone")
        alone.append(p99_s())
    ratio = ratio_of(beside, alone)
    print(f"p99 beside 500 slow clients against alone: {ratio}")
    assert ratio.low <= 1.2


def worst_ms(front: Process) -> tuple[float, str]:
    """The CPU time of the most expensive callback since the last question, and which it was."""
    asked_at = time.monotonic()
    os.kill(front.pid, signal.SIGUSR1)
    match = front.wait_for_line(r"^worst ([0-9.]+) (.*)$", READY_S, asked_at)
    return float(match[1]), match[2]


def with_prompt(prompt: bytes, more: bytes = b"") -> bytes:
    return b'{"model":"dummy","prompt":' + prompt + more + b"}"


MOST_BYTES = ServeConfig().max_body_bytes - 200
HOSTILE = {
    "a huge header": (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"x" * 200_000 + b"\r\n\r\n", b"", 431, "longer than"),
    "65,000 headers": (b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"a:\r\n" * 65_000 + b"\r\n", b"", 431, "headers"),
    "13,000 requests at once": (b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 13_000, b"", 0, ""),
    "chunks of one byte": (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 43_000,
        b"",
        400,
        "chunks",
    ),
    "a huge body": (b"", b"x" * (MOST_BYTES + 300), 413, "longer than"),
    "huge n": (b"", with_prompt(b'"hi"', b',"n":1000000000000'), 400, "n"),
    "huge max_tokens": (b"", with_prompt(b'"hi"', b',"max_tokens":1' + b"0" * 300), 400, "max_tokens"),
    "a number of 2 MB": (b"", with_prompt(b'"hi"', b',"seed":' + b"9" * (MOST_BYTES - 200)), 400, "digits"),
    "deep JSON": (b"", b"[" * MOST_BYTES, 400, "nested"),
    "deep objects": (b"", b'{"a":' * 300_000, 400, "nested"),
    "deep enough to break a parser, and small": (b"", with_prompt(b"[" * 20_000 + b"]" * 20_000), 400, "nested"),
    "half a million lists": (b"", with_prompt(b"[" + b"[]," * 600_000 + b"[]]"), 400, "too many values"),
    "180,000 names": (b"", b"{" + b",".join(b'"%x":1' % number for number in range(180_000)) + b"}", 400, "too many values"),
    "a million tokens": (b"", with_prompt(b"[" + b"1," * 900_000 + b"1]"), 400, "too many values"),
    "as many tokens as a context has": (b"", with_prompt(b"[" + b"99," * 131_072 + b"99]"), 400, "context"),
    "escaped text": (b"", with_prompt(b'"' + b"\\n" * (MOST_BYTES // 2 - 100) + b'"'), 400, "context"),
    "text of two bytes a letter": (b"", with_prompt(b'"' + "é".encode() * (MOST_BYTES // 2 - 100) + b'"'), 400, "context"),
    "blank space": (b"", b" " * MOST_BYTES, 400, "not JSON"),
    "half a string": (b"", b'{"a":"' + b"\\\\" * (MOST_BYTES // 2 - 10), 400, "not JSON"),
    "a long model": (b"", b'{"model":"%s","prompt":"hi"}' % (b"m" * 100_000), 404, ""),
}


def test_row_23_nothing_that_a_client_sends_holds_the_loop_up(apart: Apart) -> None:
    seed = apart.others.ready()["address"].removeprefix("tcp://")
    with Process([sys.executable, "-m", "tests.harness.measured", "front-faults", seed]) as front:
        port = int(front.ready()["http"].rpartition(":")[2])
        wait_until(lambda: ask(port, b"GET /ready").startswith(b"HTTP/1.1 200"), READY_S, "the front is ready")
        assert ask(port, b"POST /v1/completions", completion()).startswith(b"HTTP/1.1 200")
        worst_ms(front)
        for name, (data, body, status, words) in HOSTILE.items():
            told = send_hostile(port, data, body)
            took_ms, callback = worst_ms(front)
            print(f"{name}: {told[9:12].decode()}, {took_ms:.2f} ms")
            if status:
                error = json.loads(told.partition(b"\r\n\r\n")[2])["error"]
                assert told.startswith(b"HTTP/1.1 %d " % status) and words in error["message"], (name, told[:300])
            assert took_ms <= LOOP_BLOCKED_MS, (name, took_ms, callback)
        assert ask(port, b"POST /v1/completions", completion()).startswith(b"HTTP/1.1 200")
        front.terminate()
        assert front.wait() == 0 and "Traceback" not in front.stderr_text


def send_hostile(port: int, data: bytes, body: bytes) -> bytes:
    """What comes back; nothing if the connection was cut."""
    head = data or b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
    told = b""
    with socket.create_connection(("127.0.0.1", port), 20.0) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head + body)
        with contextlib.suppress(ConnectionError):
            while not is_whole(told) and (part := connection.recv(65_536)):
                told += part
    return told


def is_whole(told: bytes) -> bool:
    """A response has come to its end."""
    head, separator, body = told.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return bool(separator) and length is not None and len(body) >= int(length[1])
