"""Streams whose processor is lost after a part of them has left: another processor goes on, and a
client sees a pause and nothing else."""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.harness import Process, meshserve_command, wait_until
from tests.harness.held import held

MESH = (
    "--mesh",
    "frontend-replays",
    "--interface",
    "127.0.0.1",
    "--no-mdns",
    "--failure-timeout",
    "1",
)
READY_S = 30.0
LONG = "It is worth saying at some length. " * 3
CHAT = [{"role": "user", "content": "Say something."}]
FIELDS = [f"field{number}" for number in range(6)]
SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in FIELDS},
    "required": FIELDS,
}
FUNCTION = {"name": "note", "parameters": SCHEMA}
ENDLESS = {"ignore_eos": True, "max_tokens": 200}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": LONG, **ENDLESS}),
    "completion with an echo": ("/v1/completions", {"prompt": LONG, "echo": True, **ENDLESS}),
    "completion with log probabilities": (
        "/v1/completions",
        {"prompt": LONG, "logprobs": 2, "temperature": 0.8, **ENDLESS},
    ),
    "completion with log probabilities of its prompt": (
        "/v1/completions",
        {"prompt": LONG, "logprobs": 1, "echo": True, **ENDLESS},
    ),
    "completion with several answers": (
        "/v1/completions",
        {"prompt": LONG, "n": 3, "echo": True, "temperature": 1.1, **ENDLESS},
    ),
    "completion of several prompts": (
        "/v1/completions",
        {"prompt": ["one", "two"], "temperature": 1.1, **ENDLESS},
    ),
    "completion with stop strings": (
        "/v1/completions",
        {"prompt": LONG, "stop": ["never said", "nor this"], **ENDLESS},
    ),
    "completion with penalties": (
        "/v1/completions",
        {"prompt": LONG, "frequency_penalty": 0.7, "temperature": 0.9, **ENDLESS},
    ),
    "completion by an expression": (
        "/v1/completions",
        {"prompt": LONG, "structured_outputs": {"regex": "([a-z]{4,8} ){60}"}, "max_tokens": 200},
    ),
    "chat": (
        "/v1/chat/completions",
        {
            "messages": CHAT,
            "temperature": 0.8,
            "stream_options": {"include_usage": True},
            **ENDLESS,
        },
    ),
    "chat with log probabilities": (
        "/v1/chat/completions",
        {"messages": CHAT, "logprobs": True, "top_logprobs": 2, **ENDLESS},
    ),
    "chat by a schema": (
        "/v1/chat/completions",
        {
            "messages": CHAT,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            },
            "max_tokens": 400,
        },
    ),
    "chat with a call": (
        "/v1/chat/completions",
        {
            "messages": CHAT,
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": "required",
            "max_tokens": 400,
        },
    ),
    "response": (
        "/v1/responses",
        {
            "input": "Say something.",
            "temperature": 0.9,
            "ignore_eos": True,
            "max_output_tokens": 200,
        },
    ),
    "message": ("/v1/messages", {"messages": CHAT, "ignore_eos": True, "max_tokens": 200}),
    "message with a use of a tool": (
        "/v1/messages",
        {
            "messages": CHAT,
            "tools": [{"name": "note", "input_schema": SCHEMA}],
            "tool_choice": {"type": "any"},
            "max_tokens": 400,
        },
    ),
    "generate": ("/generate", {"prompt": LONG, **ENDLESS}),
}
A_FEW = (
    "completion with several answers",
    "chat with log probabilities",
    "response",
    "message with a use of a tool",
)
MADE_UP = frozenset(
    ("id", "item_id", "call_id", "request_id", "created", "created_at", "usage", "meshserve")
)
"""Names of what differs between any two answers."""


def compared(data: Any) -> Any:
    """An event without what is made up for each answer."""
    if isinstance(data, dict):
        return {name: compared(value) for name, value in data.items() if name not in MADE_UP}
    return [compared(value) for value in data] if isinstance(data, list) else data


