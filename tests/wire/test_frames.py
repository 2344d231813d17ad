"""Frames of the call sockets."""

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.errors import ProtocolError
from meshserve.wire import frames
from meshserve.wire.hello import Hello, PeerHint, PeerInfo

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text() | st.binary() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.lists(st.tuples(st.integers(0, 2**40), PLAIN), min_size=1, max_size=5))
def test_what_is_packed_comes_out_again(pairs: list[tuple[int, Any]]) -> None:
    messages: list[frames.Envelope] = [[frames.ITEM, stream, body] for stream, body in pairs]
    assert frames.unpack(frames.pack(messages)) == messages


@given(st.binary(max_size=300) | PLAIN.map(msgpack.packb))
def test_any_other_bytes_are_a_protocol_error_and_nothing_else(data: bytes) -> None:
    try:
        messages = frames.unpack(data)
    except ProtocolError:
        return
    assert all(type(message[0]) is int for message in messages)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [[]],
        {},
        [7],
        [[99, 1]],
        [[frames.ITEM, "1", 2]],
        [[frames.ITEM, 1]],
        [[frames.OPEN, 1, 2, 3, 4]],
        [[True, 1]],
        [[frames.HELLO, []]],
    ],
)
def test_wrong_kinds_lengths_and_types_are_refused(messages: Any) -> None:
    with pytest.raises(ProtocolError):
        frames.unpack(msgpack.packb(messages))


def test_a_hello_survives_the_wire_and_ignores_what_it_does_not_know() -> None:
    peer = PeerInfo("abc", "name", "default", ("decode",), ("10.0.0.1", "fd00::1"), 7800, "1.0")
    hello = Hello(peer, 3.5, (PeerHint("def", ("10.0.0.2",), 7804),), "def", link_number=2)
    data = {**hello.to_wire(), "later": "field"}
    data["peer"] = {**data["peer"], "later": 1, "roles": ["decode", "juggler"]}
    assert Hello.from_wire(data) == hello
    for key in ("protocol", "peer", "age_s", "hints"):
        with pytest.raises(ProtocolError):
            Hello.from_wire({name: value for name, value in hello.to_wire().items() if name != key})
