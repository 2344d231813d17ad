"""Constraints that will not do, and schemas that are meant to cost more than they should."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from meshserve.engines.constraints.constraint import ConstraintCompiler
from meshserve.engines.constraints.schemas import checked_schema
from meshserve.engines.tokenizers import EOS_TOKEN
from meshserve.errors import InvalidRequest, Unsupported
from tests.engines.constraint_harness import COMPILER, TOKENIZER


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string", "pattern": "^(?=a)"}, "look-around"),
        ({"type": "string", "pattern": "(a)\\1"}, "backreferences"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"properties": {"a": {"if": {}}}}, '"if".*if at #/properties/a$'),
        ({"properties": {"a/b": {"items": {"propertyNames": {"pattern": "x"}}}}}, "propertyNames at #/properties/a~1b/items$"),
        ({"anyOf": [{"not": {}}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"pattern": "(?=a)"}}}, "pattern at #/.defs/a, not at #/anyOf/0$"),
        ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "cannot be told apart; anyOf would do"),
        ({"type": "object", "properties": {"a": {}}, "minProperties": 2}, "min/maxProperties"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "allows no output"),
        ({"enum": [1], "type": "string"}, "allows no output"),
        (False, "allows no document"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "allows no output that ends"),
        ({"$ref": "#", "type": "object"}, "circular references"),
        ({"$ref": "http://example.org/schema"}, "only '#' and '#/...' can be followed"),
        ({"properties": {"a": {"$id": "x"}}}, r"\$id within"),
        ({"x-guidance": {"lenient": True}, "not": {}}, '"not"'),
        ({"type": "integer", "multipleOf": 999983}, "multipleOf"),
        ({"allOf": [{"multipleOf": 9973}, {"type": "integer", "multipleOf": 97}]}, "multipleOf"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_in_words(schema: Any, words: str) -> None:
    with pytest.raises(Unsupported, match=words) as refused:
        COMPILER.compile(json_schema=json.dumps(schema))
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    ("schema", "text", "other"),
    [
        ({"type": "string", "format": "iri"}, '"a"', "1"),
        ({"type": "integer", "format": "int64", "title": "T", "description": "D", "examples": [1], "default": 2, "x-own": {}}, "1", '"a"'),
        ({"type": "object", "propertyNames": {"type": "string"}, "minProperties": 0}, "{}", "1"),
        ({"items": {"$schema": "https://elsewhere/schema", "type": "integer"}, "type": "array"}, "[1]", '["a"]'),
        ({"anyOf": [{"not": {"type": "null"}}, {"type": "integer"}, {"pattern": "(?=a)"}]}, "1", '"a"'),
        ({"anyOf": [{"$ref": "#/$defs/a"}, {"type": "integer"}], "$defs": {"a": {"items": {"contains": {}}}}}, "1", "[]"),
        ({"type": "object", "properties": {"format": {"type": "integer"}, "title": {"type": "integer"}},
          "required": ["format", "title"], "additionalProperties": False}, '{"format": 1, "title": 2}', '{"format": "a", "title": 2}'),
        ({"type": "integer", "description": "x" * 200_000}, "1", '"a"'),
    ],
)  # fmt: skip
def test_what_says_nothing_refuses_nothing_and_a_branch_that_can_be_kept_to_is_enough(schema: Any, text: str, other: str) -> None:
    constraint = COMPILER.compile(json_schema=json.dumps(schema))
    assert constraint.num_allowed(TOKENIZER.encode(text)) == len(text)
    assert constraint.num_allowed(TOKENIZER.encode(other)) < len(other)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 30_000,
        '{"enum": [NaN]}',
        '{"const": 1e999}',
        '{"const": "\\ud800"}',
        '{"minimum": 1' + "0" * 400 + "}",
        "3",
        '"string"',
        '{"type": "text"}',
        '{"type": 3}',
        '{"minLength": -1}',
        '{"minimum": "3"}',
        '{"multipleOf": 0}',
        '{"required": [1]}',
        '{"properties": []}',
        '{"anyOf": [3]}',
        '{"enum": 3}',
        '{"$ref": 3}',
        '{"$ref": "#/$defs/a"}',
        '{"type": "string", "pattern": "("}',
        '{"type": "string", "pattern": ["' + "é" * 80 + '"]}',
    ],
)
def test_what_is_no_schema_is_a_mistake_of_the_client(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        COMPILER.compile(json_schema=text)
    assert not isinstance(refused.value, Unsupported)
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    ("constraint", "error"),
    [
        ({"regex": "("}, InvalidRequest),
        ({"regex": "\ud800"}, InvalidRequest),
        ({"regex": "a(?=b)"}, Unsupported),
        ({"regex": "a" * 20_000}, Unsupported),
        ({"choices": ("\ud800",)}, InvalidRequest),
        ({"choices": ("a",) * 2000}, Unsupported),
        ({"choices": ()}, InvalidRequest),
    ],
)
def test_what_is_no_regular_expression_or_choice_is_refused(constraint: Any, error: type[InvalidRequest]) -> None:
    with pytest.raises(error) as refused:
        COMPILER.compile(**constraint)
    assert type(refused.value) is error


def nested(depth: int, inner: Any, wrap: Any) -> Any:
    for _ in range(depth):
        inner = wrap(inner)
    return inner


def chain(length: int, wrap: Any) -> Any:
    """Definitions each of which refers to the next."""
    steps = {f"d{index}": wrap({"$ref": f"#/$defs/d{index + 1}"}) for index in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": steps | {f"d{length}": {"type": "string"}}}


def hostile_schemas() -> Iterator[tuple[str, Any]]:
    yield "doubling allOf", chain(20, lambda inner: {"allOf": [inner] * 2})
    yield "doubling anyOf", chain(20, lambda inner: {"anyOf": [inner] * 2})
    yield "doubling properties", chain(20, lambda inner: {"properties": dict.fromkeys("ab", inner), "required": ["a", "b"]})
    yield "anyOf of anyOf", nested(3, {"type": "object"}, lambda inner: {"anyOf": [inner] * 8})
    yield "anyOf within properties", nested(3, {"type": "null"}, lambda inner: {"anyOf": [{"properties": {"a": inner}}] * 7})
    yield "deep", nested(60, {"type": "null"}, lambda inner: {"items": inner, "minItems": 1})
    yield "deeper", nested(200, {"type": "null"}, lambda inner: {"items": inner, "minItems": 1})
    yield "wide", {"properties": {f"n{index}": {"type": "integer"} for index in range(1500)}}
    yield "long enum", {"enum": [f"value {index}" for index in range(4000)]}
    yield "long enums, merged", {"allOf": [{"$ref": "#/$defs/e"}] * 60, "$defs": {"e": {"enum": [f"v{i}" for i in range(4000)]}}}
    yield "long required, merged", {"allOf": [{"$ref": "#/$defs/e"}] * 900, "$defs": {"e": {"required": [f"v{i}" for i in range(4000)]}}}
    yield "many numbers", {"properties": {f"n{index}": {"type": "number", "minimum": index % 50} for index in range(400)}}
    yield "many patterns, merged", {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{index}}}"} for index in range(5, 40)]}
    yield "long pattern in brackets", {"type": "string", "pattern": "(" * 20_000 + "a" + ")" * 20_000}
    yield "pattern of repeats", {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"}
    mutual = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{j}"} for j in range(30)]} for i in range(30)}
    yield "all refer to all", {"$ref": "#/$defs/d0", "$defs": {**mutual, "d0": {"anyOf": [{"$ref": "#/$defs/d1"}, {"type": "null"}]}}}
    yield "long reference", {"$ref": "#" + "/a" * 20_000}
    yield "large multiple", {"type": "integer", "multipleOf": 99_999_999}
    for length in (100, 400, 1000):
        yield f"{length} references", chain(length, lambda inner: inner)
        yield f"{length} references in properties", chain(length, lambda inner: {"properties": {"a": inner}})
        yield f"{length} references in items", chain(length, lambda inner: {"items": {"items": {"items": inner}}})


HOSTILE = dict(hostile_schemas())


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_schema_costs_little_whether_it_is_refused_or_not(schema: Any) -> None:
    text, durations = json.dumps(schema), []
    for _ in range(3):
        compiler = ConstraintCompiler(
            lambda: [TOKENIZER.token_bytes(token) for token in range(TOKENIZER.vocab_size)], (EOS_TOKEN,), str.encode
        )
        compiler.compile(choices=("prepared",))
        began = time.thread_time()
        with contextlib.suppress(InvalidRequest):
            compiler.compile(json_schema=text)
        durations.append(time.thread_time() - began)
    assert min(durations) < 0.15


@pytest.mark.parametrize(
    "kind", [lambda inner: inner, lambda inner: {"properties": {"a": inner}}, lambda inner: {"items": {"items": inner}}]
)
def test_chains_of_references_that_would_overflow_the_stack_are_refused_before(kind: Any) -> None:
    checked_schema(json.dumps(chain(100, kind)))
    with pytest.raises(Unsupported, match="levels"):
        checked_schema(json.dumps(chain(600, kind)))


def test_what_only_says_something_of_the_schema_is_left_out_and_the_order_kept() -> None:
    schema = {"x-guidance": {}, "properties": {"b": {"uniqueItems": False}, "a": {"const": {"uniqueItems": False}}}}
    assert checked_schema(json.dumps(schema)) == '{"properties": {"b": {}, "a": {"const": {"uniqueItems": false}}}}'
    assert checked_schema('{"items": {"minLength": 2.0}}') == '{"items": {"minLength": 2}}'
    assert checked_schema("true") == "{}"
