"""What comes back from a processor for one request, and who waits for it."""

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any

from meshserve.errors import MeshserveError, RequestTimedOut
from meshserve.mesh.calls import OutgoingCall
from meshserve.roles.frontend.asgi import ClientGone


class Answer:
    """The sink of the processor's stream. `wait` gives all that is there."""

    __slots__ = ("_loop", "_max_unread", "_waiting", "call", "end", "error", "is_client_gone", "items", "on_over", "over_s", "passed_s")

    def __init__(self, loop: asyncio.AbstractEventLoop, max_unread: int) -> None:
        self._loop, self._max_unread = loop, max_unread
        self._waiting: asyncio.Future[None] | None = None
        self.items: list[Any] = []
        self.end: Any = None
        self.error: MeshserveError | None = None
        self.is_client_gone = False
        self.call: OutgoingCall | None = None
        self.on_over: Callable[[bool], None] | None = None
        """Called once when nothing more comes: True if it came to its end."""
        self.passed_s = self.over_s = 0.0
        """When the processor was asked, and when nothing more came."""

    def on_item(self, item: Any) -> None:
        self.items.append(item)
        if len(self.items) > self._max_unread:
            self.stop(RequestTimedOut("the client takes its answer in too slowly"))
        self._wake()

    def on_items(self, items: list[Any]) -> None:
        """Several at once."""
        self.items += items
        if len(self.items) > self._max_unread:
            self.stop(RequestTimedOut("the client takes its answer in too slowly"))
        self._wake()

    def on_end(self, value: Any) -> None:
        self.end = value if value is not None else ()
        self._over(True)
        self._wake()

    def on_error(self, error: MeshserveError) -> None:
        self.error = error
        self._over(False)
        self._wake()

    def stop(self, error: MeshserveError) -> None:
        """Cancel at every hop; the client is told why. Harmless after the end."""
        if self.end is None and self.error is None:
            self.cancel()
            self.on_error(error)

    def client_gone(self) -> None:
        """Cancel at every hop."""
        if self.end is None and self.error is None:
            self.is_client_gone = True
            self.cancel()
            self._wake()

    def cancel(self) -> None:
        """Nobody waits any more."""
        if self.call is not None:
            self.call.cancel()
        self._over(False)

    def _over(self, is_done: bool) -> None:
        self.over_s = self.over_s or monotonic()
        on_over, self.on_over = self.on_over, None
        if on_over is not None:
            on_over(is_done)

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
