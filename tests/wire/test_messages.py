"""Every message of every method: what is sent is read, and nothing else is."""

from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.errors import ProtocolError
from meshserve.telemetry import BUCKETS_S
from meshserve.wire import messages
from meshserve.wire.card import FilePartRequest, ModelFile
from meshserve.wire.completion import CompletionRequest, DetokenizeRequest, Ending, PartItem, Tokenized, TokenizeRequest, read_item
from meshserve.wire.frames import pack_body, unpack_body
from meshserve.wire.generation import GenerateRequest, GenerationEnd, Sampling
from meshserve.wire.handoff import Acknowledgement, BlockMark, BulkHeader, Claim, Grant, NamedAttempt, Offer, Renewal, Ticket
from meshserve.wire.hello import NetworkView, PortKnock, PortKnocks
from meshserve.wire.kept import KeptName, KeptResponse
from meshserve.wire.observing import FeedBatch, FeedEvent, PeerStatus
from meshserve.wire.routing import Candidate, InFlightReservation, RouteRequest, RoutingDecision, Share, WorkerLoad, WorkerReport
from meshserve.wire.structs import Message, plain, read, replace

TOKENS = array("I", [1, 2, 2**32 - 1])
CANDIDATE = Candidate("inc", "name", 1, 2, 0.5, 1.5, "the best", 3.5)
HEADER = BulkHeader("d", "p", "r", 1, (BlockMark(0, 3, b"12345678"),), 1.5, "layout", 2**63)
COMPLETION = CompletionRequest("r", "completion", "m", prompt=("text", TOKENS))
SENT: list[Message] = [
    COMPLETION,
    Ending("stop", 1, 2, 3, {"peers": {}}, "x"),
    RouteRequest("r", "m", TOKENS, "kv", "alice", ("inc",)),
    RoutingDecision("router", "kv", [CANDIDATE], []),
    GenerateRequest("r", "m", TOKENS, Sampling(seed=-1, logit_bias=((1, 2.0),)), 1, (("p", 1, 2),), (0.5,), ("lost",)),
    GenerationEnd("length", [0.0]),
    Ticket("d", "r", 1, 3, Offer(1, 0, TOKENS)),
    Claim("r", HEADER, [b"payload"], 0.5),
    Grant(TOKENS, 1, 0),
    Renewal([NamedAttempt("r", 1, 0.0)]),
    Acknowledgement("r", 1, 2**40),
    TokenizeRequest(COMPLETION, True),
    Tokenized(TOKENS, 9, b"abc", array("I", [1, 2])),
    DetokenizeRequest("m", TOKENS),
    WorkerReport(WorkerLoad(num_running=3), (2**64 - 1,), (7,), ("r",), ("r",)),
    WorkerLoad(max_running=2**40 - 1),
    InFlightReservation("r", (Share("w", 1, 2),), "alice"),
    FilePartRequest("0" * 64, 2**40),
    PortKnocks([PortKnock("inc", "10.0.0.1", 7800, 2, "open", "name")]),
    NetworkView(("10.0.0.1/24",), "on", ("inc",), (), 1.5),
    KeptName("0123456789abcdef1"),
    KeptResponse("inc-1", "m", 1_700_000_000, "{}", [{"role": "user", "content": "hi"}], ["text"], Ending("stop", 1, 2, 3)),
    PeerStatus(1.5, {"num_running": 3}, 2, {"tcp://10.0.0.9:7800": "refused"}, histograms={"ttft": (0.5, [1] * (len(BUCKETS_S) + 1))}),
    FeedBatch([FeedEvent(5.0, "routed", "r", {"decode": "inc", "candidates": [{"peer": "name", "cost_ms": 1.5}]})], {"ok": 1}, [1.5]),
]
METHODS = [found for found in vars(messages).values() if isinstance(found, messages.Method)]


@pytest.mark.parametrize("sent", SENT, ids=lambda sent: type(sent).__name__)
def test_a_message_arrives_as_it_was_sent(sent: Message) -> None:
    assert type(sent).from_wire(unpack_body(pack_body(plain(sent)))) == sent
    assert type(sent).from_wire(sent) is sent, "from this very peer"


def test_messages_of_every_method_are_among_those() -> None:
    named = {kind for method in METHODS for kind in (method.body, method.item, method.answer) if isinstance(kind, type)}
    assert {kind for kind in named if issubclass(kind, Message)} <= {type(sent) for sent in SENT}
    assert len({method.name for method in METHODS}) == len(METHODS)


BAD_MS = (float("inf"), float("nan"), -1.0, 1e300)


@pytest.mark.parametrize("ready_ms", BAD_MS)
def test_a_prefill_workers_time_that_no_clock_measures_voids_neither_the_answer_nor_the_request(ready_ms: float) -> None:
    decision = RoutingDecision("router", "kv", [CANDIDATE], [replace(CANDIDATE, ready_ms=ready_ms)])
    found = RoutingDecision.from_wire(unpack_body(pack_body(plain(decision))))
    times_ms = tuple(candidate.ready_ms for candidate in found.prefill)
    request = GenerateRequest("r", "m", TOKENS, Sampling(), 0, (("p", 1, 2),), times_ms)
    assert GenerateRequest.from_wire(unpack_body(pack_body(plain(request)))) == request


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (GenerationEnd, {"reason": "stop\n"}),
        (CompletionRequest, {"request_id": "r", "kind": "chat\n", "model": "m", "prompt": "p"}),
        (PartItem, ["part", 0, "text\n"]),
        (ModelFile, {"name": "tokenizer.json", "size_bytes": 1, "sha256": "a" * 64 + "\n"}),
        (NetworkView, {}),
        (RoutingDecision, {"router": "r", "policy": "kv", "decode": [], "prefill": []}),
    ],
)
def test_what_is_nearly_a_message_is_none(kind: type[Any], data: Any) -> None:
    with pytest.raises(ProtocolError):
        kind.from_wire(data)


def test_an_error_does_not_repeat_all_that_a_peer_said() -> None:
    with pytest.raises(ProtocolError) as raised:
        read_item(["x" * 1_000_000, 0])
    assert len(raised.value.message) <= 200


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4) | st.binary(max_size=4)
PLAIN = st.recursive(SCALARS, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=4), part), max_leaves=8)


@given(PLAIN)
def test_whatever_a_peer_says_is_read_or_refused(data: Any) -> None:
    for method in METHODS:
        for kind in (method.body, method.item, method.answer):
            if kind is not None:
                try:
                    read(kind, data)
                except ProtocolError:
                    continue


@given(st.data())
def test_a_message_with_one_field_of_another_type_is_read_or_refused_with_its_place(draw: st.DataObject) -> None:
    sent = draw.draw(st.sampled_from(SENT))
    data = unpack_body(pack_body(plain(sent)))
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    data[draw.draw(st.sampled_from(keys))] = draw.draw(PLAIN)
    try:
        type(sent).from_wire(data)
    except ProtocolError as error:
        assert error.message.startswith("malformed ") or "token" in error.message
