"""A client of both servers: streamed completions of token prompts, with the time of each piece."""

import asyncio
import json
import random
import socket
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from urllib.parse import urlsplit

REQUEST_TIMEOUT_S = 600.0
_MOST_LINE_BYTES = 2**20
"""A receipt is one line."""


@dataclass(slots=True)
class Answer:
    """When the pieces of one streamed answer came, on the client's clock."""

    asked_s: float
    num_tokens: int
    piece_s: list[float] = field(default_factory=list)
    receipt: dict[str, Any] = field(default_factory=dict)
    """Where one was asked for."""

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.piece_s[0] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        """Between one piece and the next."""
        return [later - earlier for earlier, later in zip(self.piece_s, self.piece_s[1:], strict=False)]

    @property
    def ended_s(self) -> float:
        """When the last piece came."""
        return self.piece_s[-1]


def random_prompt(num_tokens: int, rng: random.Random) -> list[int]:
    """Tokens of plain text pieces; no two prompts begin alike, so nothing is found in a cache."""
    return [rng.randrange(300, 40_000) for _ in range(num_tokens)]


async def complete(
    url: str, model: str, prompt: list[int], max_tokens: int, *, with_receipt: bool = False, connected: socket.socket | None = None
) -> Answer:
    """One streamed completion, greedy, of exactly `max_tokens` tokens. Raises RuntimeError for anything but a whole answer.

    `connected` is a connection to the server that is there already, as from another host; it is closed.
    """
    parts = urlsplit(url)
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if with_receipt:
        body["meshserve"] = {"receipt": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    async with asyncio.timeout(REQUEST_TIMEOUT_S):
        if connected is None:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=_MOST_LINE_BYTES)
        else:
            reader, writer = await asyncio.open_connection(sock=connected, limit=_MOST_LINE_BYTES)
        try:
            answer = Answer(time.monotonic(), 0)
            writer.write(head.encode() + data)
            async for line in reader:
                if line.startswith(b"data: {"):
                    _take(answer, json.loads(line[6:]))
                elif line.startswith(b"data: [DONE]"):
                    break
                elif line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                    raise RuntimeError(f"{url} answered {line!r}: {(await reader.read(500))!r}")
        finally:
            writer.close()
    if answer.num_tokens != max_tokens:
        raise RuntimeError(f"{url} gave {answer.num_tokens} tokens of {max_tokens}")
    return answer


def _take(answer: Answer, event: dict[str, object]) -> None:
    if "error" in event:
        raise RuntimeError(str(event["error"]))
    now_s = time.monotonic()
    choices, receipt = event.get("choices"), event.get("meshserve")
    if isinstance(receipt, dict):
        answer.receipt = receipt
    if isinstance(choices, list) and choices and choices[0].get("text"):
        answer.piece_s.append(now_s)
    usage = event.get("usage")
    if isinstance(usage, dict):
        answer.num_tokens = int(usage["completion_tokens"])


@dataclass(frozen=True, slots=True)
class Load:
    """What closed-loop clients saw."""

    tokens_per_s: float
    itl_p50_ms: float
    ttft_mean_ms: float


async def closed_loop(url: str, model: str, num_clients: int, num_requests: int, prompt_tokens: int, max_tokens: int, seed: int) -> Load:
    """Each client asks again as soon as it has its answer, `num_requests` times."""
    rng = random.Random(seed)
    prompts = [[random_prompt(prompt_tokens, rng) for _ in range(num_requests)] for _ in range(num_clients)]

    async def client(own: list[list[int]]) -> list[Answer]:
        return [await complete(url, model, prompt, max_tokens) for prompt in own]

    began_s = time.monotonic()
    answers = [answer for found in await asyncio.gather(*map(client, prompts)) for answer in found]
    took_s = time.monotonic() - began_s
    gaps = [gap for answer in answers for gap in answer.gaps_s]
    ttft_s = sum(answer.ttft_s for answer in answers) / len(answers)
    return Load(num_clients * num_requests * max_tokens / took_s, median(gaps) * 1000, ttft_s * 1000)
