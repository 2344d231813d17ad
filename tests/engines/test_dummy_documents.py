"""Documents under a schema: valid whatever is chosen, finite, and a function of the tokens so far."""

import json
from datetime import date, datetime
from datetime import time as time_of_day
from ipaddress import ip_address
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshserve.engines.dummy.documents import WrittenDocument, read_schema
from meshserve.errors import Unsupported
from tests.engines.documents_harness import check_valid, text_of, written


def texts_of(schema: Any, num_seeds: int = 60) -> set[str]:
    texts = {text_of(written(schema, seed)) for seed in range(num_seeds)}
    for text in texts:
        check_valid(schema, text)
    return texts


# --- schemas made up

NAMES = st.sampled_from(["a", "ab", "kind", 'quo"te', "über", "\ud800", "next value"])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.sampled_from([1.0, 0.5, 1e-7]), st.text(max_size=4), NAMES)


def bounds(low: str, high: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    pairs = st.tuples(values, values).map(sorted).map(lambda pair: {low: pair[0], high: pair[1]})
    return st.one_of(st.just({}), values.map(lambda value: {low: value}), values.map(lambda value: {high: value}), pairs)


STRINGS = st.one_of(
    bounds("minLength", "maxLength", st.integers(0, 40)).map(lambda found: {"type": "string", **found}),
    st.sampled_from(["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]).map(
        lambda found: {"type": "string", "format": found}
    ),
)
NUMBERS = st.one_of(
    bounds("minimum", "maximum", st.integers(-500, 500)).map(lambda found: {"type": "integer", **found}),
    bounds("minimum", "exclusiveMaximum", st.floats(-1e6, 1e6)).map(lambda found: {"type": "number", **found}),
    st.tuples(st.sampled_from([1, 2, 7, 0.1, 0.25, 1.5, 12.5]), st.sampled_from(["integer", "number"]), st.integers(-99, 99)).map(
        lambda found: {"type": found[1], "multipleOf": found[0], "exclusiveMinimum": found[2]}
    ),
)
LEAVES = st.one_of(
    STRINGS,
    NUMBERS,
    st.sampled_from(
        [{"type": "boolean"}, {"type": "null"}, {}, True, {"type": "object"}, {"type": ["string", "null"]}, {"$ref": "#/$defs/node"}]
    ),
    st.lists(SCALARS, min_size=1, max_size=5).map(lambda found: {"enum": found}),
    SCALARS.map(lambda found: {"const": found}),
)


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, inner, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    extra: dict[str, Any] = draw(st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "integer"}}]))
    return {"type": "object", "properties": properties, "required": required, **extra}


def compounds(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        objects(inner),
        st.tuples(inner, bounds("minItems", "maxItems", st.integers(0, 4))).map(
            lambda found: {"type": "array", "items": found[0], **found[1]}
        ),
        st.lists(inner, min_size=1, max_size=4).map(lambda found: {"anyOf": found, "description": "one of these"}),
        st.tuples(objects(inner), objects(inner)).map(lambda found: {"allOf": list(found)}),
        st.tuples(objects(inner), st.lists(objects(inner), min_size=1, max_size=2)).map(lambda found: {**found[0], "anyOf": found[1]}),
    )


NODE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
    },
    "required": ["value", "next", "children"],
    "additionalProperties": False,
}
SCHEMAS = st.recursive(LEAVES, compounds, max_leaves=8).map(lambda found: {"$defs": {"node": NODE}, "allOf": [found]})


@settings(max_examples=400, deadline=None)
@given(SCHEMAS, st.integers(0, 2**32))
def test_whatever_is_written_is_valid(schema: dict[str, Any], seed: int) -> None:
    try:
        tokens = written(schema, seed)
    except Unsupported as refused:
        contradictions = ("no document that ends", "cannot be merged", "cannot be kept to its minLength or maxLength")
        assert any(words in refused.message for words in contradictions), refused.message
        return
    check_valid(schema, text_of(tokens))


@settings(max_examples=100, deadline=None)
@given(SCHEMAS, st.integers(0, 2**32), st.integers(0, 100))
def test_what_may_come_next_follows_from_the_tokens_so_far(schema: dict[str, Any], seed: int, stop: int) -> None:
    try:
        tokens = written(schema, seed)
    except Unsupported:
        return
    again = WrittenDocument(read_schema(json.dumps(schema)))
    one = WrittenDocument(read_schema(json.dumps(schema)))
    for token in tokens[:stop]:
        again.take(token)
    for token in tokens[:stop]:
        one.take(token)
    for token in tokens[stop:]:
        assert token in again.candidates()
        assert again.candidates() == one.candidates()
        again.take(token)
        one.take(token)
    assert again.candidates() == ()


