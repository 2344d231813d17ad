"""What waits to be sent to one peer, and the end of a turn of the event loop, when it leaves.

ROUTER gives no back-pressure per peer, so each channel counts the bytes that its reader has not yet
confirmed (byte credit), keeps what exceeds it in a bounded outbox, and is dropped when that
overflows.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from meshserve.config import TransportConfig
from meshserve.wire import frames
from meshserve.wire.frames import CREDIT, Envelope

_log = logging.getLogger(__name__)

_RETRY_S = 0.005
_HOLD_S = 0.0005
_MAX_HELD = 7
"""Turns that items wait for more, if the last message left so lately: an engine without delays has
some for every stream in each turn, and a message costs both sides as much as ten tokens, and the
client's side a write. Calls do not wait."""
_MAX_ROUNDS = 64
"""Of what roles of one peer tell each other, in one turn. A request takes four."""

SendFrame = Callable[[bytes], bool]
"""Hands one frame to a socket without blocking. False: not now. Raises OSError when the other end
is gone."""


class Channel:
    """Bounded, credited sending to one peer. Pure but for the `send_frame` that it is given.

    What is ready in one turn of the event loop is sent as one message.
    """

    def __init__(
        self,
        config: TransportConfig,
        turn: "Turn",
        send_frame: SendFrame,
        on_broken: "Callable[[Channel], None]",
    ) -> None:
        self._config, self._turn, self._send_frame = config, turn, send_frame
        self.on_broken = on_broken
        self.peer = ""
        """Incarnation at the other end, once it said hello."""
        self.link_number = 0
        """Of an inbound connection: how many connections its peer had lost before this one."""
        self.near_address = self.far_address = ""
        """Of this end and of the other one, as this host sees them; empty if not known."""
        self._outbox: list[Envelope] = []
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = self._unconfirmed_bytes = self._unreported_bytes = 0
        self.is_dirty = self.is_broken = False
        self.is_urgent = False
        """Some of what waits should not wait for more."""
        self.num_batches = 0
        """Grows when what was given to `send` leaves; until then, it can still be added to."""

    def send(self, message: Envelope) -> None:
        """Send with all else that is ready at this turn, or at a few. Never blocks, never fails: a
        broken channel is told of by its owner."""
        self._outbox.append(message)
        if not self.is_dirty:
            self._turn.schedule(self)

    def send_soon(self, message: Envelope) -> None:
        """The same for what a request waits for: at the end of this very turn."""
        self.is_urgent = True
        self.send(message)

    def send_last(self, message: Envelope) -> None:
        """Try to send this ahead of all that waits, as the channel is about to be dropped. Nothing
        depends on its arrival."""
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
            self._turn.schedule(self)

    def flush(self) -> bool:
        """Send what credit allows. False: the socket would take no more now, try again soon. Sets
        `is_broken` when the link is lost."""
        self.is_dirty = self.is_urgent = False
        if self._outbox:
            messages, self._outbox = self._outbox, []
            self.num_batches += 1
            self._pack(messages)
        credit_bytes = self._config.credit_bytes
        while self._waiting and self._unconfirmed_bytes < credit_bytes and not self.is_broken:
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

    def _pack(self, messages: list[Envelope]) -> None:
        data = frames.pack(messages)
        if len(data) > self._config.max_batch_bytes and len(messages) > 1:
            middle = len(messages) // 2
            self._pack(messages[:middle])
            self._pack(messages[middle:])
            return
        self._waiting.append(data)
        self._waiting_bytes += len(data)


