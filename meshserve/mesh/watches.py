"""Watches: state of one peer that others follow.

A watch is a stream that starts with a snapshot and goes on with changes. If the stream breaks, or overflows with its link, it is opened
again and starts with a new snapshot. (PUB/SUB would drop silently and join slowly.)
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from meshserve.errors import MeshserveError, PeerLost, ProtocolError
from meshserve.mesh.calls import IncomingCall, OutgoingCall
from meshserve.mesh.mesh import Mesh
from meshserve.wire.messages import Method
from meshserve.wire.structs import Message, plain, read

_FOREVER_S = 30 * 86_400.0
_REOPEN_S = 0.05
"""Until a broken watch is opened again: well under a heartbeat, as what the watcher knows is out of date
meanwhile. Asking costs nothing while there is no connection."""
_REOPEN_MAX_S = 1.0
"""The pause doubles up to this while the peer itself refuses."""


class WatchSource:
    """The side that has the state."""

    def __init__(self, mesh: Mesh, method: Method, snapshot: Callable[[], Iterable[Any]]) -> None:
        self._mesh, self._snapshot = mesh, snapshot
        self.watchers: set[IncomingCall] = set()
        """If there are none, a caller need not describe a change."""
        mesh.serve(method, self._on_open)

    def _on_open(self, call: IncomingCall) -> None:
        self._mesh.counters.add("watches_opened")
        self.watchers.add(call)
        call.on_cancel = lambda: self.watchers.discard(call)
        for item in self._snapshot():
            call.send(item)

    def publish(self, change: Any) -> None:
        """Send one change to all watchers. The change is encoded once for all of them."""
        packed = None
        for call in self.watchers:
            if call.is_local:
                call.send(change)
            else:
                packed = plain(change) if packed is None else packed
                call.send(packed)


class Watcher:
    """The side that follows one peer's state, until `close`. Also the sink of its stream."""

    def __init__(self, mesh: Mesh, peer: str, method: Method, on_reset: Callable[[], None], on_change: Callable[[Any], None]) -> None:
        self._mesh, self._peer, self._method = mesh, peer, method
        self._on_reset, self._on_change = on_reset, on_change
        self._call: OutgoingCall | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._pause_s = _REOPEN_S
        self._open()

    def _open(self) -> None:
        self._timer = None
        self._on_reset()
        try:
            self._call = self._mesh.open(self._peer, self._method, None, self, _FOREVER_S)
        except PeerLost:
            self._reopen_in(_REOPEN_S)

    def _reopen_in(self, pause_s: float) -> None:
        self._call = None
        if not self._is_closed:
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._open)

    def _refused(self) -> None:
        self._reopen_in(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _REOPEN_MAX_S)

    def on_item(self, item: Any) -> None:
        """The snapshot, then changes. A malformed item is counted and dropped: the next item may be correct."""
        self._pause_s = _REOPEN_S
        try:
            is_read = self._method.item is None or isinstance(item, Message)  # a message is from this very peer
            change = item if is_read else read(self._method.item, item)
        except ProtocolError as error:
            self._mesh.counters.add("reports_malformed")
            self._mesh.faults.note("report", self._mesh.name_of(self._peer), error.message)
            return
        self._on_change(change)

    def on_end(self, value: Any) -> None:
        """The peer replaced its side; a watch has no other end."""
        self._refused()

    def on_error(self, error: MeshserveError) -> None:
        """The watch broke. It is opened again, and starts with a new snapshot."""
        self._refused()

    def close(self) -> None:
        """End the watch."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._call is not None:
            self._call.cancel()