@dataclass
class Stream:
    """One streamed answer, as its client reads it."""

    url: str
    path: str
    body: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    request_id: str = ""
    ids: set[str] = field(default_factory=set)
    """Of the whole response, as its events have them."""

    def run(self) -> "Stream":
        """Read it to its end."""
        body = {"model": "dummy", "stream": True, "meshserve": {"receipt": True}, **self.body}
        if self.path == "/generate":
            del body["stream"], body["model"]
        with httpx.stream("POST", f"{self.url}{self.path}", json=body, timeout=60.0) as received:
            self.request_id = received.headers["x-request-id"]
            for line in received.iter_lines():
                if line:
                    self.lines.append(line)
        return self

    @property
    def events(self) -> list[Any]:
        """In order, but for that of several answers among each other, which is left open."""
        data = [
            line.removeprefix("data: ")
            for line in self.lines
            if not line.startswith(("event: ", ":"))  # a comment shows that a slow one lives
        ]
        found = [json.loads(text) if text != "[DONE]" else {"done": True} for text in data]
        self.ids = {str(event["id"]) for event in found if "id" in event}
        return sorted(
            map(compared, found),
            key=lambda event: (event.get("choices") or [{"index": -1}])[0].get("index", -1),
        )


@dataclass
class Front:
    """A frontend with a worker, and two processors that can be started again."""

    url: str
    peer: str
    exits: ExitStack
    processors: list[Process] = field(default_factory=list)

    def start(self) -> Process:
        """One more processor."""
        command = meshserve_command(
            "run", "--role", "processor", "--peer", self.peer, "--drain-timeout", "0.5", *MESH
        )
        process = self.exits.enter_context(Process(command))
        process.ready(READY_S)
        return process

    def peers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/mesh/peers", timeout=60.0).json()
        return found

    def is_whole(self) -> bool:
        """All know each other."""
        peers = self.peers()
        return len(peers) == 3 and all(peer["num_reached"] == 2 for peer in peers)

    def streams(self, kinds: Iterable[str] = A_FEW) -> dict[str, Stream]:
        """One of each kind."""
        asked = {kind: KINDS[kind] for kind in kinds}
        return {
            kind: Stream(self.url, path, {**body, "seed": 5} if "temperature" in body else body)
            for kind, (path, body) in asked.items()
        }

    def receipt(self, stream: Stream) -> dict[str, Any]:
        """By the name that the client knows."""
        found: dict[str, Any] = httpx.get(
            f"{self.url}/mesh/requests/{stream.request_id}", timeout=60.0
        ).json()
        return found

    def state(self, process: Process) -> str:
        """As the frontend has it."""
        name = process.ready(READY_S)["name"]
        return next((str(peer["state"]) for peer in self.peers() if peer["name"] == name), "gone")


def read_all(streams: list[Stream], fault: Callable[[], None] | None = None) -> None:
    """Read them to their ends; once all have begun, something happens."""
    with ThreadPoolExecutor(len(streams)) as pool:
        running: list[Future[Stream]] = [pool.submit(stream.run) for stream in streams]
        if fault is not None:
            wait_until(
                lambda: all(len(stream.lines) > 3 for stream in streams),
                READY_S,
                "all streams have begun",
            )
            fault()
        for stream in running:
            stream.result()


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    options = ("--http", "127.0.0.1:0", "--engine-opt", "step_ms=15", "--drain-timeout", "5")
    with ExitStack() as exits:
        process = exits.enter_context(
            Process(meshserve_command("run", "--role", "frontend,router,decode", *options, *MESH))
        )
        ready = process.ready(READY_S)
        found = Front(ready["http"], ready["address"].removeprefix("tcp://"), exits)
        found.processors = [found.start(), found.start()]
        wait_until(found.is_whole, READY_S, "all know each other")
        yield found
        assert "Traceback" not in process.stderr_text


def read_while_lost(front: Front, streams: list[Stream], fault: Callable[[Process], None]) -> None:
    """Read streams that all are at one processor, which is lost once they have begun; then there is
    another one."""
    had, other = front.processors
    other.stop()
    wait_until(lambda: front.state(other) == "suspect", READY_S, "the other one gets no work")

    def lose() -> None:
        other.resume()  # it is heard of again while the streams wait for a processor
        fault(had)

    read_all(streams, lose)


@pytest.fixture(scope="module")
def undisturbed(front: Front) -> dict[str, list[Any]]:
    """What is said while nothing is lost."""
    streams = front.streams(KINDS)
    read_all(list(streams.values()))
    return {kind: stream.events for kind, stream in streams.items()}


def with_two(front: Front) -> None:
    """Two processors again. (Those that a test itself started would be left behind by it.)"""
    front.processors = [found for found in front.processors if found.exit_code is None]
    front.processors += [front.start() for _ in range(2 - len(front.processors))]
    wait_until(front.is_whole, READY_S, "all know each other")


