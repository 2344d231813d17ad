"""Requests that go on while a test does something to the mesh: each must be answered, and right."""

import itertools
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from tests.harness import Lan, pace
from tests.lan.meshes import LanMesh, text_of, undisturbed

SHORT = "is a short question."
LONG = "is the beginning of a long document that is worth handing over. " * 16


class Load:
    """Clients that ask one request after the other while the `with` block runs.

    Prompts differ from the first token on.
    """

    def __init__(
        self,
        mesh: LanMesh,
        num_clients: int = 4,
        pause_s: float = 0.05,
        text: str = SHORT,
        max_tokens: int = 24,
    ) -> None:
        self._mesh, self._pause_s, self._text, self._max_tokens = mesh, pause_s, text, max_tokens
        self._numbers = itertools.count()
        self._pool = ThreadPoolExecutor(num_clients)
        self._clients: list[Future[None]] = []
        self._is_over = threading.Event()
        self._num_clients = num_clients
        self.answers: dict[str, dict[str, Any]] = {}
        """By prompt."""
        self.longest_s = 0.0

    def __enter__(self) -> Self:
        """The clients begin."""
        self._clients = [self._pool.submit(self._ask_on) for _ in range(self._num_clients)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Each client ends its last request. Raises AssertionError for any answer that was none."""
        self._is_over.set()
        self._pool.shutdown()
        if error is None:
            for client in self._clients:
                client.result()

    def _ask_on(self) -> None:
        while not self._is_over.is_set():
            prompt = f"{next(self._numbers):06} {self._text}"
            began_s = time.monotonic()
            self.answers[prompt] = self._mesh.complete(prompt, self._max_tokens)
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            pace(self._pause_s)

    @property
    def receipts(self) -> list[dict[str, Any]]:
        """Of all answers so far."""
        return [answer["meshserve"] for answer in list(self.answers.values())]

    def check(self, lan: Lan) -> None:
        """Every answer is that of a peer alone, which is asked the same now."""
        prompts = list(self.answers)
        print(f"\n{len(prompts)} requests, the longest {self.longest_s:.2f} s")
        assert [text_of(self.answers[prompt]) for prompt in prompts] == undisturbed(
            lan, prompts, self._max_tokens
        )
