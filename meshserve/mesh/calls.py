"""Request streams: many calls multiplexed over the channels between peers. No sockets, no clock of its own.

A stream is opened with a deadline, carries items from the one who serves it to the one who opened it, and ends in exactly one
end or error, whatever dies. It is named by its owner's incarnation and a counter. Items of one stream arrive in order, none
lost, none twice; streams are not ordered among each other.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from meshserve.errors import Cancelled, DeadlineExceeded, MeshserveError, Overloaded, PeerLost, ProtocolError, UnknownMethod, from_wire
from meshserve.wire.frames import CANCEL, END, ERROR, ITEM, ITEMS, OPEN, Envelope
from meshserve.wire.messages import Method
from meshserve.wire.structs import Message, plain, read

_log = logging.getLogger(__name__)

CONNECTION_CLOSED, PEER_DIED = "connection closed", "it died"
"""Of the reasons why a stream's peer is lost, those that say that its process is gone. A link that overflowed, was made anew or said
goodbye says no such thing."""


class Wire(Protocol):
    """Where a stream's messages go: a channel, as far as streams know one."""

    peer: str
    is_local: bool
    """It ends in this very process."""
    num_batches: int
    """Grows when what was sent leaves."""

    def send(self, message: Envelope) -> None:
        """Send with all else of this turn, or of a few."""

    def send_soon(self, message: Envelope) -> None:
        """Send with all else of this turn."""


class Sink(Protocol):
    """Who opened a stream. Exactly one of `on_end` and `on_error` is called, last; neither after the stream was cancelled."""

    def on_item(self, item: Any) -> None:
        """The next item. A sink that also has `on_items` is given several at once where they come so."""

    def on_end(self, value: Any) -> None:
        """The stream is complete."""

    def on_error(self, error: MeshserveError) -> None:
        """The stream failed: at the peer, on the way, or at its deadline."""


class IgnoredAnswer:
    """The sink of a call whose answer nobody waits for."""

    def on_item(self, item: Any) -> None:
        pass

    def on_end(self, value: Any) -> None:
        pass

    def on_error(self, error: MeshserveError) -> None:
        pass


_CARRYING = (ITEM, ITEMS)

_NOBODY = IgnoredAnswer()
"""Of a stream that ended. A sink mostly holds its call: if the call held it too, only the collector could free both."""


def _fail(sink: Sink, error: MeshserveError) -> None:
    try:
        sink.on_error(error)
    except Exception:  # a fault of ours: others' streams must end all the same
        _log.exception("an error could not be taken in: %s", error.message)


class OutgoingCall:
    """A stream that this peer opened. Garbage as soon as it ended."""

    __slots__ = ("_table", "_wire", "deadline_s", "method", "peer", "sink", "stream")

    def __init__(self, table: "CallTable", wire: Wire, stream: int, method: Method, deadline_s: float, sink: Sink) -> None:
        self._table, self._wire, self.stream, self.method, self.deadline_s, self.sink = table, wire, stream, method, deadline_s, sink
        self.peer = wire.peer

    def cancel(self) -> None:
        """Tell the peer to stop. Nothing more is called on the sink. Harmless after the end."""
        if self._table.outgoing.pop(self.stream, None) is not None:
            self.sink = _NOBODY
            self._wire.send([CANCEL, self.stream])


