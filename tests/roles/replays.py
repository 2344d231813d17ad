"""A frontend with a worker and two processors, and streams of every kind, which clients read."""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.harness import Process, meshserve_command, wait_until

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
