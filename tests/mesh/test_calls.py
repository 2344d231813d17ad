"""Request streams: two tables joined in memory."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.errors import DeadlineExceeded, Draining, InvalidRequest, MeshserveError, PeerLost, ProtocolError, UnknownMethod
from meshserve.mesh.calls import CallTable, IncomingCall
from meshserve.mesh.transport.channel import Channel, Turn
from meshserve.telemetry import Counters
from meshserve.wire import frames
from meshserve.wire.frames import Envelope
from meshserve.wire.messages import Method


class Wire(Channel):
    """One direction; what was sent waits for `deliver`."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.sent: list[Envelope] = []

    def send(self, message: Envelope) -> None:
        self.sent.append(message)

    send_soon = send


class EndOfTurn(Turn):
    """What roles of one peer tell each other waits for `come`."""

    def __init__(self) -> None:
        self.told: list[tuple[Callable[[Any], None], Any]] = []
        self.is_due = True

    def come(self) -> None:
        """Everything that is told, and what it leads to."""
        while self.told:
            told, self.told = self.told, []
            for take, value in told:
                take(value)


class Record:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.ends: list[Any] = []

    def on_item(self, item: Any) -> None:
        assert not self.ends
        self.items.append(item)

    def on_end(self, value: Any) -> None:
        self.ends.append(value)

    def on_error(self, error: MeshserveError) -> None:
        self.ends.append(error)


WORK = Method("work")


def table_of(own: str, max_streams: int = 10) -> CallTable:
    return CallTable(own, EndOfTurn(), max_streams, str, Counters())


def local_table() -> tuple[CallTable, EndOfTurn]:
    turn = EndOfTurn()
    return CallTable("self", turn, 10, str, Counters()), turn


class Pair:
    """A caller and a callee."""

    def __init__(self, max_streams: int = 10) -> None:
        self.caller, self.callee = table_of("caller", max_streams), table_of("callee", max_streams)
        self.there, self.back = Wire("callee"), Wire("caller")
        self.served: list[IncomingCall] = []
        self.callee.handlers[WORK.name] = WORK, self.served.append

    def open(self, method: Method = WORK, timeout_s: float = 10.0) -> Record:
        record = Record()
        self.caller.open(self.there, method, {"a": 1}, record, 0.0, timeout_s)
        return record

    def deliver(self, now_s: float = 0.0) -> None:
        """Everything on its way, through the real encoding."""
        while self.there.sent or self.back.sent:
            for table, wire, reply in ((self.callee, self.there, self.back), (self.caller, self.back, self.there)):
                messages, wire.sent = wire.sent, []
                for message in frames.unpack(frames.pack(messages)) if messages else []:
                    table.received(reply, message, now_s)


def test_a_handler_that_breaks_ends_its_own_stream_and_no_other() -> None:
    def broken(call: IncomingCall) -> None:
        raise KeyError("no such thing")

    pair = Pair()
    method = Method("broken")
    pair.callee.handlers[method.name] = method, broken
    failed, record = pair.open(method), pair.open()
    pair.deliver()
    pair.served[0].end("fine")
    pair.deliver()
    (error,) = failed.ends
    assert isinstance(error, MeshserveError) and "KeyError" in error.message
    assert record.ends == ["fine"] and not pair.callee.incoming


class Broken(Record):
    """A sink that cannot take in the one thing."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def on_item(self, item: Any) -> None:
        if self._what == "item":
            raise KeyError("no such thing")

    def on_end(self, value: Any) -> None:
        if self._what == "end":
            raise KeyError("no such thing")


@pytest.mark.parametrize("what", ["item", "end"])
def test_a_sink_that_breaks_ends_its_own_stream_and_no_other(what: str) -> None:
    pair, broken = Pair(), Broken(what)
    pair.caller.open(pair.there, WORK, None, broken, 0.0, 10.0)
    record = pair.open()
    pair.deliver()
    for call in list(pair.served):
        call.send("item")
        call.end("fine")
    pair.deliver()
    (error,) = broken.ends
    assert isinstance(error, MeshserveError) and "KeyError" in error.message
    assert record.items == ["item"] and record.ends == ["fine"]
    assert not pair.caller.outgoing and not pair.callee.incoming


class Batches(Record):
    """A sink that takes several items at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def on_items(self, items: list[Any]) -> None:
        self.sizes.append(len(items))
        self.items += items