class IncomingCall:
    """A stream that a peer opened here. The handler ends it with `end` or `fail`; what comes after that, or after a cancel, is dropped.

    An item that is a list may be added to as long as `wire.num_batches` stays the same.
    """

    __slots__ = ("_table", "body", "deadline_s", "ended_by", "is_open", "method", "on_cancel", "peer", "stream", "wire")

    def __init__(self, table: "CallTable", wire: Wire, stream: int, method: Method, deadline_s: float, body: Any) -> None:
        self._table, self.wire, self.stream, self.method, self.deadline_s, self.body = table, wire, stream, method, deadline_s, body
        self.peer = wire.peer
        self.is_open = True
        self.ended_by = ""
        """What ended the stream if not its handler: `cancel`, `deadline`, `peer lost`, `stop`. Set before `on_cancel` is called."""
        self.on_cancel: Callable[[], None] | None = None
        """Called once if the stream ends by anything but this handler: cancelled, past its deadline, or its owner dead."""

    def send(self, item: Any) -> None:
        """One more item: a message, or plain data."""
        if self.is_open:
            self.wire.send([ITEM, self.stream, item if self.wire.is_local else plain(item)])

    def send_all(self, items: list[Any]) -> None:
        """Several items at once, in order. Not to be changed any more."""
        if not self.is_open:
            return
        if self.wire.is_local and len(items) > 1:
            self.wire.send([ITEMS, self.stream, items])
            return
        for item in items:
            self.send(item)

    def end(self, value: Any = None) -> None:
        """The stream is complete; `value` is its result."""
        if self._close():
            self.wire.send([END, self.stream, value if self.wire.is_local else plain(value)])

    def fail(self, error: MeshserveError) -> None:
        """The stream ends in this error."""
        if self._close():
            self.wire.send([ERROR, self.stream, error.to_wire()])

    def _close(self) -> bool:
        was_open, self.is_open = self.is_open, False
        self._table.incoming.pop((self.peer, self.stream), None)
        self.on_cancel = None  # mostly of something that holds this call
        return was_open

    def abandon(self, ended_by: str, error: MeshserveError | None = None) -> None:
        """End by something else than the handler; its owner is told if there is an error to tell."""
        self.ended_by, on_cancel = ended_by, self.on_cancel
        if error is not None:
            self.fail(error)
        self._close()
        if on_cancel is not None:
            try:
                on_cancel()
            except Exception:  # a fault of ours: others' streams must end all the same
                _log.exception("the end of %s could not be taken in", self.method.name)


Handler = Callable[[IncomingCall], None]


