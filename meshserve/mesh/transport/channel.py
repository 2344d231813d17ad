"""One direction-pair between two peers: what waits to be sent, and how much the other side has read.

A channel collects what is ready in one turn of the event loop and sends it as one message. ROUTER gives no back-pressure per
peer, so each channel counts the bytes that its reader has not yet confirmed (byte credit), keeps what exceeds it in a bounded
outbox, and is dropped when that overflows.
"""

import contextlib
from collections import deque
from collections.abc import Callable

from meshserve.config import TransportConfig
from meshserve.wire import frames
from meshserve.wire.frames import CREDIT, Envelope

SendFrame = Callable[[bytes], bool]
"""Hands one frame to a socket without blocking. False: not now. Raises OSError when the other end is gone."""


class Channel:
    """Bounded, credited sending to one peer. Pure but for the `send_frame` that it is given."""

    __slots__ = (
        "_config",
        "_outbox",
        "_schedule",
        "_send_frame",
        "_unconfirmed_bytes",
        "_unreported_bytes",
        "_waiting",
        "_waiting_bytes",
        "is_broken",
        "is_dirty",
        "is_local",
        "is_urgent",
        "num_batches",
        "peer",
    )

    def __init__(self, config: TransportConfig, send_frame: SendFrame, schedule: "Callable[[Channel], None]", peer: str = "") -> None:
        self._config, self._send_frame, self._schedule = config, send_frame, schedule
        self.peer = peer
        """Incarnation at the other end, once it said hello."""
        self._outbox: list[Envelope] = []
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = self._unconfirmed_bytes = self._unreported_bytes = 0
        self.is_dirty = self.is_broken = False
        self.is_urgent = False
        """Some of what waits should not wait for more."""
        self.is_local = False
        """It ends in this very process: nothing is packed."""
        self.num_batches = 0
        """Grows when what was given to `send` leaves; until then, it can still be added to."""

    def send(self, message: Envelope) -> None:
        """Send with all else that is ready at this turn. Never blocks, never fails: a broken channel is told of by its owner."""
        self._outbox.append(message)
        if not self.is_dirty:
            self.is_dirty = True
            self._schedule(self)

    def send_soon(self, message: Envelope) -> None:
        """The same for what somebody waits for who could not go on without: at the end of this very turn."""
        self.is_urgent = True
        self.send(message)

    def send_last(self, message: Envelope) -> None:
        """Try to send this ahead of all that waits, as the channel is about to be dropped. Nothing depends on its arrival."""
        with contextlib.suppress(OSError):
            self._send_frame(frames.pack([message]))

    def received(self, num_bytes: int) -> None:
        """Count what came in; the other side is told once a quarter of its credit is used."""
        self._unreported_bytes += num_bytes
        if self._unreported_bytes >= self._config.credit_bytes // 4:
            self.send([CREDIT, self._unreported_bytes])
            self._unreported_bytes = 0

    def credited(self, num_bytes: int) -> None:
        """The other side has read so much."""
        self._unconfirmed_bytes = max(0, self._unconfirmed_bytes - num_bytes)
        if self._waiting and not self.is_dirty:
            self.is_dirty = True
            self._schedule(self)

    def flush(self) -> bool:
        """Send what credit allows. False: the socket would take no more now, try again soon. Sets `is_broken` when the link is lost."""
        self.is_dirty = self.is_urgent = False
        if self._outbox:
            self._pack_outbox()
        while self._waiting and self._unconfirmed_bytes < self._config.credit_bytes and not self.is_broken:
            data = self._waiting[0]
            try:
                if not self._send_frame(data):
                    return False
            except OSError:
                self.is_broken = True
                break
            self._waiting.popleft()
            self._waiting_bytes -= len(data)
            self._unconfirmed_bytes += len(data)
        if self._waiting_bytes > self._config.max_outbox_bytes:
            self.is_broken = True
        return True

    def take_unpacked(self) -> list[Envelope]:
        """What waits, as it is, for a channel that ends in this very process."""
        self.is_dirty = False
        self.num_batches += 1
        messages, self._outbox = self._outbox, []
        return messages

    def _pack_outbox(self) -> None:
        messages, self._outbox = self._outbox, []
        self.num_batches += 1
        data = frames.pack(messages)
        if len(data) > self._config.max_batch_bytes and len(messages) > 1:
            middle = len(messages) // 2
            for half in (messages[:middle], messages[middle:]):
                self._outbox = half
                self._pack_outbox()
            return
        self._waiting.append(data)
        self._waiting_bytes += len(data)
