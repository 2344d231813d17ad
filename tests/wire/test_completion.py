"""A completion request over the wire: what goes in comes out, and nothing else gets in."""

import math
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.errors import InvalidRequest, ProtocolError, UnknownField
from meshserve.wire.completion import (
    CallItem,
    CompletionRequest,
    Ending,
    EndItem,
    Keep,
    PartItem,
    StartItem,
    TextItem,
    Tokenized,
    TokenizeRequest,
    read_item,
)
from meshserve.wire.frames import pack_body, unpack_body
from meshserve.wire.generation import BOUNDS, GenerateRequest, Sampling, check_bounds
from meshserve.wire.structs import plain

FULL: dict[str, Any] = {
    "request_id": "r",
    "kind": "completion",
    "model": "m",
    "prompt": ("a", array("I", [1, 2])),
    "max_tokens": 5,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "seed": -4,
    "ignore_eos": True,
    "stop": ("x",),
    "n": 2,
    "echo": True,
    "logprobs": 3,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": ((7, -100.0),),
    "repetition_penalty": 1.5,
    "min_p": 0.25,
    "json_schema": "{}",
    "regex": "a+",
    "choices": ("yes", "no"),
    "tools": "[]",
    "tool_choice": "function",
    "tool_name": "f",
    "parallel_tool_calls": False,
    "add_generation_prompt": False,
    "wants_start": True,
    "client_id": "c",
    "origin": "o",
    "wants_receipt": True,
    "policy": "kv",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "session": "alice",
    "keep": Keep("r0", 1_700_000_000, "{}", True),
}


def over_the_wire(data: Any) -> Any:
    return unpack_body(pack_body(data))


def test_every_field_crosses_the_wire_and_defaults_take_no_room() -> None:
    request = CompletionRequest(**FULL)
    assert CompletionRequest.from_wire(over_the_wire(request.to_wire())) == request
    assert FULL.keys() | {"messages"} == set(CompletionRequest.__struct_fields__)
    small = CompletionRequest("r", "chat", "m", messages=[{"role": "user", "content": "hi"}])
    assert small.to_wire().keys() == {"request_id", "kind", "model", "messages"}
    assert CompletionRequest.from_wire(over_the_wire(small.to_wire())) == small


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "essay"},
        {"model": None},
        {"prompt": None},
        {"prompt": []},
        {"prompt": ["a"] * 129},
        {"prompt": [7]},
        {"prompt": b"odd"},
        {"n": 0},
        {"n": 65},
        {"n": True},
        {"logprobs": 21},
        {"max_tokens": -1},
        {"max_tokens": 2**40},
        {"top_p": "1"},
        {"stop": ["x"] * 17},
        {"stop": [""]},
        {"logit_bias": [[1]]},
        {"logit_bias": [["1", 2.0]]},
        {"tool_choice": "perhaps"},
        {"choices": [""]},
        {"choices": ["x"] * 1025},
        {"tools": ""},
        {"echo": 1},
        {"kind": "chat", "messages": []},
        {"kind": "chat", "messages": [{"role": "user", "content": None}]},
        {"kind": "chat", "messages": [{"role": "tool", "content": ""}]},
        {"kind": "chat", "messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}]},
    ],
)
def test_a_request_with_a_malformed_field_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        CompletionRequest.from_wire({**CompletionRequest(**FULL).to_wire(), **change})


def test_a_parameter_of_a_newer_version_is_refused_by_its_name() -> None:
    """Else the answer would be another one than was asked for."""
    request = {**CompletionRequest(**FULL).to_wire(), "top_x": 0.5}
    with pytest.raises(UnknownField, match="does not know top_x"):
        CompletionRequest.from_wire(over_the_wire(request))
    with pytest.raises(UnknownField, match="does not know top_x"):
        TokenizeRequest.from_wire(over_the_wire([request]))
    worker_request = GenerateRequest("r", "m", array("I", [1]), Sampling(temperature=0.5)).to_wire()
    worker_request["a_hint"] = 1
    assert GenerateRequest.from_wire(over_the_wire(worker_request)).sampling == Sampling(temperature=0.5)
    worker_request["sampling"]["top_x"] = 0.5
    with pytest.raises(UnknownField, match="does not know top_x"):
        GenerateRequest.from_wire(over_the_wire(worker_request))