@pytest.fixture(scope="module")
def killed(front: Front, undisturbed: dict[str, list[Any]]) -> dict[str, Stream]:
    """Streams whose processor was killed."""
    streams = front.streams(KINDS)
    read_while_lost(front, list(streams.values()), Process.kill)
    with_two(front)
    return streams


@pytest.fixture(scope="module")
def drained(front: Front, undisturbed: dict[str, list[Any]]) -> dict[str, Stream]:
    """Streams whose processor was told to stop, and did so before their end."""
    streams = front.streams()
    read_while_lost(front, list(streams.values()), Process.terminate)
    front.processors[0].wait()
    with_two(front)
    return streams


@pytest.fixture(scope="module")
def restarted(front: Front, undisturbed: dict[str, list[Any]]) -> dict[str, Stream]:
    """Streams of the only processor, which was killed and started again."""
    front.processors.pop().kill()
    streams = front.streams()

    def restart() -> None:
        front.processors[0].kill()
        front.processors[0] = front.start()

    read_all(list(streams.values()), restart)
    with_two(front)
    return streams


@pytest.fixture(scope="module")
def unseeded(front: Front) -> list[Stream]:
    """Streams with no seed of their own, whose processor was killed."""
    body = {"prompt": ["one", "two"], "temperature": 1.0, "n": 2, **ENDLESS}
    streams = [Stream(front.url, "/v1/completions", body) for _ in range(3)]
    read_while_lost(front, streams, Process.kill)
    with_two(front)
    return streams


@pytest.mark.parametrize("kind", KINDS)
def test_row_14_a_stream_goes_on_without_gap_or_repeat_when_its_processor_is_killed(
    front: Front, undisturbed: dict[str, list[Any]], killed: dict[str, Stream], kind: str
) -> None:
    stream = killed[kind]
    assert stream.events == undisturbed[kind]
    receipt = front.receipt(stream)
    (continued,) = receipt["continuations"]
    assert (
        len(stream.ids) <= 1
        and receipt["request_id"] == stream.request_id
        and receipt["migrations"] == 1
    )
    assert (continued["role"], continued["outcome"], receipt["attempts"][0]["role"]) == (
        "processor",
        "peer_lost",
        "processor",
    )
    assert (
        continued["to"] == receipt["peers"]["processor"] != continued["from"]
        and continued["pause_ms"] > 0
    )


def test_row_14_streams_outlast_the_drain_of_their_processor(
    front: Front, undisturbed: dict[str, list[Any]], drained: dict[str, Stream]
) -> None:
    assert {kind: stream.events for kind, stream in drained.items()} == {
        kind: undisturbed[kind] for kind in A_FEW
    }
    outcomes = {
        found["outcome"]
        for stream in drained.values()
        for found in front.receipt(stream)["continuations"]
    }
    assert outcomes <= {"draining", "peer_lost"} and outcomes


def test_row_14_streams_of_the_only_processor_wait_for_the_one_that_is_started_in_its_place(
    undisturbed: dict[str, list[Any]], restarted: dict[str, Stream]
) -> None:
    assert {kind: stream.events for kind, stream in restarted.items()} == {
        kind: undisturbed[kind] for kind in A_FEW
    }


def test_row_14_a_stream_with_no_seed_of_its_own_goes_on_with_the_one_that_was_drawn(
    front: Front, unseeded: list[Stream]
) -> None:
    said = [json.dumps(stream.events) for stream in unseeded]
    assert all(
        front.receipt(stream)["migrations"] == 1 and '"error"' not in text
        for stream, text in zip(unseeded, said, strict=True)
    )
    assert len(set(said)) == 3, "each request draws its own"


def test_row_14_streams_go_on_while_their_processor_is_silent_and_it_is_told_when_it_wakes(
    front: Front, undisturbed: dict[str, list[Any]]
) -> None:
    streams = front.streams()
    read_while_lost(front, list(streams.values()), Process.stop)
    front.processors[0].resume()
    assert {kind: stream.events for kind, stream in streams.items()} == {
        kind: undisturbed[kind] for kind in A_FEW
    }
    assert {
        found["outcome"]
        for stream in streams.values()
        for found in front.receipt(stream)["continuations"]
    } == {"peer_silent"}
    wait_until(
        lambda: front.is_whole() and not held(front.peers()),
        READY_S,
        "nothing is left of them anywhere",
    )
