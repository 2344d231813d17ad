"""The demo's prompts, sent over HTTP as any client would."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from meshserve.errors import StartupFailed

_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt, and what it shows."""

    title: str
    path: str
    body: dict[str, Any]


def _document(topic: str) -> str:
    return " ".join(f"Paragraph {number} of a long report on {topic}, with all that was seen and said." for number in range(1, 15))


def questions(max_tokens: int = 10) -> list[Question]:
    """A handful that take every path: short, long, the same again, another long one, a chat."""
    harbours, rivers = _document("harbours"), _document("rivers")
    texts = (
        ("a short prompt stays with its decode worker", "What is a mesh?"),
        ("a long one is prefilled elsewhere, its KV handed over", harbours),
        ("the same again: its blocks are cached", harbours),
        ("another long one", rivers),
    )
    completions = [Question(title, "/v1/completions", {"prompt": prompt, "max_tokens": max_tokens}) for title, prompt in texts]
    chat = {"messages": [{"role": "user", "content": "Tell me something about the sea."}], "max_tokens": max_tokens}
    return [*completions, Question("a chat", "/v1/chat/completions", chat)]


async def ask(url: str, question: Question, model: str) -> AsyncIterator[str | dict[str, Any]]:
    """The answer's texts as they come, then its receipt. Raises StartupFailed for anything but an answer."""
    parts = urlsplit(url)
    body = json.dumps({"model": model, **question.body, "stream": True, "meshserve": {"receipt": True}}).encode()
    head = f"POST {question.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    async with asyncio.timeout(_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(head.encode() + b"connection: close\r\n\r\n" + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise StartupFailed(f"a prompt was not answered: {status.decode(errors='replace').strip()}")
            async for event in _events(reader):
                yield event
        finally:
            writer.close()


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
