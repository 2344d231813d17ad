"""What comes back from a processor for one request, and who waits for it."""

import asyncio
from typing import Any

from meshserve.errors import MeshserveError
from meshserve.mesh.calls import OutgoingCall


class ClientGone(Exception):  # never leaves this role: there is nobody to tell
    """The client closed its connection."""


class Answer:
    """The sink of the processor's stream. `wait` gives all that is there."""

    __slots__ = ("_loop", "_waiting", "call", "end", "error", "is_client_gone", "items")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: asyncio.Future[None] | None = None
        self.items: list[Any] = []
        self.end: Any = None
        self.error: MeshserveError | None = None
        self.is_client_gone = False
        self.call: OutgoingCall | None = None

    def on_item(self, item: Any) -> None:
        self.items.append(item)
        self._wake()

    def on_end(self, value: Any) -> None:
        self.end = value if value is not None else ()
        self._wake()

    def on_error(self, error: MeshserveError) -> None:
        self.error = error
        self._wake()

    def client_gone(self, _: Any = None) -> None:
        """Cancel at every hop."""
        if self.end is None and self.error is None:
            self.is_client_gone = True
            self.cancel()
            self._wake()

    def cancel(self) -> None:
        """Nobody waits any more."""
        if self.call is not None:
            self.call.cancel()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self) -> list[Any]:
        """Items since the last call; empty only at the end. Raises ClientGone; an error is for the caller to look at."""
        while not self.items and self.end is None and self.error is None and not self.is_client_gone:
            self._waiting = self._loop.create_future()
            await self._waiting
        if self.is_client_gone:
            raise ClientGone
        items, self.items = self.items, []
        return items
