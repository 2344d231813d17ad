"""The event feed of a whole mesh, as a frontend gives it to its readers: who is there, what they do. With no reader it follows nobody."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from meshserve.errors import Overloaded, ProtocolError
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.transport.sockets import endpoint
from meshserve.mesh.watch import Watcher
from meshserve.observe.feed_merge import Batch, Merge
from meshserve.observe.feed_source import INTERVAL_S
from meshserve.wire.hello import PeerInfo
from meshserve.wire.messages import FEED

MAX_READERS = 32
RETRY_MS = 1000
"""After which a reader whose stream broke off asks again; it gets all there is to know anew."""

_MAX_BACKLOG = 20
"""Updates that wait for one reader: four seconds. One that falls behind further skips them and gets the state as it is then."""
_KEEP_ALIVE_S = 1.0
_MAX_GONE = 32
_GONE_S = 30.0
"""How long a peer that died or left is still shown."""


class Reader:
    """One reader's place in the feed. Whoever reads calls `next` again and again."""

    def __init__(self, loop: asyncio.AbstractEventLoop, snapshot: Callable[[], bytes]) -> None:
        self._loop, self._snapshot = loop, snapshot
        self._waiting: asyncio.Future[None] | None = None
        self._updates: deque[bytes] = deque()
        self._is_behind = True
        self._is_closed = False

    def push(self, update: bytes) -> None:
        """One update more, unless it has missed some: what it gets next says it all."""
        if not self._is_behind:
            self._updates.append(update)
            if len(self._updates) > _MAX_BACKLOG:
                self._updates.clear()
                self._is_behind = True
        self._wake()

    def close(self) -> None:
        """The feed ends here."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def next(self) -> bytes:
        """What is new, at first the whole state; empty at the end."""
        while not self._updates and not self._is_behind and not self._is_closed:
            self._waiting = self._loop.create_future()
            await self._waiting
        if self._is_closed:
            return b""
        if self._is_behind:
            self._is_behind = False
            return self._snapshot()
        found = b"".join(self._updates)
        self._updates.clear()
        return found


class MeshFeed:
    """Follows the mesh while it has readers, and tells all of them the same, at most 5 times a second."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._loop = asyncio.get_running_loop()
        self._readers: set[Reader] = set()
        self._watchers: dict[str, Watcher] = {}
        self._peers: dict[str, dict[str, Any]] = {}
        self._gone_s: dict[str, float] = {}
        self._changed: dict[str, None] = {}
        self._merge = Merge(0.0)
        self._timer: asyncio.TimerHandle | None = None
        self._told_s = 0.0
        self._number = 0
        mesh.subscribe(self._on_change)

    # --- readers

    def join(self) -> Reader:
        """One more reader. Raises Overloaded if there are too many."""
        if len(self._readers) >= MAX_READERS:
            raise Overloaded(f"{MAX_READERS} readers follow this frontend's events already")
        if not self._readers:
            self._begin()
        reader = Reader(self._loop, self._snapshot)
        self._readers.add(reader)
        return reader

    def leave(self, reader: Reader) -> None:
        """It reads no more; with the last one, the feed stands still."""
        self._readers.discard(reader)
        if not self._readers:
            self._end()

    def close(self) -> None:
        """End all readers' streams."""
        for reader in self._readers:
            reader.close()
        self._readers.clear()
        self._end()

    def _begin(self) -> None:
        self._merge = Merge(time.monotonic())
        self._show(self._mesh.own, "draining" if self._mesh.own.is_draining else "alive")
        self._follow(self._mesh.incarnation)
        for member in self._mesh.links.membership.listed():
            self._show_member(member)
            if member.is_callable:
                self._follow(member.info.incarnation)
        self._changed.clear()
        self._timer = self._loop.call_later(INTERVAL_S, self._tick)

    def _end(self) -> None:
        for watcher in self._watchers.values():
            watcher.close()
        for state in (self._watchers, self._peers, self._gone_s, self._changed):
            state.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- peers

    def _on_change(self, change: Change, member: Member) -> None:
        if not self._readers:
            return
        incarnation = member.info.incarnation
        if change in (Change.DIED, Change.LEFT):
            self._forget(incarnation, "dead" if change is Change.DIED else "left")
            return
        self._show_member(member)
        if change is Change.CALLABLE:
            self._follow(incarnation)

    def _follow(self, incarnation: str) -> None:
        if incarnation in self._watchers:
            return

        def on_change(item: Any) -> None:
            try:
                self._merge.add(incarnation, Batch.from_wire(item), time.monotonic())
            except ProtocolError:
                self._mesh.counters.add("feed_batches_malformed")

        self._watchers[incarnation] = Watcher(self._mesh, incarnation, FEED, lambda: self._merge.forget(incarnation), on_change)

    def _forget(self, incarnation: str, state: str) -> None:
        watcher = self._watchers.pop(incarnation, None)
        if watcher is not None:
            watcher.close()
        self._merge.forget(incarnation)
        if incarnation in self._peers:
            self._peers[incarnation] = {**self._peers[incarnation], "state": state, "since_ms": self._merge.time_ms(time.monotonic())}
            self._gone_s[incarnation] = time.monotonic()
            self._changed[incarnation] = None

    def _show_member(self, member: Member) -> None:
        state = "joining" if not member.is_callable and not member.was_cut else member.state.value
        self._show(member.info, "draining" if member.info.is_draining else state, member)

    def _show(self, info: PeerInfo, state: str, member: Member | None = None) -> None:
        known = self._peers.get(info.incarnation)
        host = member.linked_at[0] if member is not None and member.linked_at else info.addresses[0]
        is_same_state = known is not None and known["state"] == state
        self._gone_s.pop(info.incarnation, None)
        self._changed[info.incarnation] = None
        self._peers[info.incarnation] = {
            "id": info.incarnation,
            "name": self._mesh.name_of(info.incarnation),
            "roles": list(info.roles),
            "model": info.card.model if info.card else None,
            "block_bytes": info.layout.block_bytes if info.layout else None,
            "address": endpoint(host, info.port),
            "version": info.version,
            "state": state,
            "since_ms": known["since_ms"] if known is not None and is_same_state else self._merge.time_ms(time.monotonic()),
        }

    def _drop_gone(self, now_s: float) -> list[str]:
        old = [peer for peer, gone_s in self._gone_s.items() if now_s - gone_s > _GONE_S]
        surplus = [peer for peer in list(self._gone_s)[: max(0, len(self._gone_s) - _MAX_GONE)] if peer not in old]
        for peer in old + surplus:
            del self._gone_s[peer], self._peers[peer]
            self._changed.pop(peer, None)
        return old + surplus

    # --- what readers get

    def _tick(self) -> None:
        now_s = time.monotonic()
        self._timer = self._loop.call_later(INTERVAL_S, self._tick)
        update = self._merge.take(now_s)
        if dropped := self._drop_gone(now_s):
            update["dropped"] = dropped
        if self._changed:
            update["peers"] = [self._peers[peer] for peer in self._changed]
            self._changed.clear()
        if "point" in update:
            update["rtt_ms"] = self._round_trips()
        if not update and now_s - self._told_s < _KEEP_ALIVE_S:
            return
        self._told_s = now_s
        message = self._message("update", {"t_ms": self._merge.time_ms(now_s), **update})
        for reader in self._readers:
            reader.push(message)

    def _round_trips(self) -> dict[str, float]:
        members = self._mesh.links.membership.listed()
        return {member.info.incarnation: round(member.rtt_ms, 3) for member in members if member.rtt_ms is not None}

    def _snapshot(self) -> bytes:
        own = self._mesh.own
        state = {
            "t_ms": self._merge.time_ms(time.monotonic()),
            "mesh": own.mesh,
            "frontend": own.incarnation,
            "peers": list(self._peers.values()),
            "rtt_ms": self._round_trips(),
            **self._merge.now(),
        }
        return self._message("snapshot", state)

    def _message(self, event: str, data: dict[str, Any]) -> bytes:
        """As server-sent events (HTML Standard, section 9.2)."""
        self._number += 1
        return f"id: {self._number}\nretry: {RETRY_MS}\nevent: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
