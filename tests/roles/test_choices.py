"""One answer in the making: its items depend on the tokens alone, not on the steps they came in."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.engines.tokenizers import ByteTokenizer
from meshserve.roles.processor.call_formats import MAX_SPACE_CHARACTERS, CallParser, Event
from meshserve.roles.processor.choices import Choice
from meshserve.roles.processor.detokenizing import StopChecker
from meshserve.roles.processor.tools import StrictCalls, call_schema
from meshserve.wire.completion import CompletionRequest, EndItem, TextItem, read_item
from meshserve.wire.structs import replace

token_bytes = ByteTokenizer().token_bytes


def instance(schema: Any, root: Any = None) -> Any:
    """A document that is valid under a schema, of the few keywords that the tests use."""
    root = schema if root is None else root
    if "$ref" in schema:
        found = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[int(part)] if isinstance(found, list) else found[part]
        return instance(found, root)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if "anyOf" in schema:
        return instance(schema["anyOf"][0], root)
    if schema.get("type", "object") == "object":
        return {name: instance(part, root) for name, part in schema.get("properties", {}).items()}
    if schema["type"] == "array":
        return [instance(schema["items"], root)]
    return {"string": "Paris", "integer": 7, "number": 2.5, "boolean": True, "null": None}[schema["type"]]


def split(data: st.DataObject, whole: Sequence[Any]) -> list[Any]:
    """Cut into pieces, somehow."""
    pieces, rest = [], whole
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    return pieces


def arguments_in(events: list[Event]) -> str:
    """What a parser says of a call's arguments."""
    return "".join(event.text for event in events if event.kind == "arguments")


def held_back(events: list[Event]) -> tuple[str, bool]:
    """What a parser says at the end, and whether it is the arguments of a call or text."""
    return "".join(event.text for event in events if event.kind != "call"), any(event.kind == "call" for event in events)


def run(steps: list[Any], **options: Any) -> tuple[list[TextItem], EndItem, int]:
    """What a choice says to these steps: text items, how it ends, tokens counted."""
    said: list[Any] = []
    choice = Choice(said.append, token_bytes, **options)
    wants = options.get("wants_logprobs", False)
    for step in steps:
        if choice.feed(list(step), [(-0.5, ((token, -0.5),)) for token in step] if wants else None):
            break
    end = choice.finish("stop")
    return [item for item in map(read_item, said) if isinstance(item, TextItem)], end, choice.num_tokens


@given(
    st.text("aé€b", max_size=20), st.lists(st.text("aé€b", min_size=1, max_size=3), max_size=2).map(tuple), st.integers(0, 12), st.data()
)
def test_text_stops_and_logprobs_do_not_depend_on_the_steps(text: str, stops: tuple[str, ...], least: int, data: st.DataObject) -> None:
    tokens = list(text.encode())
    options: dict[str, Any] = {"stops": stops, "min_tokens": least, "wants_logprobs": True}
    one_by_one = run([[token] for token in tokens], **options)
    items, end, num_tokens = run(split(data, tokens), **options)
    said = "".join(item.text for item in items)
    assert said == "".join(item.text for item in one_by_one[0]) and (end, num_tokens) == one_by_one[1:]
    entries = [entry for item in items for entry in item.logprobs or []]
    starts = [start for item in items for start in item.offsets or []]
    told = b"".join(entry[0] for entry in entries)
    assert starts == sorted(starts) and told.startswith(said.encode()), "every character comes with its tokens"
    assert text.encode().startswith(told)
    if end.stop is None:
        assert said == text and told == text.encode() and num_tokens == len(tokens)
    else:
        assert num_tokens >= least and told == said.encode() and text[len(said) :].startswith(end.stop)


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3).map(tuple), st.data())
def test_logprobs_never_run_ahead_of_the_text(text: str, stops: tuple[str, ...], data: st.DataObject) -> None:
    said: list[Any] = []
    choice = Choice(said.append, token_bytes, stops=stops, wants_logprobs=True)
    for step in split(data, text.encode()):
        is_over = choice.feed(list(step), [(-0.5, ()) for _ in step])
        items = [item for item in map(read_item, said) if isinstance(item, TextItem)]
        assert sum(len(item.logprobs or []) for item in items) <= len("".join(item.text for item in items))
        if is_over:
            break


