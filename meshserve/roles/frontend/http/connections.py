"""All connections of one server: how many there may be, the sweep that looks at each, and the end
of them all.
"""

import asyncio
from collections import Counter
from contextlib import suppress
from email.utils import formatdate
from typing import Protocol

from meshserve.config import FrontendConfig
from meshserve.errors import MeshserveError, Overloaded, RateLimited
from meshserve.roles.frontend.http.forwarded import TrustedProxies
from meshserve.roles.frontend.http.request_log import RequestLog
from meshserve.telemetry import Counters

SWEEP_S = 0.5
"""Between two looks at all connections. Lower keeps deadlines more exactly, and costs more."""
_SWEEP_AGAIN_S = 0.02
_CLOSE_CHECK_S = 0.01
_MAX_CLOSED_PER_SWEEP = 64
"""Refusing a connection costs some 30 us: hundreds at once would hold up everybody's tokens."""


class OpenConnection(Protocol):
    """One of them."""

    transport: asyncio.Transport
    address: str
    """Of the client."""

    def check(self, now_s: float) -> bool:
        """Look at the deadlines; True if the connection was closed for one."""

    def close_if_idle(self) -> None:
        """The server stops."""


class Connections:
    """All connections of one server: their limits, their number by address, and the sweep."""

    def __init__(
        self,
        limits: FrontendConfig,
        max_body_bytes: int,
        scheme: str,
        counters: Counters,
        log: RequestLog,
    ) -> None:
        self.limits, self.max_body_bytes, self.log = limits, max_body_bytes, log
        self.scheme, self.counters = scheme, counters
        self.proxies = TrustedProxies(limits.forwarded_allow_ips)
        self.open: set[OpenConnection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        """Of answers that are made by coroutines."""
        self.is_stopping = False
        """Each connection closes with the response that is under way."""
        self._num_by_address: Counter[str] = Counter()
        self.loop = asyncio.get_running_loop()
        self._sweep()

    def arrived(self, connection: OpenConnection) -> MeshserveError | None:
        """One more connection; if there are too many, the error that says so."""
        address = connection.address
        self.open.add(connection)
        self._num_by_address[address] += 1
        if len(self.open) > self.limits.max_connections:
            return Overloaded(
                f"this frontend has {self.limits.max_connections} connections open; try again"
            )
        if self._num_by_address[address] > self.limits.max_connections_per_address:
            most = self.limits.max_connections_per_address
            return RateLimited(f"{address} has {most} connections open; close some")
        return None

    def left(self, connection: OpenConnection) -> None:
        """A connection is gone."""
        self.open.discard(connection)
        self._num_by_address[connection.address] -= 1
        if self._num_by_address[connection.address] <= 0:
            del self._num_by_address[connection.address]

    def _sweep(self) -> None:
        self.now_s = self.loop.time()
        """As of the last sweep: close enough for deadlines of seconds, and free."""
        self.date = f"date: {formatdate(usegmt=True)}\r\n".encode()
        num_closed = 0
        for connection in list(self.open):
            num_closed += connection.check(self.now_s)
            if num_closed >= _MAX_CLOSED_PER_SWEEP:
                break
        pause_s = _SWEEP_AGAIN_S if num_closed >= _MAX_CLOSED_PER_SWEEP else SWEEP_S
        self._timer = self.loop.call_later(pause_s, self._sweep)

    async def close(self, grace_s: float) -> None:
        """Let the responses that are under way end, for so long; then cut off what is still open.
        """
        self.is_stopping = True
        for connection in list(self.open):
            connection.close_if_idle()
        await self._wait_until_empty(grace_s)
        for connection in list(self.open):
            connection.transport.abort()
        await self._wait_until_empty(grace_s)
        self._timer.cancel()

    async def _wait_until_empty(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.open or self.tasks:
                    await asyncio.sleep(_CLOSE_CHECK_S)
