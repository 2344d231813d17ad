"""Request streams: many calls multiplexed over the channels between peers. No sockets, no clock.

A stream is opened with a deadline, carries items from its handler to its opener, and ends in
exactly one end or error, whatever dies. It is named by its opener's incarnation and a counter.
Items of one stream arrive in order, none lost, none twice; streams have no order among them.

A stream between two roles of one peer keeps the same promises, but nothing is packed or read: each
end calls the other at the end of the turn of the event loop.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from meshserve.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    MeshserveError,
    Overloaded,
    PeerLost,
    ProtocolError,
    UnknownMethod,
    from_wire,
)
from meshserve.mesh.transport.channel import Channel, Turn
from meshserve.telemetry import Counters
from meshserve.wire.frames import CANCEL, END, ERROR, ITEM, OPEN, Envelope
from meshserve.wire.messages import Method
from meshserve.wire.structs import Message, plain, read

_log = logging.getLogger(__name__)

CONNECTION_CLOSED, PEER_DIED, PEER_LEFT = "connection closed", "it died", "it left"
"""Of the reasons why a stream's peer is lost, those that say that its process is gone: the last one with a goodbye.
The others are a link that overflowed or was made anew."""


class Sink(Protocol):
    """Receives what comes back on a stream. Exactly one of `on_end` and `on_error` is called, last;
    neither after the stream was cancelled."""

    def on_item(self, item: Any) -> None:
        """The next item. A sink with `on_items` too is given several at once where they come so."""

    def on_end(self, value: Any) -> None:
        """The stream is complete."""

    def on_error(self, error: MeshserveError) -> None:
        """The stream failed: at the peer, on the way, or at its deadline."""


class IgnoredAnswer:
    """The sink of a call whose answer is not waited for."""

    def on_item(self, item: Any) -> None:
        pass

    def on_end(self, value: Any) -> None:
        pass

    def on_error(self, error: MeshserveError) -> None:
        pass


_NOBODY = IgnoredAnswer()
"""Of a stream that ended. A sink mostly holds its call: if the call held the sink too, only the
garbage collector could free both."""


class OutgoingCall:
    """A stream that this peer opened, to another peer or to itself. Garbage as soon as it ended."""

    def __init__(
        self, table: "CallTable", wire: Channel, stream: int, method: Method, until_s: float, sink: Sink
    ) -> None:
        self._table, self._wire, self.sink = table, wire, sink
        self.stream, self.method, self.deadline_s, self.peer = stream, method, until_s, wire.peer

    def cancel(self) -> None:
        """Tell the peer to stop. Nothing more is called on the sink. Harmless after the end."""
        if self._table.outgoing.pop(self.stream, None) is not None:
            self.sink = _NOBODY
            self._tell_cancelled()

    def _tell_cancelled(self) -> None:
        self._wire.send([CANCEL, self.stream])

    # --- what comes back

    def take_item(self, item: Any) -> None:
        """The next item. Ignored after a cancel."""
        try:
            self.sink.on_item(item)
        except Exception as error:  # a fault of ours: its stream ends, and nobody else's
            self.break_off(error)

    def take_items(self, items: list[Any]) -> None:
        """The next items at once."""
        on_items = getattr(self.sink, "on_items", None)
        try:
            if on_items is not None:
                on_items(items)
            else:
                for item in items:
                    self.sink.on_item(item)  # of no effect, once the sink has cancelled at one of them
        except Exception as error:  # as above
            self.break_off(error)

    def break_off(self, error: Exception) -> None:
        """An item could not be taken in."""
        _log.exception("an item of %s could not be taken in", self.method.name)
        self.give_up(MeshserveError(f"{self.method.name} failed: {type(error).__name__}"))

    def give_up(self, error: MeshserveError) -> None:
        """Cancel at the peer, and tell the sink why."""
        sink = self.sink
        self.cancel()
        _fail(sink, error)

    def take_end(self, value: Any) -> None:
        """The stream is complete. Ignored after a cancel or a deadline."""
        if self._table.outgoing.pop(self.stream, None) is None:
            return
        sink, self.sink, answer = self.sink, _NOBODY, self.method.answer
        if answer is not None and not isinstance(value, Message):  # else from this very peer
            try:
                value = read(answer, value)
            except ProtocolError as error:
                self._table.counters.add("answers_malformed")
                _fail(sink, error)
                return
        try:
            sink.on_end(value)
        except Exception as error:  # as above
            _log.exception("the end of %s could not be taken in", self.method.name)
            _fail(sink, MeshserveError(f"{self.method.name} failed: {type(error).__name__}"))

    def take_error(self, error: MeshserveError) -> None:
        """The stream failed. Ignored after a cancel or a deadline."""
        if self._table.outgoing.pop(self.stream, None) is not None:
            sink, self.sink = self.sink, _NOBODY
            _fail(sink, error)


def _fail(sink: Sink, error: MeshserveError) -> None:
    try:
        sink.on_error(error)
    except Exception:  # a fault of ours: others' streams must end all the same
        _log.exception("an error could not be taken in: %s", error.message)


class IncomingCall:
    """A stream that a peer opened here. The handler ends the stream with `end` or `fail`; what is
    sent after that, or after a cancel, is ignored."""

    is_local = False
    """A role of this very peer opened it: what is sent need not be made plain data."""
    ended_by = ""
    """What ended the stream if not its handler: `cancel`, `deadline`, `stop`, or why the peer was
    lost. Set before `on_cancel` is called."""
    on_cancel: Callable[[], None] | None = None
    """Called once if the stream ends by anything but this handler."""

    def __init__(
        self, table: "CallTable", wire: Channel, stream: int, method: Method, until_s: float, body: Any
    ) -> None:
        self._table, self._send, self.body, self.is_open = table, wire.send, body, True
        self.stream, self.method, self.deadline_s, self.peer = stream, method, until_s, wire.peer
        self.wire: Channel | Turn = wire
        """What is sent leaves with this one's batches."""

    def send(self, item: Any) -> None:
        """One more item: a message, or plain data. A list may be added to until `wire.num_batches`
        grows."""
        if self.is_open:
            self._send([ITEM, self.stream, plain(item)])

    def send_all(self, items: list[Any]) -> None:
        """Several items at once, in order. Not to be changed any more."""
        for item in items:
            self.send(item)

    def end(self, value: Any = None) -> None:
        """The stream is complete; `value` is its result."""
        if self._close():
            self._send([END, self.stream, plain(value)])

    def fail(self, error: MeshserveError) -> None:
        """The stream ends in this error."""
        if self._close():
            self._send([ERROR, self.stream, error.to_wire()])

    def _close(self) -> bool:
        was_open, self.is_open = self.is_open, False
        self._table.incoming.pop((self.peer, self.stream), None)
        self.on_cancel = None  # mostly of something that holds this call
        return was_open

    def begin(self, handler: "Handler") -> None:
        """Hand the call to its handler. A handler that fails ends its own stream, and nobody
        else's."""
        kind = self.method.body
        if not self.is_open:
            return  # cancelled before its turn came, or this peer stops
        try:
            if kind is not None and not isinstance(self.body, Message):  # else from this very peer
                self.body = read(kind, self.body)
            handler(self)
        except MeshserveError as error:
            self.fail(error)
        except Exception as error:
            _log.exception("%s failed", self.method.name)
            self.fail(MeshserveError(f"{self.method.name} failed: {type(error).__name__}"))

    def abandon(self, ended_by: str, error: MeshserveError | None = None) -> None:
        """End by something else than the handler; its owner is told if there is an error to
        tell."""
        self.ended_by, on_cancel = ended_by, self.on_cancel
        if error is not None:
            self.fail(error)
        self._close()
        if on_cancel is not None:
            try:
                on_cancel()
            except Exception:  # a fault of ours: others' streams must end all the same
                _log.exception("the end of %s could not be taken in", self.method.name)


