"""Load of which a part leaves at random moments, over HTTP: what is asked, how its client leaves, and what it was told."""

import asyncio
import contextlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.harness import pace_async

TIMEOUT_S = 60.0
WORDS = ("harbor", "lantern", "ledger", "orchard", "winter", "signal", "copper", "meadow")
PREFIXES = tuple(f"Document {number}. " + " ".join(WORDS[number:] * 12) for number in range(4))
MOST_TOKENS = 2000
"""What those ask for that leave: far more than comes until then."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, and how its client leaves: `after_s` that it was sent, by closing its connection or by the request's name."""

    label: str
    path: str
    body: dict[str, Any]
    leaves: str = ""
    after_s: float = 0.0


class Told(NamedTuple):
    """A complete answer, whichever way it came."""

    texts: dict[int, str]
    reasons: dict[int, str]
    usage: dict[str, int]


def make_load(num_staying: int, num_leaving: int, seed: int) -> list[Asked]:
    """In random order. Moments are spread evenly over the orders of magnitude from 1 ms to 600 ms, so that every step is met."""
    rng = random.Random(seed)
    staying = [_request(rng, f"stays-{number}", rng.randint(2, 24)) for number in range(num_staying)]
    leaving = []
    for number in range(num_leaving):
        asked = _request(rng, f"leaves-{number}", MOST_TOKENS)
        how = rng.choice(("closes", "breaks off", "by name"))
        leaving.append(Asked(asked.label, asked.path, asked.body, how, 0.001 * 600 ** rng.random()))
    load = staying + leaving
    rng.shuffle(load)
    return load


def _request(rng: random.Random, label: str, max_tokens: int) -> Asked:
    """Prompts of a few words to a few hundred; of some, the first part is in some worker's cache, or on its way there."""
    text = " ".join(rng.choices(WORDS, k=rng.choice((2, 20, 60, 120))))
    prompt = f"{rng.choice(PREFIXES)} {label} {text}" if rng.random() < 0.3 else f"{label} {text}"
    body: dict[str, Any] = {"model": "dummy", "max_tokens": max_tokens, "ignore_eos": True, "seed": rng.getrandbits(30), "temperature": 1.0}
    body |= {"n": rng.choice((1, 1, 1, 2)), "stream": rng.random() < 0.5}
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if rng.random() < 0.5:
        return Asked(label, "/v1/completions", {**body, "prompt": prompt})
    return Asked(label, "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]})


async def run_load(port: int, load: Sequence[Asked], num_at_once: int) -> dict[str, Told]:
    """What those were told that stayed, by label. Fails for any other end than theirs, or than the leaving ones' own."""
    places, told = asyncio.Semaphore(num_at_once), dict[str, Told]()

    async def one(asked: Asked) -> None:
        async with places, asyncio.timeout(TIMEOUT_S):
            if asked.leaves:
                await _leave(port, asked)
            else:
                told[asked.label] = await _stay(port, asked)

    async with asyncio.TaskGroup() as group:
        for asked in load:
            group.create_task(one(asked))
    return told


async def _stay(port: int, asked: Asked) -> Told:
    """Comes again when the mesh is full, as clients do."""
    while True:
        status, head, body = await _exchange(port, asked)
        if status != 503:
            assert status == 200, (asked, body)
            return _told(asked, body)
        await pace_async(float(head.partition("retry-after: ")[2].split()[0]))


async def _leave(port: int, asked: Asked) -> None:
    if asked.leaves == "by name":
        await _end_by_name(port, asked)
        return
    async with _connected(port) as (_, writer):
        writer.write(_message("POST", asked.path, asked.label, asked.body))
        await pace_async(asked.after_s)
        if asked.leaves == "breaks off":
            writer.transport.abort()


async def _end_by_name(port: int, asked: Asked) -> None:
    """From a connection of its own. A request that is refused meanwhile has ended as well."""
    async with asyncio.TaskGroup() as group:
        running = group.create_task(_exchange(port, asked))
        await pace_async(asked.after_s)
        status = 404
        while status == 404 and not running.done():
            status, _, _ = await _exchange(port, Asked("", f"/mesh/requests/{asked.label}", {}), "DELETE")
    code, _, body = running.result()
    if code != 503:
        assert status == 200 and code in ((200, 499) if asked.body["stream"] else (499,)), (asked, status, code)
        assert b"cancelled" in body and b"[DONE]" not in body, (asked, body)


@contextlib.asynccontextmanager
async def _connected(port: int) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _message(method: str, path: str, label: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    name = f"x-request-id: {label}\r\n" if label else ""
    return f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{name}content-length: {len(data)}\r\n\r\n".encode() + data


async def _exchange(port: int, asked: Asked, method: str = "POST") -> tuple[int, str, bytes]:
    async with _connected(port) as (reader, writer):
        writer.write(_message(method, asked.path, asked.label, asked.body))
        head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
        return int(head[9:12]), head.decode().lower(), body


def _told(asked: Asked, body: bytes) -> Told:
    if not asked.body["stream"]:
        answers = [json.loads(body)]
    else:
        lines = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]", (asked, lines[-1])
        answers = [json.loads(line) for line in lines[:-1]]
    told = Told({}, {}, answers[-1]["usage"])
    for choice in (choice for answer in answers for choice in answer["choices"]):
        index, part = choice["index"], choice.get("message") or choice.get("delta") or choice
        told.texts[index] = told.texts.get(index, "") + (part.get("text") or part.get("content") or "")
        if choice["finish_reason"] is not None:
            told.reasons[index] = choice["finish_reason"]
    told.usage.pop("prompt_tokens_details", None)  # how much was cached depends on who came before
    return told
