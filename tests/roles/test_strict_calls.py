"""Which calls of strict tools count."""

import json
from typing import Any

import pytest

from meshserve.engines.constraints.ordering import in_order
from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.processor.tools import StrictCalls, call_schema
from meshserve.wire.completion import CompletionRequest

JUDGES = StrictCalls()
PLACE: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "minLength": 1}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NODE: Any = {
    "type": "object",
    "properties": {"value": {"type": "number"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["value", "next"],
    "additionalProperties": False,
}
TAGS: Any = {
    "type": "object",
    "properties": {"tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}}, "mode": {"enum": ["a", "b"]}},
    "required": ["tags"],
    "additionalProperties": False,
    "$defs": {"tag": PLACE},
}


def request_of(*tools: Any, choice: str = "strict") -> CompletionRequest:
    listed = [{"type": "function", "function": tool} for tool in tools]
    messages = [{"role": "user", "content": "hi"}]
    return CompletionRequest("r", "chat", "m", messages=messages, tools=json.dumps(listed), tool_choice=choice)


def tool(parameters: Any, name: str = "f", *, strict: bool = True) -> Any:
    return {"name": name, "parameters": parameters, "strict": strict}


@pytest.mark.parametrize(
    ("parameters", "arguments", "is_valid"),
    [
        (PLACE, {"city": "Rome", "days": 3}, True),
        (PLACE, {"days": 3, "city": "Rome"}, True),
        (PLACE, {"city": 'Zürich \\ "🙂"', "days": 3.0}, True),
        (PLACE, {"city": "Rome", "days": 8}, False),
        (PLACE, {"city": "Rome", "days": "3"}, False),
        (PLACE, {"city": "", "days": 3}, False),
        (PLACE, {"city": "Rome"}, False),
        (PLACE, {"city": "Rome", "days": 3, "more": 1}, False),
        (NODE, {"next": {"next": None, "value": 2}, "value": 1.5}, True),
        (NODE, {"next": {"next": None}, "value": 1.5}, False),
        (TAGS, {"mode": "b", "tags": [{"days": 1, "city": "x"}, {"city": "y", "days": 2}]}, True),
        (TAGS, {"tags": [{"days": 0, "city": "x"}]}, False),
        (TAGS, {"tags": [], "mode": "c"}, False),
        ({"type": "object"}, {"z": 1, "a": [{}]}, True),
        ({"type": "object", "properties": {"a": {"type": "string"}}}, {"z": 1, "a": "x"}, True),
        ({"type": "object", "properties": {}, "additionalProperties": False}, {}, True),
        (PLACE, {"city": "\ud800", "days": 1}, True),
    ],
)
def test_arguments_count_if_they_are_valid_in_whatever_order(parameters: Any, arguments: Any, is_valid: bool) -> None:
    accepts = JUDGES.judge(request_of(tool(parameters), tool(NODE, "other")))
    assert accepts is not None
    assert accepts("f", arguments) is is_valid


def test_tools_that_are_not_strict_take_any_arguments() -> None:
    accepts = JUDGES.judge(request_of(tool(PLACE), tool(PLACE, "free", strict=False)))
    assert accepts is not None
    assert accepts("free", {"x": 1}) and not accepts("f", {"x": 1})


@pytest.mark.parametrize("choice", ["none", "auto", "required", "function"])
def test_only_the_choice_strict_has_calls_judged(choice: str) -> None:
    assert JUDGES.judge(request_of(tool(PLACE), choice=choice)) is None


def test_schemas_that_cannot_be_kept_to_are_refused_by_the_name_of_the_field() -> None:
    for parameters, kind in ((({"not": {}}), Unsupported), ({"properties": {"a": {"pattern": "("}}}, InvalidRequest)):
        with pytest.raises(kind) as caught:
            JUDGES.judge(request_of(tool(parameters)))
        assert caught.value.param == "tools"


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": 5},
        {"properties": {"a": {"type": 5}}},
        {"properties": {"a": {"$ref": "#/$defs/gone"}}},
        {"anyOf": []},
        {"required": 5},
        {"properties": {"a": {"minLength": -1}}},
        {"properties": {"a": {"minimum": 10**400}}},
        {"additionalProperties": False, "required": ["a"]},
    ],
)
def test_a_schema_that_does_not_bind_is_never_refused(parameters: Any) -> None:
    for others in ((), (tool(PLACE, "sound", strict=False),), (tool(PLACE, "bound"),)):
        request = request_of(tool(parameters, strict=False), *others, choice="auto")
        schema = call_schema(request, JUDGES.can_be_kept)
        assert JUDGES.can_be_kept(schema)
        assert "sound" not in schema or "days" in schema, "the others keep their outlines"
    with pytest.raises(InvalidRequest):
        JUDGES.judge(request_of(tool(parameters)))


def test_values_are_put_in_order_however_deep_or_circular_a_schema_is() -> None:
    circular = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a", "properties": {"q": {}, "p": {}}}}}
    assert list(in_order({"p": 1, "z": 2, "q": 3}, circular)) == ["q", "p", "z"]
    deep: Any = 1.0
    for _ in range(200):
        deep = [deep]
    assert in_order(deep, {"items": {"$ref": "#"}}) == deep