@given(st.text("ab", max_size=16), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3).map(tuple), st.integers(0, 16))
def test_no_stop_string_counts_before_its_time(text: str, stops: tuple[str, ...], first: int) -> None:
    """A reader who looks at one character after the other, and minds no stop string that is complete before the `first` one."""
    expected = text
    for end in range(max(1, first), len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            expected = text[: end - max(map(len, matching))]
            break
    checker, given_out = StopChecker(stops), ""
    for place, character in enumerate(text, 1):
        safe, is_stopped = checker.feed(character, place >= first)
        given_out += safe
        if is_stopped:
            break
    assert given_out + ("" if checker.found else checker.finish()) == expected


@given(
    st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers() | st.lists(st.text(max_size=3), max_size=2), max_size=3),
    st.sampled_from([None, 0, 2]),
    st.data(),
)
def test_a_calls_arguments_come_out_as_they_are_whatever_is_in_them(
    arguments: dict[str, Any], indent: int | None, data: st.DataObject
) -> None:
    told = json.dumps(arguments, indent=indent)
    text = f'  {{ "name" : "find_it", "arguments":{told} , "more": {{}} }} trailing'
    parser = CallParser()
    pieces = [arguments_in(parser.feed(piece)) for piece in split(data, text)]
    assert parser.name == "find_it" and "".join(pieces) == told
    assert held_back(parser.finish()) == ("", False)


@pytest.mark.parametrize(
    ("text", "name", "rest"),
    [
        ('{"arguments": {"a": 1}, "name": "late"}', "late", '{"a": 1}'),
        ('{"name": "cut', None, '{"name": "cut'),
        ("no call at all", None, "no call at all"),
        ("[" * 5000, None, "[" * 5000),
        ("", None, ""),
    ],
)
def test_what_has_another_form_is_read_at_its_end_or_given_out_as_text(text: str, name: str | None, rest: str) -> None:
    parser = CallParser()
    assert parser.feed(text) == []
    assert held_back(parser.finish()) == (rest, name is not None) and parser.name == name


@pytest.mark.parametrize("place", range(6))
def test_a_call_with_much_white_space_in_its_head_comes_at_its_end(place: int) -> None:
    parts = ["{", '"name"', ":", '"f"', ", ", '"arguments":', '{"a": 1}}']
    for number, is_late in ((MAX_SPACE_CHARACTERS - 1, False), (300, True), (30_000, True)):
        text = "".join(parts[: place + 1]) + "\n" * number + "".join(parts[place + 1 :])
        for pieces in ([text], list(text)):
            parser = CallParser()
            assert "".join(arguments_in(parser.feed(piece)) for piece in pieces) == ("" if is_late else '{"a": 1}')
            assert held_back(parser.finish()) == (('{"a": 1}', True) if is_late else ("", False)) and parser.name == "f"


def test_a_schema_of_calls_is_a_choice_of_tools_and_keeps_their_references() -> None:
    city = {"type": "object", "properties": {"where": {"$ref": "#/$defs/place"}}, "$defs": {"place": {"type": "string"}}}
    odd = {"type": "object", "properties": {"$ref": {"const": {"$ref": "#/kept"}}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": part}} for name, part in (("city", city), ("odd", odd))]
    asked = CompletionRequest("r", "chat", "m", messages=[], tools=json.dumps(tools), tool_choice="required")
    both = json.loads(call_schema(asked, StrictCalls().can_be_kept))
    assert instance(both) == {"name": "city", "arguments": {"where": "Paris"}}
    one = json.loads(call_schema(replace(asked, tool_choice="function", tool_name="city"), StrictCalls().can_be_kept))
    assert one["properties"]["arguments"]["properties"]["where"] == {"$ref": "#/properties/arguments/$defs/place"}
    other = json.loads(call_schema(replace(asked, tool_choice="function", tool_name="odd"), StrictCalls().can_be_kept))
    assert instance(other) == {"name": "odd", "arguments": {"$ref": {"$ref": "#/kept"}}}