class Turn:
    """The end of a turn of the event loop: roles of this peer hear what the others told them, then
    what is ready for other peers is sent.

    What one role tells another is delivered first, and what that leads to: a request passes from
    role to role in one turn, and what comes of it leaves with the rest. Nothing is delivered within
    the call that sends it, so that no role is called back by what it calls.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._dirty: list[Channel] = []
        self.told: list[tuple[Callable[[Any], None], Any]] = []
        """What roles told each other in this turn: what takes it in, and the value."""
        self.is_due = False
        """Whether the end of this turn will come to :meth:`flush`; to be made so by :meth:`be_due`."""
        self.num_batches = 0
        """Grows when what roles told each other is delivered; as with channels, until then it can
        be added to."""
        self._is_delivering = False
        self._sent_s, self._num_held = -1.0, 0
        self._afterwards: list[Callable[[], None]] = []
        self._later: list[Callable[[], None]] = []

    # --- what is to be done at the end of the turn

    def deliver(self, take: Callable[[Any], None], value: Any) -> None:
        """Call `take(value)`, in order with all else that this peer's roles tell each other. It
        must not raise."""
        self.told.append((take, value))
        if not self.is_due:
            self.be_due()

    def schedule(self, channel: Channel) -> None:
        """Flush this channel."""
        channel.is_dirty = True
        self._dirty.append(channel)
        if not self.is_due:
            self.be_due()

    def afterwards(self, callback: Callable[[], None]) -> None:
        """Call this once, when the roles have no more to tell each other and what is for other
        peers is sent."""
        self._afterwards.append(callback)
        if not self.is_due:
            self.be_due()

    def later(self, callback: Callable[[], None]) -> None:
        """The same, but after all of those: for what no request waits for."""
        self._later.append(callback)
        if not self.is_due:
            self.be_due()

    def be_due(self) -> None:
        """Have the end of the turn called."""
        self.is_due = True
        self._loop.call_soon(self.flush, True)

    # --- the end of the turn

    def hurry(self) -> None:
        """Send what is ready for other peers now, where nothing more comes in this turn: a turn of
        the loop costs 5 us.

        What this peer's own roles tell each other keeps to the end of the turn.
        """
        if self._dirty and not self.told:
            self.flush()

    def flush(self, is_end_of_turn: bool = False) -> None:
        """Deliver and send what is ready. Called early at the end of a batch of input, where all
        answers to it are known."""
        if self._is_delivering or (is_end_of_turn and not self.is_due):
            return  # what was read in this turn has flushed already
        if self.told:
            self.is_due = True  # what the roles send now leaves with this flush
            self._deliver()
        if is_end_of_turn and self._dirty and self._may_wait():
            self._num_held += 1
            self.be_due()
            return
        self.is_due = False
        if self.told:  # roles that never come to an end: others have their turn
            self.be_due()
        if self._dirty:
            self._send()
        if self._afterwards or self._later:
            self._call_what_is_left()

    def _deliver(self) -> None:
        # Not part of `flush`: the traceback of an error that a callback raises later refers to the
        # frames that called it, and what those frames hold would only be freed by the collector.
        self._is_delivering = True
        try:
            for _ in range(_MAX_ROUNDS):
                if not self.told:
                    return
                told, self.told = self.told, []
                self.num_batches += 1
                for take, value in told:
                    take(value)
        finally:
            self._is_delivering = False

    def _may_wait(self) -> bool:
        """What comes turn by turn, as from an engine without delays, is sent a few turns at a
        time."""
        if self._num_held >= _MAX_HELD or time.monotonic() - self._sent_s >= _HOLD_S:
            return False
        return not any(channel.is_urgent for channel in self._dirty)

    def _send(self) -> None:
        dirty, self._dirty = self._dirty, []
        self._sent_s, self._num_held = time.monotonic(), 0
        for channel in dirty:
            if not channel.flush():
                self._loop.call_later(_RETRY_S, self._retry, channel)
            if channel.is_broken:
                self._afterwards.insert(0, partial(channel.on_broken, channel))

    def _retry(self, channel: Channel) -> None:
        if not channel.is_dirty and not channel.is_broken:
            self.schedule(channel)

    def _call_what_is_left(self) -> None:
        for waiting in (self._afterwards, self._later):
            callbacks = waiting.copy()
            waiting.clear()  # what these callbacks add comes at the end of another turn
            for callback in callbacks:
                try:
                    callback()
                except Exception:  # a fault of ours: what others wait for must come all the same
                    _log.exception("what was left for the end of a turn failed")