@pytest.mark.parametrize(
    ("schema", "some"),
    [
        ({"enum": ["red", "green", 3, None, {"a": [1]}]}, {'"red"', '"green"', "3", "null", '{"a": [1]}'}),
        ({"enum": [1, "1", 2.5, True], "type": ["string", "boolean"]}, {'"1"', "true"}),
        ({"const": "grün"}, {'"grün"'}),
        ({"type": ["boolean", "null"]}, {"true", "false", "null"}),
        ({"type": "integer", "minimum": 7, "maximum": 9}, {"7", "8", "9"}),
        ({"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 9}, {"8"}),
        ({"type": "integer", "multipleOf": 2.5, "minimum": 1, "maximum": 11}, {"5", "10"}),
        ({"type": "number", "minimum": 0.3, "maximum": 0.3}, {"0.3"}),
        ({"type": "array", "items": {"const": 1}, "maxItems": 2}, {"[1]", "[1, 1]"}),
        ({"type": "array", "maxItems": 0}, {"[]"}),
        ({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}, {"[1]", "[2]"}),
        ({"type": "string", "maxLength": 0}, {'""'}),
        ({"properties": {"a": {"const": 1}, "b": {"const": 2}}}, {"{}", '{"a": 1}', '{"b": 2}', '{"a": 1, "b": 2}'}),
        ({"type": "object", "properties": {}}, {"{}"}),
        ({"anyOf": [{"const": {"k": 1}}, {"const": {"k": 2}}, False]}, {'{"k": 1}', '{"k": 2}'}),
        ({"oneOf": [{"type": "null"}, {"enum": [1, 2], "type": "integer"}]}, {"null", "1", "2"}),
        ({"allOf": [{"type": ["integer", "null"]}, {"minimum": 3, "maximum": 5}, {"maximum": 4, "type": "number"}]}, {"3", "4"}),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 5}}}, {"5"}),
        ({"properties": {"a": {"const": 1}}, "required": ["a"], "anyOf": [{"required": ["b"]}, {"required": ["c"]}]}, None),
    ],
)
def test_every_freedom_that_a_small_schema_leaves_is_used(schema: dict[str, Any], some: set[str] | None) -> None:
    texts = texts_of(schema)
    assert len(texts) > 1 if some is None else texts == some


def test_branches_that_begin_alike_are_all_written() -> None:
    branches = [
        {"type": "object", "properties": {"kind": {"const": kind}, "value": {"type": "integer"}}, "required": ["kind", "value"]}
        for kind in ("circle", "cube", "cone")
    ]
    for word in ("anyOf", "oneOf"):
        kinds = {json.loads(text)["kind"] for text in texts_of({word: branches})}
        assert kinds == {"circle", "cube", "cone"}


def test_an_object_of_which_nothing_is_said_is_small_and_not_empty() -> None:
    for text in texts_of({"type": "object"}):
        assert 1 <= len(json.loads(text)) <= 3
    assert len(texts_of({"type": "object"})) > 30
    assert {len(json.loads(text)) for text in texts_of({"type": "object", "additionalProperties": {"type": "integer"}})} >= {1, 2}


FORMATS: dict[str, Any] = {
    "date": date.fromisoformat,
    "time": time_of_day.fromisoformat,
    "date-time": datetime.fromisoformat,
    "ipv4": ip_address,
    "ipv6": ip_address,
    "uuid": UUID,
}


@pytest.mark.parametrize("name", FORMATS)
def test_strings_have_the_format_that_is_asked_for(name: str) -> None:
    texts = texts_of({"type": "string", "format": name})
    assert len(texts) > 5
    for text in texts:
        FORMATS[name](json.loads(text))


def test_what_refers_to_itself_comes_to_an_end() -> None:
    lengths = [len(written({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, seed)) for seed in range(40)]
    assert max(lengths) < 2000
    tree = {"type": "array", "items": {"$ref": "#"}, "minItems": 0}
    assert max(len(written(tree, seed)) for seed in range(40)) < 2000