class LocalCall(OutgoingCall, IncomingCall):
    """A stream between two roles of this peer: its opener and its handler have the same object.

    What one of them says is a method of this object that the end of the turn calls, so that neither
    is called back from within its own call.
    """

    is_local = True

    def __init__(
        self, table: "CallTable", stream: int, method: Method, until_s: float, body: Any, sink: Sink
    ) -> None:
        self._table, self.wire, self._turn = table, table.turn, table.turn
        self.stream, self.method, self.deadline_s, self.peer = stream, method, until_s, table.own
        self.body, self.sink, self.is_open = body, sink, True

    def send(self, item: Any) -> None:
        if self.is_open:
            turn = self._turn
            turn.told.append((self.take_item, item))  # `deliver` in line: each token passes here
            if not turn.is_due:
                turn.be_due()

    def send_all(self, items: list[Any]) -> None:
        if len(items) == 1:
            self.send(items[0])
        elif items and self.is_open:
            self._turn.deliver(self.take_items, items)

    def end(self, value: Any = None) -> None:
        if self.is_open:
            # `_close` and `deliver` in line: each request ends three
            self.is_open, self.on_cancel, turn = False, None, self._turn
            del self._table.incoming[self.peer, self.stream]
            turn.told.append((self.take_end, value))
            if not turn.is_due:
                turn.be_due()

    def fail(self, error: MeshserveError) -> None:
        if self._close():
            # A copy, as another peer would get: an error that was raised holds its frames.
            self._turn.deliver(self.take_error, from_wire(error.to_wire()))

    def _tell_cancelled(self) -> None:
        if self.on_cancel is None:  # not begun, mostly: a router must not reserve load that nobody sends
            self.is_open = False
        self._turn.deliver(self.abandon, "cancel")


Handler = Callable[[IncomingCall], None]


