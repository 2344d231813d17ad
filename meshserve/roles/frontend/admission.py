"""Who is let into the mesh, who waits, who is turned away. Pure: it takes the time, and returns what was decided.

Slots are shared among clients by max-min: whoever has least gets the next one, so that a client alone may use all, and of several
that wait each gets an equal share. Within a client, first come first served while waiting is short.

A queue has two reasons (Nichols and Jacobson, Controlling Queue Delay, 2012). A burst goes away by itself: all of it is served. While it
is long the newest go first, so that a few wait long and not everybody. A queue that stands is overload: what waited for longer than half a
typical request is refused, and so is what would. That bounds the waiting of those who are served, whatever the load.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from meshserve.config import FrontendConfig
from meshserve.errors import DeadlineExceeded, MeshserveError, Overloaded, RateLimited

_SMOOTHING = 0.05
"""How much one request's duration counts for the mean."""
_LEAST_PATIENCE_S = 0.5
"""However short requests are, nobody is refused for a wait that people would not mind."""
_CALM_S = 1.0
"""A queue that is empty for a moment between two batches still stands; empty for longer than this, or than a request takes, it is over."""
_REFUSED_MEMORY_S = 5.0
_MAX_RETRY_AFTER_S = 60.0


@dataclass(slots=True, eq=False)
class QueueEntry:
    """One request that wants `weight` slots (sequences), or has them."""

    client: str
    weight: int
    arrived_s: float
    deadline_s: float = math.inf
    admitted_s: float | None = field(default=None, init=False)
    is_waiting: bool = field(default=False, init=False)

    def admitted(self) -> None:
        """The entry waited, and has its slots now."""

    def on_error(self, error: MeshserveError) -> None:
        """The entry waited, and gets no slots."""


Decision = tuple[QueueEntry, MeshserveError | None]
"""An entry that waited, and why it is refused; None: it is admitted."""


@dataclass(slots=True, eq=False)
class _Client:
    name: str
    num_running: int = 0
    queue: OrderedDict[QueueEntry, None] = field(default_factory=OrderedDict)


