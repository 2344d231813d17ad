"""The demo's prompts, sent over HTTP as any client would."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from meshserve.cli.demo.prompts import Question
from meshserve.errors import StartupFailed

_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Answered:
    """How one prompt was answered, as its client saw it."""

    receipt: dict[str, Any]
    ttft_s: float
    """From sending the prompt to the first text."""
    stream_s: float
    """From there to the end."""

    @property
    def tokens_per_s(self) -> float:
        """After the first one; 0 where there is none after it."""
        num_tokens = self.receipt["tokens"]["completion"] - 1
        return num_tokens / self.stream_s if num_tokens > 0 and self.stream_s > 0 else 0.0


async def ask(url: str, question: Question, model: str, timeout_s: float) -> AsyncIterator[str | Answered]:
    """The answer's texts as they come, then how it was answered. Raises StartupFailed for anything but an answer."""
    began_s = time.monotonic()
    first_s = None
    parts = urlsplit(url)
    body = json.dumps({"model": model, **question.body, "stream": True, "meshserve": {"receipt": True}}).encode()
    head = f"POST {question.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    async with _within(timeout_s):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(head.encode() + b"connection: close\r\n\r\n" + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise StartupFailed(f"a prompt was not answered: {_reason(status, await reader.read())}")
            async for event in _events(reader):
                now_s = time.monotonic()
                first_s = first_s or now_s
                yield event if isinstance(event, str) else Answered(event, first_s - began_s, now_s - first_s)
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def _within(timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise StartupFailed(
            f"a prompt was not answered in {timeout_s:g} s: this machine is too slow, or too busy, for the model"
        ) from error


async def list_peers(url: str) -> list[dict[str, Any]]:
    """What `GET /mesh/peers` says."""
    parts = urlsplit(url)
    async with asyncio.timeout(_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(f"GET /mesh/peers HTTP/1.1\r\nhost: {parts.netloc}\r\nconnection: close\r\n\r\n".encode())
            _, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
    found: list[dict[str, Any]] = json.loads(body)
    return found


def _reason(status: bytes, rest: bytes) -> str:
    """What the error says, else its status."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(rest.partition(b"\r\n\r\n")[2])["error"]["message"])
    return status.decode(errors="replace").strip()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[str | dict[str, Any]]:
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            if line.startswith(b"data: [DONE]"):
                return
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise StartupFailed(f"a prompt was not answered: {chunk['error']['message']}")
        for choice in chunk["choices"]:
            text = choice.get("text") or choice.get("delta", {}).get("content")
            if text:
                yield text
        if "meshserve" in chunk:
            yield chunk["meshserve"]
    raise StartupFailed("a prompt was not answered: the stream broke off")