def test_what_is_not_in_bounds_is_refused_by_name_and_the_bounds_themselves_are_not() -> None:
    def sampled(name: str, value: float) -> Sampling:
        values: dict[str, Any] = {name: value}
        return Sampling(**values)

    for name, least, most, _ in BOUNDS:
        for value in (least, most):
            check_bounds(sampled(name, value))
            Sampling.from_wire(over_the_wire(sampled(name, value).to_wire()))
        for value in (least - 1, most + 1, math.nan):
            with pytest.raises(InvalidRequest, match=f"^{name} must be (from|at least|above|below) .*, not {value}$") as refused:
                check_bounds(sampled(name, value))
            assert refused.value.param == name
            with pytest.raises(ProtocolError):
                Sampling.from_wire(over_the_wire({name: value}))


def test_what_is_computed_of_sampling_parameters_neither_travels_nor_counts() -> None:
    sampling = Sampling(temperature=0.5, min_p=0.1, seed=1)
    assert sampling.filters == Sampling(temperature=0.5, min_p=0.1, seed=2).filters != Sampling(temperature=0.5).filters
    assert sampling.to_wire() == {"temperature": 0.5, "min_p": 0.1, "seed": 1}
    assert sampling == Sampling(temperature=0.5, min_p=0.1, seed=1)


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.binary(max_size=4)


@given(st.recursive(SCALARS, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=4), part), max_leaves=8))
def test_whatever_a_peer_says_is_read_or_refused(data: Any) -> None:
    for read in (CompletionRequest.from_wire, read_item, Ending.from_wire, Tokenized.from_wire):
        try:
            read(data)
        except ProtocolError:
            continue


ITEMS: list[Any] = [TextItem(1, "t"), TextItem(0, "t", [[b"t", -1.0, []]], [0]), CallItem(2, "f"), PartItem(1, "reasoning")]
ITEMS += [EndItem(0, "stop", "x"), StartItem(5)]


@pytest.mark.parametrize("item", ITEMS)
def test_items_cross_the_wire(item: Any) -> None:
    assert read_item(over_the_wire(plain(item))) == item


def test_endings_and_tokens_cross_the_wire() -> None:
    ending = Ending("stop", 1, 2, 3, {"peers": {}}, "x")
    assert Ending.from_wire(over_the_wire(ending.to_wire())) == ending
    found = Tokenized(array("I", [1, 2]), 9, "aé".encode(), array("I", [1, 2]))
    assert Tokenized.from_wire(over_the_wire(found.to_wire())).texts() == ["a", "é"]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_tokens": st.integers(1, 99),
            "min_tokens": st.integers(0, 9),
            "temperature": st.sampled_from((0.0, 0.5)),
            "top_p": st.sampled_from((0.9, 1.0)),
            "top_k": st.integers(0, 9),
            "seed": st.integers(-9, 9),
            "ignore_eos": st.booleans(),
            "choice": st.integers(0, 2),
            "presence_penalty": st.sampled_from((0.0, 0.5)),
            "logprobs": st.integers(-1, 3),
            "json_schema": st.sampled_from(("", "{}")),
            "min_p": st.sampled_from((0.0, 0.5)),
            "repetition_penalty": st.sampled_from((1.0, 1.5)),
            "regex": st.sampled_from(("", "a+")),
            "choices": st.sampled_from(((), ("a", "b"))),
        },
    )
)
def test_sampling_crosses_the_wire_whichever_of_its_fields_are_set(values: dict[str, Any]) -> None:
    sampling = Sampling(**values)
    sent = sampling.to_wire()
    assert Sampling.from_wire(over_the_wire(sent)) == sampling
    assert sent.keys() <= values.keys() | {"max_tokens", "seed"}