@pytest.mark.parametrize("record", [Record(), Batches()])
def test_several_items_between_roles_of_one_peer_are_one_message(record: Record) -> None:
    table, turn = local_table()
    served: list[IncomingCall] = []
    table.handlers[WORK.name] = WORK, served.append
    table.open_here(WORK, None, record, 10.0)
    assert not served
    turn.come()
    served[0].send_all([1, 2, 3])
    served[0].send_all([4])
    assert len(turn.told) == 2 and not record.items
    turn.come()
    assert record.items == [1, 2, 3, 4]
    assert not isinstance(record, Batches) or record.sizes == [3]


def test_a_stream_between_roles_of_one_peer_that_is_cancelled_in_the_turn_that_opened_it_never_begins() -> None:
    (table, turn), record = local_table(), Record()
    served: list[IncomingCall] = []
    table.handlers[WORK.name] = WORK, served.append
    call = table.open_here(WORK, None, record, 10.0)
    call.cancel()
    turn.come()
    assert not served and not record.ends
    assert not table.outgoing and not table.incoming


def test_several_items_for_another_peer_are_messages_that_any_version_reads() -> None:
    pair = Pair()
    record = pair.open()
    pair.deliver()
    pair.served[0].send_all([1, 2])
    assert [message[0] for message in pair.back.sent] == [frames.ITEM, frames.ITEM]
    pair.deliver()
    assert record.items == [1, 2]
    with pytest.raises(ProtocolError):
        frames.unpack(frames.pack([[15, 1, [1, 2]]]))  # the number of several items at once, which no frame may hold


def test_items_come_in_order_and_then_the_end() -> None:
    pair = Pair()
    record = pair.open()
    pair.deliver()
    (call,) = pair.served
    assert call.body == {"a": 1} and call.peer == "caller"
    for number in range(5):
        call.send(number)
    call.end("done")
    call.send("too late")
    call.end("again")
    pair.deliver()
    assert record.items == [0, 1, 2, 3, 4] and record.ends == ["done"]
    assert not pair.caller.outgoing and not pair.callee.incoming


def test_an_error_arrives_as_its_own_class() -> None:
    pair = Pair()
    record = pair.open()
    pair.deliver()
    pair.served[0].fail(InvalidRequest("no such thing", param="thing"))
    pair.deliver()
    (error,) = record.ends
    assert isinstance(error, InvalidRequest) and error.param == "thing"


def test_a_cancel_reaches_the_handler_once_and_silences_the_sink() -> None:
    pair = Pair()
    record = Record()
    outgoing = pair.caller.open(pair.there, WORK, None, record, 0.0, 10.0)
    pair.deliver()
    cancelled: list[str] = []
    pair.served[0].on_cancel = lambda: cancelled.append(pair.served[0].ended_by)
    outgoing.cancel()
    outgoing.cancel()
    pair.served[0].send("on its way")
    pair.deliver()
    assert cancelled == ["cancel"] and record.items == record.ends == []


def test_both_sides_end_a_stream_at_its_deadline() -> None:
    pair = Pair()
    record = pair.open(timeout_s=1.0)
    pair.deliver()
    cancelled: list[str] = []
    pair.served[0].on_cancel = lambda: cancelled.append(pair.served[0].ended_by)
    pair.caller.expire(1.1)
    pair.callee.expire(1.1)
    pair.deliver()
    assert isinstance(record.ends[0], DeadlineExceeded) and len(record.ends) == 1 and cancelled == ["deadline"]


def test_a_lost_peer_ends_the_streams_of_both_directions() -> None:
    pair = Pair()
    record = pair.open()
    pair.deliver()
    reasons: list[str] = []
    pair.served[0].on_cancel = lambda: reasons.append(pair.served[0].ended_by)
    pair.caller.peer_lost("callee", "it died")
    pair.callee.peer_lost("caller", "it died")
    assert isinstance(record.ends[0], PeerLost) and reasons == ["it died"]


@pytest.mark.parametrize("answer", [7, None, {"client": "r"}])
def test_an_answer_that_cannot_be_read_is_counted_and_fails_its_stream_alone(answer: Any) -> None:
    pair = Pair()
    method = Method("count", answer=list[int])
    pair.callee.handlers[method.name] = method, pair.served.append
    unread, other = pair.open(method), pair.open()
    pair.deliver()
    pair.served[0].end(answer)
    pair.served[1].end("fine")
    pair.deliver()
    assert isinstance(unread.ends[0], ProtocolError) and other.ends == ["fine"]
    assert pair.caller.counters.snapshot() == {"answers_malformed": 1}


