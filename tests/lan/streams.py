"""Streams of a mesh, as their clients read them."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.harness import wait_until
from tests.lan.meshes import HTTP, READY_S, LanMesh


class Stream:
    """One streamed completion or chat, as its client reads it."""

    def __init__(
        self, mesh: LanMesh, prompt: str | list[int], max_tokens: int, **fields: Any
    ) -> None:
        self._mesh = mesh
        self._path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
        asked = {} if "messages" in fields else {"prompt": prompt}
        self._body = {
            "model": "dummy",
            **asked,
            "max_tokens": max_tokens,
            "stream": True,
            "ignore_eos": True,
            **fields,
        }
        self._body["meshserve"] = {"receipt": True}
        self.chunks: list[dict[str, Any]] = []
        self.came_s: list[float] = []
        self.is_done = False

    def run(self) -> "Stream":
        """Read it to its end."""
        with self._mesh.front.stream(
            "POST", f"{HTTP}{self._path}", self._body, timeout_s=60.0
        ) as received:
            for line in received:
                data = line.strip().removeprefix("data: ")
                if data.startswith(":"):  # a comment, which shows that the stream lives
                    continue
                if data == "[DONE]":
                    self.is_done = True
                elif data:
                    self.chunks.append(json.loads(data))
                    self.came_s.append(time.monotonic())
        return self

    @property
    def text(self) -> str:
        """All of it; an error fails the test."""
        assert self.is_done, self.chunks[-1:]
        return "".join(choice["text"] for chunk in self.chunks for choice in chunk["choices"])

    @property
    def said(self) -> list[str]:
        """All that was said of each answer, in order: text, calls, log probabilities, its end.

        An error fails the test.
        """
        assert self.is_done, self.chunks[-1:]
        choices = [choice for chunk in self.chunks for choice in chunk["choices"]]
        for call in [
            call for choice in choices for call in choice.get("delta", {}).get("tool_calls") or []
        ]:
            call.pop("id", None)  # made up for each answer
        return [
            json.dumps(choice)
            for choice in sorted(choices, key=lambda choice: int(choice["index"]))
        ]

    @property
    def receipt(self) -> dict[str, Any]:
        """What the last chunk brought."""
        found: dict[str, Any] = next(
            chunk["meshserve"] for chunk in reversed(self.chunks) if chunk.get("meshserve")
        )
        return found

    @property
    def longest_pause_s(self) -> float:
        """Between two chunks."""
        return max(
            later - sooner for sooner, later in zip(self.came_s, self.came_s[1:], strict=False)
        )


@contextmanager
def reading(streams: Sequence[Stream]) -> Iterator[None]:
    """Read streams in threads: the block begins when all streams run, and ends when all are over."""
    with ThreadPoolExecutor(len(streams)) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        wait_until(
            lambda: min(len(stream.chunks) for stream in streams) > 10,
            READY_S,
            "all streams run",
        )
        yield
        for stream in running:
            stream.result()


def undisturbed_texts(mesh: LanMesh, count: int, max_tokens: int) -> list[str]:
    """What the streams "stream 0", "stream 1" and so on say while nothing is lost."""
    with ThreadPoolExecutor(count) as pool:
        streams = list(
            pool.map(
                lambda number: Stream(mesh, f"stream {number}", max_tokens).run(), range(count)
            )
        )
    assert not any(stream.receipt["migrations"] for stream in streams)
    return [stream.text for stream in streams]
