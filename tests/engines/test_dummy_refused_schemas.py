"""Schemas that will not do, and those that are meant to cost more than they should."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from meshserve.engines.dummy.documents import read_schema
from meshserve.errors import InvalidRequest, Unsupported
from tests.engines.documents_harness import MOST_TOKENS, check_valid, text_of, written


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string", "pattern": "^a+$"}, "'pattern', which this model cannot keep to"),
        ({"type": "string", "format": "iri"}, "format 'iri' is unknown; known are date, time"),
        ({"not": {"type": "string"}}, "'not'"),
        ({"properties": {"a": {"if": {}}}}, "'if'"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "cannot be told apart; anyOf would do"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no document that ends"),
        ({"enum": [1], "type": "string"}, "no document that ends"),
        (False, "no document that ends"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no document that ends"),
        ({"$ref": "#"}, "no document that ends"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "no document that ends"),
        ({"$ref": "#", "type": "object"}, "nests more than 64 levels"),
        ({"$ref": "http://example.org/schema"}, "only '#' and '#/...' can be followed"),
        ({"type": "array", "minItems": 10**9}, "too long"),
        ({"type": "string", "minLength": 10**6}, "too long"),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "minItems": 2}, "uniqueItems"),
        ({"anyOf": [{"type": "null"}] * 65}, "65 branches"),
        ({"properties": {"a": {"$id": "x"}}}, r"\$id within"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_in_words(schema: Any, words: str) -> None:
    with pytest.raises(Unsupported, match=words) as refused:
        read_schema(json.dumps(schema))
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 30_000,
        '{"enum": [NaN]}',
        '{"const": 1e999}',
        "3",
        '"string"',
        '{"type": "text"}',
        '{"type": []}',
        '{"type": 3}',
        '{"minLength": -1}',
        '{"minLength": 1e300}',
        '{"minimum": "3"}',
        '{"minimum": 1e101}',
        '{"multipleOf": 0}',
        '{"required": [1]}',
        '{"properties": []}',
        '{"anyOf": []}',
        '{"anyOf": [3]}',
        '{"items": [{}]}',
        '{"enum": 3}',
        '{"$ref": 3}',
        '{"$ref": "#/$defs/a"}',
        '{"exclusiveMinimum": true, "minimum": 3}',
    ],
)
def test_what_is_no_schema_is_a_mistake_of_the_client(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_schema(text)
    assert refused.value.param == "response_format"


def nested(depth: int, inner: Any, wrap: Any) -> Any:
    for _ in range(depth):
        inner = wrap(inner)
    return inner


def hostile_schemas() -> Iterator[tuple[str, Any]]:
    steps, last = range(20), {"d20": {"type": "string"}}
    doubling = {f"d{index}": {"allOf": [{"$ref": f"#/$defs/d{index + 1}"}] * 2} for index in steps}
    yield "doubling allOf", {"$ref": "#/$defs/d0", "$defs": doubling | last}
    halves = {f"d{index}": {"anyOf": [{"$ref": f"#/$defs/d{index + 1}"}] * 2} for index in steps}
    yield "doubling anyOf", {"$ref": "#/$defs/d0", "$defs": halves | last}
    pair = {
        f"d{index}": {"properties": {name: {"$ref": f"#/$defs/d{index + 1}"} for name in "ab"}, "required": ["a", "b"]} for index in steps
    }
    yield "doubling properties", {"$ref": "#/$defs/d0", "$defs": pair | last}
    optional = {f"d{index}": {"properties": {name: {"$ref": f"#/$defs/d{index + 1}"} for name in "ab"}} for index in steps}
    yield "doubling optional properties", {"$ref": "#/$defs/d0", "$defs": optional | last}
    yield "anyOf of anyOf", nested(3, {"type": "object"}, lambda inner: {"anyOf": [inner] * 8})
    yield "anyOf within properties", nested(3, {"type": "null"}, lambda inner: {"anyOf": [{"properties": {"a": inner}}] * 7})
    yield "deep", nested(60, {"type": "null"}, lambda inner: {"items": inner, "minItems": 1})
    yield "deeper", nested(200, {"type": "null"}, lambda inner: {"items": inner, "minItems": 1})
    yield "wide", {"properties": {f"n{index}": {"type": "integer"} for index in range(1500)}}
    yield "wide and required", {"properties": {f"n{index}": {} for index in range(700)}, "required": [f"n{index}" for index in range(700)]}
    yield "long enum", {"enum": [f"value {index}" for index in range(4000)]}
    yield (
        "long enum, often",
        {"anyOf": [{"$ref": "#/$defs/e", "type": "string"}] * 60, "$defs": {"e": {"enum": [f"v{i}" for i in range(4000)]}}},
    )
    yield "long enums, merged", {"allOf": [{"$ref": "#/$defs/e"}] * 60, "$defs": {"e": {"enum": [f"v{i}" for i in range(4000)]}}}
    yield "long required, merged", {"allOf": [{"$ref": "#/$defs/e"}] * 900, "$defs": {"e": {"required": [f"v{i}" for i in range(4000)]}}}
    yield "deep enum", {"allOf": [{"$ref": "#/$defs/e"}] * 60, "$defs": {"e": {"enum": [nested(150, 1, lambda inner: [inner, inner][:1])]}}}
    yield "many constants", {"oneOf": [{"const": index} for index in range(64)]}
    kinds = [{"type": "object", "properties": {"k": {"const": f"k{index}"}}, "required": ["k"]} for index in range(64)]
    yield "many kinds", {"oneOf": kinds}
    yield "some kinds", {"oneOf": kinds[:30]}
    yield "narrow numbers", {"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1e-300} for _ in range(64)]}
    for number in (90, 200):
        huge = {f"n{index}": {"type": "integer", "minimum": 10**99 + index, "multipleOf": 7} for index in range(number)}
        yield f"{number} huge numbers", {"properties": huge}
        tiny = {f"n{index}": {"minimum": 1e99, "maximum": 1e99, "multipleOf": (1 + index) * 1e-99} for index in range(number)}
        yield f"{number} tiny multiples", {"properties": tiny}
    yield "many numbers", {"properties": {f"n{index}": {"type": "number", "minimum": index % 50} for index in range(400)}}
    back = {"anyOf": [{"type": "null"}, *[{"$ref": "#" + "/items" * depth} for depth in range(0, 40, 3)]]}
    yield "many ways back", nested(40, back, lambda inner: {"type": "array", "items": inner, "minItems": 1})
    mutual = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{j}"} for j in range(30)]} for i in range(30)}
    yield "all refer to all", {"$ref": "#/$defs/d0", "$defs": {**mutual, "d0": {"anyOf": [{"$ref": "#/$defs/d1"}, {"type": "null"}]}}}
    yield "long reference", {"$ref": "#" + "/a" * 20_000}


HOSTILE = dict(hostile_schemas())


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_schema_costs_little_and_its_documents_are_bounded(schema: Any) -> None:
    text = json.dumps(schema)
    durations = []
    for _ in range(5):
        began = time.thread_time()
        try:
            read_schema.__wrapped__(text)
            is_read = True
        except (Unsupported, InvalidRequest):
            is_read = False
        durations.append(time.thread_time() - began)
    assert min(durations) < 0.010
    if is_read:
        read_schema(text)  # once more, to be kept
        began = time.thread_time()
        tokens = written(schema)
        assert len(tokens) < MOST_TOKENS
        assert (time.thread_time() - began) / len(tokens) < 0.001
        check_valid(schema, text_of(tokens))
