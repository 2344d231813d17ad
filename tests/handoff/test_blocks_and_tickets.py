"""What goes over the bulk path, and the prefill worker's list of tickets."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.errors import BlockRefused, ProtocolError
from meshserve.handoff.blocks import BURST_S, BlockWindow, Link, RateLimit, began_s, check_blocks, checksum
from meshserve.handoff.queue import TicketList
from meshserve.wire.frames import pack_body, unpack_body
from meshserve.wire.handoff import BlockMark, BulkHeader, Claim, Offer, Ticket


def header_for(payloads: list[bytes]) -> BulkHeader:
    marks = tuple(BlockMark(index, len(payload), checksum(payload)) for index, payload in enumerate(payloads))
    return BulkHeader("decode", "prefill", "r1", 2, marks, 1.5)


def test_offers_and_claims_with_blocks_come_out_as_they_went_in() -> None:
    offered = Ticket("d", "r1", 1, 4, Offer(7, 0, array("I", [1, 2, 3])))
    claim = Claim("r1", header_for([b"a", b"b"]), [b"a", b"b"], 0.5)
    for sent in (offered, Ticket("d", "r1", 1, 4)):
        assert Ticket.from_wire(unpack_body(pack_body(sent.to_wire()))) == sent
    for brought in (claim, Claim("r1")):
        assert Claim.from_wire(unpack_body(pack_body(brought.to_wire()))) == brought
    for bad in (None, [], [claim.header, [1], 0.0], [header_for([]).to_wire(), [1], 0.0], [header_for([]).to_wire(), [], -1.0]):
        with pytest.raises(ProtocolError):
            Claim.from_wire(bad)


def test_what_was_computed_before_its_claim_began_as_long_before_as_it_took_and_its_blocks_were_on_their_way() -> None:
    claim = Claim("r1", BulkHeader("d", "p", "r1", 1, (), 30.0), [], 10.0)
    assert began_s(claim, 100.0, 100.1) == pytest.approx(100.1 - 0.03 - 0.03), "60 ms on the way, half of them back"
    assert began_s(claim, 100.0, 100.01) == pytest.approx(100.0), "never before the ticket left, whatever it says"
    assert began_s(Claim("r1"), 100.0, 100.1) is None


@given(st.lists(st.binary(min_size=1, max_size=64), min_size=1, max_size=5), st.data())
def test_any_flipped_bit_or_missing_byte_is_refused(payloads: list[bytes], data: st.DataObject) -> None:
    header = BulkHeader.from_wire(unpack_body(pack_body(header_for(payloads).to_wire())))
    check_blocks(header, payloads)
    which = data.draw(st.integers(0, len(payloads) - 1))
    bit = data.draw(st.integers(0, len(payloads[which]) * 8 - 1))
    flipped = bytearray(payloads[which])
    flipped[bit // 8] ^= 1 << bit % 8
    for bad in (bytes(flipped), payloads[which][:-1]):
        with pytest.raises(BlockRefused):
            check_blocks(header, [*payloads[:which], bad, *payloads[which + 1 :]])
    with pytest.raises(BlockRefused):
        check_blocks(header, payloads[:-1])


@given(st.recursive(st.none() | st.integers() | st.text() | st.binary(), lambda inner: st.lists(inner, max_size=5)))
def test_anything_else_is_no_header_and_no_ticket(data: object) -> None:
    for parse in (BulkHeader.from_wire, Ticket.from_wire, Offer.from_wire):
        try:
            parse(data)
        except ProtocolError:
            continue


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(8, 100), st.randoms())
def test_the_window_is_never_exceeded_and_all_blocks_leave_once_in_order_in_short_frames(
    sizes: list[int], window_bytes: int, rng: object
) -> None:
    window = BlockWindow(window_bytes, 50, 4, 15, Link())
    for index, size in enumerate(sizes):
        window.add([(index, size, bytes(size))])
    left_of = dict(enumerate(sizes))
    sent: list[int] = []
    on_the_way: list[int] = []
    while window.num_ready or on_the_way:
        marks, payloads = window.take()
        on_the_way += map(len, payloads)
        for mark, payload in zip(marks, payloads, strict=True):
            assert 0 < len(payload) <= 15 and mark.offset == sizes[mark.index] - left_of[mark.index]
            left_of[mark.index] -= len(payload)
            assert mark.left_bytes == left_of[mark.index]
            sent += [] if mark.left_bytes else [mark.index]
        assert len(payloads) <= 1 or sum(map(len, payloads)) <= 50
        assert len(marks) == len(payloads) <= 4 and (sum(on_the_way) <= window_bytes or len(on_the_way) == 1)
        if on_the_way:
            window.acknowledged(on_the_way.pop(0), 0.1)
    assert sent == list(range(len(sizes))) and not any(left_of.values())


def test_tickets_wait_in_order_bounded_and_once_a_request() -> None:
    tickets = TicketList(2)
    first, second = Ticket("d", "r1", 1, 10), Ticket("d", "r2", 1, 20)
    assert tickets.add(first) and tickets.add(second) and tickets.add(first)
    assert tickets.num_waiting == 2
    assert not tickets.add(Ticket("d", "r3", 1, 5)), "full"
    assert tickets.take() == first and tickets.take() == second and tickets.take() is None


def test_a_struck_ticket_is_gone_and_a_newer_attempt_replaces_an_older_one() -> None:
    tickets = TicketList(4)
    tickets.add(Ticket("d", "r1", 1, 10))
    tickets.add(Ticket("d", "r1", 2, 10))
    assert tickets.add(Ticket("d", "r1", 1, 10)) and tickets.num_waiting == 1
    assert tickets.strike("d", "r1") and not tickets.strike("d", "r1")
    tickets.add(Ticket("other", "r9", 1, 10))
    tickets.add(Ticket("d", "r9", 1, 10))
    tickets.strike_all_of("d")
    assert tickets.take() == Ticket("other", "r9", 1, 10) and tickets.num_waiting == 0


def test_one_prompt_of_a_second_decode_worker_does_not_wait_behind_a_hundred_of_the_first() -> None:
    tickets = TicketList(200)
    for number in range(100):
        tickets.add(Ticket("busy", f"r{number}", 1, 1000))
    first = tickets.take()
    assert first is not None and first.decode_peer == "busy"
    tickets.serve("busy", 1000)
    tickets.add(Ticket("other", "r", 1, 1000))
    assert tickets.take() == Ticket("other", "r", 1, 1000)


def test_decode_workers_get_equal_tokens_whatever_their_prompts_sizes_and_none_saves_up_for_later() -> None:
    tickets = TicketList(1000)
    for number in range(300):
        tickets.add(Ticket("long", f"r{number}", 1, 3000))
        tickets.add(Ticket("short", f"r{number}", 1, 1000))
    served = dict.fromkeys(("long", "short", "late"), 0)

    def serve_next() -> None:
        ticket = tickets.take()
        assert ticket is not None
        tickets.serve(ticket.decode_peer, ticket.num_tokens)
        served[ticket.decode_peer] += ticket.num_tokens

    for _ in range(100):
        serve_next()
    assert abs(served["long"] - served["short"]) <= 3000
    for number in range(100):
        tickets.add(Ticket("late", f"r{number}", 1, 1000))
    for _ in range(30):
        serve_next()
    assert served["late"] <= 14_000, "a newcomer gets its share from now on, and not what it missed"


def test_a_second_attempt_does_not_wait_behind_first_ones() -> None:
    tickets = TicketList(9)
    for number in range(3):
        tickets.add(Ticket("d", f"r{number}", 1, 10))
    tickets.add(Ticket("d", "lost", 2, 10))
    assert tickets.take() == Ticket("d", "lost", 2, 10)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(1, 3)), max_size=60), st.data())
def test_the_list_holds_each_request_once_and_counts_right(adds: list[tuple[str, int, int]], data: st.DataObject) -> None:
    tickets = TicketList(8)
    there: dict[tuple[str, str], int] = {}
    for peer, number, attempt in adds:
        key = (peer, f"r{number}")
        is_taken = tickets.add(Ticket(*key, attempt, 10))
        assert is_taken == (key in there or len(there) < 8)
        if is_taken:
            there[key] = max(attempt, there.get(key, 0))
        if data.draw(st.booleans()):
            assert tickets.strike(*key) == (there.pop(key, None) is not None)
        assert tickets.num_waiting == len(there)
    while (ticket := tickets.take()) is not None:
        assert there.pop((ticket.decode_peer, ticket.request_id)) == ticket.attempt
    assert not there


@given(st.lists(st.integers(1, 5_000_000), min_size=2, max_size=60))
def test_a_limited_rate_is_kept_over_any_row_of_messages(sizes: list[int]) -> None:
    limit = RateLimit(1e9)
    now_s = 10.0
    for size in sizes:
        now_s += max(0.0, limit.wait_s(now_s))
        limit.sent(size, now_s)
    assert now_s - 10.0 >= sum(sizes[:-1]) / 1e9 - BURST_S - 1e-9
    assert limit.wait_s(now_s + sizes[-1] / 1e9) <= 0, "who kept to the rate need not wait"
    assert RateLimit(0.0).wait_s(1.0) <= 0