def test_an_unknown_method_and_too_many_streams_are_refused() -> None:
    pair = Pair(max_streams=2)
    unknown = pair.open(Method("fly"))
    records = [pair.open() for _ in range(3)]
    pair.deliver()
    assert isinstance(unknown.ends[0], UnknownMethod)
    assert [len(record.ends) for record in records] == [0, 0, 1] and records[2].ends[0].code == "overloaded"


def test_what_another_peer_says_about_a_stream_is_ignored() -> None:
    pair = Pair()
    record = pair.open()
    stream = next(iter(pair.caller.outgoing))
    pair.caller.received(Wire("stranger"), [frames.END, stream, "forged"], 0.0)
    pair.caller.received(Wire("stranger"), [frames.ITEM, stream, "forged"], 0.0)
    assert record.ends == record.items == []


def test_closing_a_table_ends_everything() -> None:
    pair = Pair()
    record = pair.open()
    pair.deliver()
    pair.callee.close()
    pair.deliver()
    assert isinstance(record.ends[0], Draining), "what was open may go on elsewhere"


def test_closing_a_table_tells_those_who_asked_before_what_was_asked_for_them_ends() -> None:
    pair, worker = Pair(), Pair()
    record = pair.open()
    pair.deliver()

    class Sequence(Record):
        """Of a request that a peer has asked here, and that is carried out elsewhere."""

        def on_error(self, error: MeshserveError) -> None:
            super().on_error(error)
            pair.served[0].fail(error)

    pair.callee.open(worker.there, WORK, {}, Sequence(), 0.0, 10.0)
    pair.callee.close()
    pair.deliver()
    assert isinstance(record.ends[0], Draining), "it may go on elsewhere"


STEPS = st.lists(st.sampled_from(["item", "end", "fail", "cancel", "deliver", "late", "lose caller", "lose callee"]), max_size=25)


def served_by(call: IncomingCall, step: str, number: int) -> int:
    """What a handler does at this step; how many items it sent."""
    if step == "item" and call.is_open:
        call.send(number)
        return 1
    if step == "end":
        call.end(None)
    elif step == "fail":
        call.fail(InvalidRequest("x"))
    return 0


@given(STEPS)
def test_every_stream_ends_exactly_once_whatever_happens_in_which_order(steps: list[str]) -> None:
    pair = Pair()
    record = Record()
    outgoing = pair.caller.open(pair.there, WORK, None, record, 0.0, 5.0)
    pair.deliver()
    (call,) = pair.served
    sent = 0
    is_cancelled = False
    for step in steps:
        sent += served_by(call, step, sent)
        if step == "cancel":
            is_cancelled |= bool(pair.caller.outgoing)
            outgoing.cancel()
        elif step == "deliver":
            pair.deliver()
        elif step == "late":
            pair.caller.expire(6.0)
            pair.callee.expire(6.0)
        elif step == "lose caller":
            pair.callee.peer_lost("caller", "gone")
        elif step == "lose callee":
            pair.caller.peer_lost("callee", "gone")
    pair.deliver()
    pair.caller.expire(6.0)
    assert len(record.ends) == (0 if is_cancelled else 1)
    assert record.items == list(range(len(record.items)))
    assert not pair.caller.outgoing


@given(STEPS)
def test_a_stream_between_roles_of_one_peer_keeps_the_same_promises_and_never_calls_back_at_once(steps: list[str]) -> None:
    (table, turn), record = local_table(), Record()
    served: list[IncomingCall] = []
    abandoned: list[str] = []
    table.handlers[WORK.name] = WORK, served.append
    outgoing = table.open_here(WORK, None, record, 5.0)
    turn.come()
    (call,) = served
    call.on_cancel = lambda: abandoned.append(call.ended_by)
    sent, is_cancelled = 0, False
    for step in steps:
        heard = len(record.items), len(record.ends), len(abandoned)
        sent += served_by(call, step, sent)
        if step == "cancel":
            is_cancelled |= bool(table.outgoing)
            outgoing.cancel()
        elif step == "late":
            table.expire(6.0)
            continue
        elif step == "deliver":
            turn.come()
            continue
        assert heard == (len(record.items), len(record.ends), len(abandoned))
    turn.come()
    table.expire(6.0)
    turn.come()
    assert len(record.ends) == (0 if is_cancelled else 1) and len(abandoned) <= 1
    assert record.items == list(range(len(record.items)))
    assert not table.outgoing and not table.incoming