class CallTable:
    """All streams of one peer. Every method takes `now_s` of the same monotonic clock where time matters."""

    def __init__(
        self, max_streams_per_peer: int, describe_peer: Callable[[str], str], on_malformed: Callable[[], None] = lambda: None
    ) -> None:
        self.handlers: dict[str, tuple[Method, Handler]] = {}
        """By the method's name."""
        self.outgoing: dict[int, OutgoingCall] = {}
        self.incoming: dict[tuple[str, int], IncomingCall] = {}
        self._next_stream = 1
        self._max_streams = max_streams_per_peer
        self._describe, self._on_malformed = describe_peer, on_malformed

    def open(self, wire: Wire, method: Method, body: Any, sink: Sink, now_s: float, timeout_s: float) -> OutgoingCall:
        """Open a stream; what comes back goes to the sink, never before this returns."""
        stream = self._next_stream
        self._next_stream += 1
        call = self.outgoing[stream] = OutgoingCall(self, wire, stream, method, now_s + timeout_s, sink)
        wire.send_soon([OPEN, stream, method.name, int(timeout_s * 1000), body if wire.is_local else plain(body)])
        return call

    def received(self, wire: Wire, message: Envelope, now_s: float) -> None:
        """One message about a stream from a peer that said hello."""
        kind = message[0]
        if kind in _CARRYING:  # first, as it is nearly all there is
            call = self.outgoing.get(message[1])
            if call is not None and call.peer == wire.peer:
                try:
                    if kind == ITEM:
                        call.sink.on_item(message[2])
                    else:
                        self._received_all(call, message[2])
                except Exception as error:  # a fault of ours: its stream ends, and nobody else's
                    _log.exception("an item of %s could not be taken in", call.method.name)
                    sink = call.sink
                    call.cancel()
                    _fail(sink, MeshserveError(f"{call.method.name} failed: {type(error).__name__}"))
        elif kind == OPEN:
            self._opened(wire, message, now_s)
        elif kind == CANCEL:
            incoming = self.incoming.get((wire.peer, message[1]))
            if incoming is not None:
                incoming.abandon("cancel")
        else:
            self._answered(wire, kind, message)

    def _received_all(self, call: OutgoingCall, items: list[Any]) -> None:
        on_items = getattr(call.sink, "on_items", None)
        if on_items is not None:
            on_items(items)
            return
        for item in items:
            call.sink.on_item(item)  # nobody's, once the sink has cancelled at one of them

    def _answered(self, wire: Wire, kind: int, message: Envelope) -> None:
        call = self.outgoing.get(message[1])
        if call is None or call.peer != wire.peer:
            return  # late, after a cancel or a deadline; or not meant for us
        del self.outgoing[call.stream]
        sink, call.sink = call.sink, _NOBODY
        if kind == ERROR:
            _fail(sink, from_wire(message[2]))
            return
        value, answer = message[2], call.method.answer
        try:
            if answer is not None and not isinstance(value, Message):  # a message is from this very peer
                value = read(answer, value)
        except ProtocolError as error:
            self._on_malformed()
            _fail(sink, error)
            return
        try:
            sink.on_end(value)
        except Exception as error:  # as above
            _log.exception("the end of %s could not be taken in", call.method.name)
            _fail(sink, MeshserveError(f"{call.method.name} failed: {type(error).__name__}"))

    def _opened(self, wire: Wire, message: Envelope, now_s: float) -> None:
        _, stream, name, timeout_ms, body = message
        served = self.handlers.get(name)
        if served is None:
            wire.send([ERROR, stream, UnknownMethod(f"{name} is not served here").to_wire()])
        elif (wire.peer, stream) in self.incoming:
            wire.send([ERROR, stream, MeshserveError("this stream is open already").to_wire()])
        elif len(self.incoming) >= self._max_streams and self.num_incoming(wire.peer) >= self._max_streams:
            wire.send([ERROR, stream, Overloaded("too many open streams from this peer").to_wire()])
        else:
            method, handler = served
            call = self.incoming[(wire.peer, stream)] = IncomingCall(self, wire, stream, method, now_s + timeout_ms / 1000, body)
            try:
                if method.body is not None and not isinstance(body, Message):  # a message is from this very peer
                    call.body = read(method.body, body)
                handler(call)
            except MeshserveError as error:
                call.fail(error)
            except Exception as error:  # a fault of ours: its stream ends all the same, and so does nobody else's
                _log.exception("%s failed", name)
                call.fail(MeshserveError(f"{name} failed: {type(error).__name__}"))

    def num_incoming(self, peer: str) -> int:
        """Streams that this peer has open here."""
        return sum(owner == peer for owner, _ in self.incoming)

    def num_made(self) -> Counter[str]:
        """Streams that this peer has open, by method."""
        return Counter(call.method.name for call in self.outgoing.values())

    def num_served(self) -> Counter[str]:
        """Streams that are open here, by method."""
        return Counter(call.method.name for call in self.incoming.values())

    def expire(self, now_s: float) -> None:
        """End what is past its deadline, on both sides."""
        for outgoing in [call for call in self.outgoing.values() if call.deadline_s <= now_s]:
            sink = outgoing.sink
            outgoing.cancel()
            _fail(sink, DeadlineExceeded(f"no answer from {self._describe(outgoing.peer)} within the deadline"))
        for incoming in [call for call in self.incoming.values() if call.deadline_s <= now_s]:
            incoming.abandon("deadline", DeadlineExceeded("past the deadline"))

    def peer_lost(self, peer: str, reason: str) -> None:
        """The peer is gone, or its link broke: end all streams with it."""
        for outgoing in [call for call in self.outgoing.values() if call.peer == peer]:
            if self.outgoing.pop(outgoing.stream, None) is not None:
                name, sink, outgoing.sink = self._describe(peer), outgoing.sink, _NOBODY
                _fail(sink, PeerLost(f"{name} was lost: {reason}", peer=name))
        self.peer_stopped_listening(peer, reason)

    def peer_stopped_listening(self, peer: str, reason: str) -> None:
        """Streams that this peer opened have nobody to end for."""
        for incoming in [call for call in self.incoming.values() if call.peer == peer]:
            incoming.abandon(reason)

    def close(self) -> None:
        """End everything: this peer stops."""
        for outgoing in list(self.outgoing.values()):
            sink = outgoing.sink
            outgoing.cancel()
            _fail(sink, Cancelled("this peer is stopping"))
        for incoming in list(self.incoming.values()):
            incoming.abandon("stop", Cancelled("the peer is stopping"))
