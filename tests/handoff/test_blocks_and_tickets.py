"""What goes over the bulk path, and the prefill worker's list of tickets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.errors import BlockRefused, ProtocolError
from meshserve.handoff.blocks import BlockMark, BlockWindow, BulkHeader, checksum
from meshserve.handoff.tickets import Ticket, TicketList
from meshserve.wire.frames import pack_body, unpack_body


def header_for(payloads: list[bytes]) -> BulkHeader:
    marks = tuple(BlockMark(index, len(payload), checksum(payload)) for index, payload in enumerate(payloads))
    return BulkHeader("decode", "r1", 2, marks, 1.5)


@given(st.lists(st.binary(min_size=1, max_size=64), min_size=1, max_size=5), st.data())
def test_any_flipped_bit_or_missing_byte_is_refused(payloads: list[bytes], data: st.DataObject) -> None:
    header = BulkHeader.from_wire(unpack_body(pack_body(header_for(payloads).to_wire())))
    header.check(payloads)
    which = data.draw(st.integers(0, len(payloads) - 1))
    bit = data.draw(st.integers(0, len(payloads[which]) * 8 - 1))
    flipped = bytearray(payloads[which])
    flipped[bit // 8] ^= 1 << bit % 8
    for bad in (bytes(flipped), payloads[which][:-1]):
        with pytest.raises(BlockRefused):
            header.check([*payloads[:which], bad, *payloads[which + 1 :]])
    with pytest.raises(BlockRefused):
        header.check(payloads[:-1])


@given(st.recursive(st.none() | st.integers() | st.text() | st.binary(), lambda inner: st.lists(inner, max_size=5)))
def test_anything_else_is_no_header_and_no_ticket(data: object) -> None:
    for parse in (BulkHeader.from_wire, Ticket.from_wire):
        try:
            parse(data)
        except ProtocolError:
            continue


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(8, 100), st.randoms())
def test_the_window_is_never_exceeded_and_all_blocks_leave_once_in_order(sizes: list[int], window_bytes: int, rng: object) -> None:
    window = BlockWindow(window_bytes, 4)
    for index, size in enumerate(sizes):
        window.add(index, size, bytes(size))
    sent: list[int] = []
    on_the_way: list[int] = []
    while not window.is_drained:
        taken = window.take()
        on_the_way += [len(payload) for _, payload in taken]
        sent += [mark.index for mark, _ in taken]
        assert len(taken) <= 4 and (sum(on_the_way) <= window_bytes or len(on_the_way) == 1)
        if on_the_way:
            window.acknowledged(on_the_way.pop(0))
    assert sent == list(range(len(sizes))) and window.num_bytes == sum(sizes)


def test_tickets_wait_in_order_bounded_and_once_a_request() -> None:
    tickets = TicketList(2)
    first, second = Ticket("d", "r1", 1, 10), Ticket("d", "r2", 1, 20)
    assert tickets.add(first) and tickets.add(second) and tickets.add(first)
    assert len(tickets) == 2 and tickets.num_tokens == 30
    assert not tickets.add(Ticket("d", "r3", 1, 5)), "full"
    assert tickets.take() == first and tickets.take() == second and tickets.take() is None
    assert tickets.num_tokens == 0


def test_a_struck_ticket_is_gone_and_a_newer_attempt_replaces_an_older_one() -> None:
    tickets = TicketList(4)
    tickets.add(Ticket("d", "r1", 1, 10))
    tickets.add(Ticket("d", "r1", 2, 10))
    assert tickets.add(Ticket("d", "r1", 1, 10)) and len(tickets) == 1
    assert tickets.strike("d", "r1") and not tickets.strike("d", "r1")
    tickets.add(Ticket("other", "r9", 1, 10))
    tickets.add(Ticket("d", "r9", 1, 10))
    tickets.strike_all_of("d")
    assert tickets.take() == Ticket("other", "r9", 1, 10) and len(tickets) == 0