class Admission:
    """The slots of one model, as far as they are this frontend's to give."""

    def __init__(self, limits: FrontendConfig) -> None:
        self._limits = limits
        self.capacity = math.inf
        self.num_running = 0
        """Slots taken."""
        self.num_waiting = 0
        self.mean_duration_s = 0.0
        """Of the requests that ended well lately; 0 before the first."""
        self._clients: dict[str, _Client] = {}
        self._waiting: dict[int, OrderedDict[str, _Client]] = {}
        """Clients with a queue by the slots that they have, each in order of its turn."""
        self._standing_since_s: float | None = None
        self._emptied_s = -math.inf
        self._refused = 0.0
        self._refused_at_s = 0.0

    # --- what happens

    def arrive(self, entry: QueueEntry, now_s: float) -> list[Decision]:
        """A new request: it is admitted, or it waits (`is_waiting`). Raises Overloaded or RateLimited. Another may have to make room."""
        client = self._clients.get(entry.client)
        if client is None:
            client = self._clients[entry.client] = _Client(entry.client)
        if not self.num_waiting and self._has_room(entry):
            self._admit(client, entry, now_s)
            return []
        if not self.num_waiting and now_s - self._emptied_s > max(_CALM_S, self.mean_duration_s):
            self._standing_since_s = None  # what comes from here on is another burst
        decisions = []
        if self.is_overloaded(now_s) and self._has_its_share(client) and self._expected_wait_s(client) > self.patience_s:
            raise self._refuse(client, now_s)
        if self.num_waiting >= self._limits.max_queued:
            decisions.append(self._make_room(client, now_s))
        self._enqueue(client, entry)
        return decisions

    def leave(self, entry: QueueEntry, now_s: float, is_done: bool) -> list[Decision]:
        """A request ended, or its client no longer waits. `is_done`: its duration says something."""
        client = self._clients.get(entry.client)
        if client is None:
            return []
        if entry.is_waiting:
            self._dequeue(client, entry, now_s)
            self._drop_if_idle(client)
        elif entry.admitted_s is not None:
            if is_done:
                duration_s, mean_s = now_s - entry.admitted_s, self.mean_duration_s
                self.mean_duration_s = mean_s + (duration_s - mean_s) * _SMOOTHING if mean_s else duration_s
            self._change_running(client, -entry.weight)
            entry.admitted_s = None
        return self._fill(now_s) if self.num_waiting else []

    def set_capacity(self, capacity: float, now_s: float) -> list[Decision]:
        """There are so many slots now."""
        self.capacity = capacity
        return self._fill(now_s)

    def sweep(self, now_s: float) -> list[Decision]:
        """To be called every few dozen milliseconds while anybody waits."""
        limit_s = self._limits.max_wait_s
        if self.num_waiting and self._standing_since_s is None and self._oldest_wait_s(now_s) > self.patience_s:
            self._standing_since_s = now_s
        if self.is_overloaded(now_s):
            limit_s = min(limit_s, self.patience_s)
        waiting = [(client, entry) for client in self._clients.values() for entry in client.queue]
        late = [pair for pair in waiting if now_s - pair[1].arrived_s > limit_s or now_s >= pair[1].deadline_s]
        return [self._turn_away(client, entry, now_s) for client, entry in late]

    def _turn_away(self, client: _Client, entry: QueueEntry, now_s: float) -> Decision:
        if now_s >= entry.deadline_s:
            error: MeshserveError = DeadlineExceeded("the request's deadline came before a slot in the mesh")
        else:
            error = self._refuse(client, now_s)
        self._dequeue(client, entry, now_s)
        self._drop_if_idle(client)
        return entry, error

    # --- what that means

    @property
    def patience_s(self) -> float:
        """Half of what a typical request takes."""
        return max(_LEAST_PATIENCE_S, self.mean_duration_s / 2) if self.mean_duration_s else math.inf

    def is_overloaded(self, now_s: float) -> bool:
        """The queue has stood for too long to be a burst's."""
        return self._standing_since_s is not None and now_s - self._standing_since_s >= self._limits.standing_s

    def _rate(self) -> float:
        """Slots that come free in a second when all are taken: Little's law."""
        return self.capacity / self.mean_duration_s if self.mean_duration_s else math.inf

    def _expected_wait_s(self, client: _Client) -> float:
        """Of one more request of this client: clients that wait take turns."""
        num_in_turn = self._num_waiting_clients() + (not client.queue)
        return min((len(client.queue) + 1) * num_in_turn, self.num_waiting + 1) / max(self._rate(), 1e-9)

    def _has_its_share(self, client: _Client) -> bool:
        """It has, or waits for, as many slots as everybody would get. Whoever has less is next anyway."""
        return client.num_running + len(client.queue) >= self.capacity / max(1, len(self._clients))

    def _num_waiting_clients(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _oldest_wait_s(self, now_s: float) -> float:
        return max(
            (now_s - next(iter(client.queue)).arrived_s for clients in self._waiting.values() for client in clients.values()), default=0
        )

    def _has_room(self, entry: QueueEntry) -> bool:
        """What wants more than there is at all runs alone."""
        return self.num_running + entry.weight <= self.capacity or (not self.num_running and self.capacity >= 1)

    def _fill(self, now_s: float) -> list[Decision]:
        decisions: list[Decision] = []
        while self.num_waiting:
            client = next(iter(self._waiting[min(self._waiting)].values()))
            oldest = next(iter(client.queue))
            is_long = now_s - oldest.arrived_s > self.patience_s
            entry = next(reversed(client.queue)) if is_long else oldest
            if not self._has_room(entry):
                break
            self._dequeue(client, entry, now_s)
            self._admit(client, entry, now_s)
            decisions.append((entry, None))
        return decisions

    def _make_room(self, client: _Client, now_s: float) -> Decision:
        """The queue is full: the newest of whoever waits with most makes room for who waits with less. Raises if that is nobody."""
        largest = max(
            (found for group in self._waiting.values() for found in group.values()), key=lambda one: len(one.queue), default=client
        )
        if len(largest.queue) <= len(client.queue) + 1:
            raise self._refuse(client, now_s)
        entry = next(reversed(largest.queue))
        error = self._refuse(largest, now_s)
        self._dequeue(largest, entry, now_s)
        self._drop_if_idle(largest)
        return entry, error

    def _refuse(self, client: _Client, now_s: float) -> MeshserveError:
        """The error for one more of this client's, and when it may come back: all who ask now need so long."""
        self._refused = self._refused * math.exp((self._refused_at_s - now_s) / _REFUSED_MEMORY_S) + 1
        self._refused_at_s = now_s
        retry_after_s = min(_MAX_RETRY_AFTER_S, max(1.0, (self.num_waiting + self._refused) / max(self._rate(), 1e-9)))
        do_others_wait = self._num_waiting_clients() > bool(client.queue)
        has_its_share = self._has_its_share(client)
        self._drop_if_idle(client)
        if do_others_wait and has_its_share:
            return RateLimited("other clients wait, and this one has its share of the mesh", retry_after_s=retry_after_s)
        return Overloaded("the mesh is full", retry_after_s=retry_after_s)

    # --- keeping the books

    def _drop_if_idle(self, client: _Client) -> None:
        if not client.num_running and not client.queue:
            self._clients.pop(client.name, None)

    def _admit(self, client: _Client, entry: QueueEntry, now_s: float) -> None:
        entry.admitted_s = now_s
        self._change_running(client, entry.weight)

    def _change_running(self, client: _Client, num_slots: int) -> None:
        self.num_running += num_slots
        if not client.queue:
            client.num_running += num_slots
            if not client.num_running:
                self._clients.pop(client.name, None)
            return
        self._delist(client)  # clients that wait stand by the slots that they have
        client.num_running += num_slots
        self._waiting.setdefault(client.num_running, OrderedDict())[client.name] = client

    def _enqueue(self, client: _Client, entry: QueueEntry) -> None:
        if not client.queue:
            self._waiting.setdefault(client.num_running, OrderedDict())[client.name] = client
        client.queue[entry] = None
        entry.is_waiting = True
        self.num_waiting += 1

    def _dequeue(self, client: _Client, entry: QueueEntry, now_s: float) -> None:
        del client.queue[entry]
        entry.is_waiting = False
        self.num_waiting -= 1
        if not client.queue:
            self._delist(client)
        if not self.num_waiting:
            self._emptied_s = now_s

    def _delist(self, client: _Client) -> None:
        group = self._waiting[client.num_running]
        del group[client.name]
        if not group:
            del self._waiting[client.num_running]