class CallTable:
    """All streams of one peer. Where time matters, `now_s` is of the same monotonic clock."""

    def __init__(
        self, own: str, turn: Turn, max_streams: int, name_of: Callable[[str], str], counters: Counters
    ) -> None:
        """`own` is this peer's incarnation; `name_of` gives a peer's name, for people."""
        self.own, self.turn, self.counters = own, turn, counters
        self.handlers: dict[str, tuple[Method, Handler]] = {}
        """By the method's name."""
        self.outgoing: dict[int, OutgoingCall] = {}
        self.incoming: dict[tuple[str, int], IncomingCall] = {}
        self._next_stream = 1
        self._max_streams, self._name_of = max_streams, name_of

    def open(
        self, wire: Channel, method: Method, body: Any, sink: Sink, now_s: float, timeout_s: float
    ) -> OutgoingCall:
        """Open a stream to another peer; what comes back goes to the sink, never before this
        returns."""
        stream = self._next_stream
        self._next_stream += 1
        call = OutgoingCall(self, wire, stream, method, now_s + timeout_s, sink)
        self.outgoing[stream] = call
        wire.send_soon([OPEN, stream, method.name, int(timeout_s * 1000), plain(body)])
        return call

    def open_here(self, method: Method, body: Any, sink: Sink, deadline_s: float) -> OutgoingCall:
        """Open a stream to a role of this peer; the handler is called at the end of this turn."""
        stream = self._next_stream
        self._next_stream += 1
        call = self.outgoing[stream] = LocalCall(self, stream, method, deadline_s, body, sink)
        served = self.handlers.get(method.name)
        if served is None:
            call.fail(UnknownMethod(f"{method.name} is not served here"))
        elif len(self.incoming) >= self._max_streams and self._has_too_many(self.own):
            call.fail(Overloaded("too many open streams from this peer"))
        else:
            self.incoming[self.own, stream] = call
            self.turn.deliver(call.begin, served[1])
        return call

    def received(self, wire: Channel, message: Envelope, now_s: float) -> None:
        """One message about a stream from a peer that said hello."""
        kind = message[0]
        if kind == OPEN:
            self._opened(wire, message, now_s)
        elif kind == CANCEL:
            incoming = self.incoming.get((wire.peer, message[1]))
            if incoming is not None:
                incoming.abandon("cancel")
        else:
            call = self.outgoing.get(message[1])
            if call is None or call.peer != wire.peer:
                return  # late, after a cancel or a deadline; or not meant for us
            if kind == ITEM:  # nearly all there is: without another call
                try:
                    call.sink.on_item(message[2])
                except Exception as error:  # as in `take_item`
                    call.break_off(error)
            elif kind == END:
                call.take_end(message[2])
            else:
                call.take_error(from_wire(message[2]))

    def _opened(self, wire: Channel, message: Envelope, now_s: float) -> None:
        _, stream, name, timeout_ms, body = message
        served = self.handlers.get(name)
        if served is None:
            wire.send([ERROR, stream, UnknownMethod(f"{name} is not served here").to_wire()])
        elif (wire.peer, stream) in self.incoming:
            wire.send([ERROR, stream, MeshserveError("this stream is open already").to_wire()])
        elif len(self.incoming) >= self._max_streams and self._has_too_many(wire.peer):
            wire.send([ERROR, stream, Overloaded("too many open streams from this peer").to_wire()])
        else:
            method, handler = served
            call = IncomingCall(self, wire, stream, method, now_s + timeout_ms / 1000, body)
            self.incoming[wire.peer, stream] = call
            call.begin(handler)

    def _has_too_many(self, peer: str) -> bool:
        return sum(owner == peer for owner, _ in self.incoming) >= self._max_streams

    def num_made(self) -> Counter[str]:
        """Streams that this peer has open, by method."""
        return Counter(call.method.name for call in self.outgoing.values())

    def num_served(self) -> Counter[str]:
        """Streams that are open here, by method."""
        return Counter(call.method.name for call in self.incoming.values())

    def expire(self, now_s: float) -> None:
        """End what is past its deadline, on both sides."""
        for outgoing in [call for call in self.outgoing.values() if call.deadline_s <= now_s]:
            name = self._name_of(outgoing.peer)
            outgoing.give_up(DeadlineExceeded(f"no answer from {name} within the deadline"))
        for incoming in [call for call in self.incoming.values() if call.deadline_s <= now_s]:
            incoming.abandon("deadline", DeadlineExceeded("past the deadline"))

    def peer_lost(self, peer: str, reason: str) -> None:
        """The peer is gone, or its link broke: end all streams with it."""
        for outgoing in [call for call in self.outgoing.values() if call.peer == peer]:
            name = self._name_of(peer)
            outgoing.take_error(PeerLost(f"{name} was lost: {reason}", peer=name))
        self.peer_stopped_listening(peer, reason)

    def peer_stopped_listening(self, peer: str, reason: str, wire: Channel | None = None) -> None:
        """Abandon the streams that this peer opened, or those over this one of its connections."""
        for incoming in [call for call in self.incoming.values() if call.peer == peer]:
            if wire is None or incoming.wire is wire:
                incoming.abandon(reason)

    def close(self) -> None:
        """End everything: this peer stops. Callers first: they must not hear of it as a cancel."""
        for incoming in list(self.incoming.values()):
            incoming.abandon("stop", Draining("the peer is stopping"))
        for outgoing in list(self.outgoing.values()):
            outgoing.give_up(Cancelled("this peer is stopping"))
