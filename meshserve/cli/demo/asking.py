"""The demo's prompts, sent over HTTP as any client would."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshserve.cli.bench.http_client import Pool, WaitedReply, parse_url, request_head, with_body
from meshserve.cli.bench.sse import EventReader, json_object
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
    """From the first text to the end."""

    @property
    def tokens_per_s(self) -> float:
        """After the first token; 0 if there is no other."""
        num_tokens = self.receipt["tokens"]["completion"] - 1
        return num_tokens / self.stream_s if num_tokens > 0 and self.stream_s > 0 else 0.0


class Client:
    """Connections to the demo's frontend."""

    def __init__(self, url: str) -> None:
        origin, self._host, _ = parse_url(url)
        self._pool = Pool(origin)

    async def list_peers(self) -> list[dict[str, Any]]:
        """The answer of `GET /mesh/peers`."""
        head = request_head("GET", self._host, "/mesh/peers")
        _, body = await self._pool.ask(with_body(head, b""), _TIMEOUT_S)
        found: list[dict[str, Any]] = json.loads(body)
        return found

    async def ask(
        self, question: Question, model: str, timeout_s: float, on_text: Callable[[str], None]
    ) -> Answered:
        """Give out the answer's text as it comes.

        Raises StartupFailed if there is no answer, and whatever `on_text` raises.
        """
        body = {"model": model, **question.body, "stream": True, "meshserve": {"receipt": True}}
        head = request_head("POST", self._host, question.path)
        reply, began_s = _Answer(), time.monotonic()
        self._pool.start(with_body(head, json.dumps(body).encode()), reply)
        try:
            async with asyncio.timeout(timeout_s):
                while text := await reply.next_text():
                    on_text(text)
        except TimeoutError as error:
            raise StartupFailed(
                f"a prompt was not answered in {timeout_s:g} s: "
                "this machine is too slow, or too busy, for the model"
            ) from error
        try:
            ended_s = reply.ended.result()
        except ConnectionError as error:
            raise StartupFailed(f"a prompt was not answered: {error}") from error
        first_s = reply.first_s or ended_s
        return Answered(reply.receipt(), first_s - began_s, ended_s - first_s)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.close()


class _Answer(WaitedReply):
    """A stream whose text can be waited for.

    Text is given out to the one who waits, never from `body`: the HTTP parser calls `body`, and
    would take an error of the terminal (a closed pipe) for a malformed response.
    """

    __slots__ = ("_events", "_has_news", "first_s")

    def __init__(self) -> None:
        super().__init__()
        self._events = EventReader(is_keeping_text=True)
        self._has_news = asyncio.Event()
        self.ended.add_done_callback(lambda _: self._has_news.set())
        self.first_s: float | None = None

    def body(self, now_s: float, data: bytes) -> None:
        if self.status != 200:
            self.parts.append(data)
        elif self._events.feed(data):
            self.first_s = self.first_s or now_s
            self._has_news.set()

    async def next_text(self) -> str:
        """The text that came since the last call; empty once the answer has ended or failed."""
        while not (text := self._events.take_text()) and not self.ended.done():
            self._has_news.clear()
            await self._has_news.wait()
        return text

    def receipt(self) -> dict[str, Any]:
        """The receipt of a complete answer. Raises StartupFailed if there is an error instead."""
        is_stream = self.status == 200
        fields = self._events.fields()[0] if is_stream else json_object(b"".join(self.parts))
        if "meshserve" in fields and "error" not in fields:
            found: dict[str, Any] = fields["meshserve"]
            return found
        error = fields.get("error")
        reason = "the stream broke off" if is_stream else f"HTTP {self.status}"
        if isinstance(error, dict):
            reason = str(error.get("message", reason))
        raise StartupFailed(f"a prompt was not answered: {reason}")
