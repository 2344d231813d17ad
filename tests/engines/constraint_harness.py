"""Constraints over the dummy model's own vocabulary, schemas with texts that they allow and forbid, and the judge."""

import json
from array import array
from typing import Any

import jsonschema

from meshserve.engines.constraints.constraint import Constraint, ConstraintCompiler, tokens_of
from meshserve.engines.tokenizers import EOS_TOKEN, ByteTokenizer
from tests.engines.dummy_harness import a_request

TOKENIZER = ByteTokenizer()
COMPILER = ConstraintCompiler(
    lambda: [TOKENIZER.token_bytes(token) for token in range(TOKENIZER.vocab_size)], TOKENIZER.eos_tokens, str.encode
)
Case = tuple[Any, list[str], list[str]]

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
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"anyOf": [{"enum": ["cat", "dog"]}, {"type": "null"}]}},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
SHAPES = [
    {"type": "object", "properties": {"kind": {"const": kind}, "size": {"type": "integer"}}, "required": ["kind", "size"]}
    for kind in ("circle", "cube", "cone")
]
CASES: dict[str, Case] = {
    "an object": (
        PERSON,
        ['{"name": "x", "age": 120, "pets": ["cat", null]}', '{"name":"","age":0,"pets":[]}'],
        ['{"name": "x", "age": 121'],
    ),
    "optional properties": (
        {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "number"}, "c": {"type": "boolean"}}},
        ["{}", '{"b": -1.5e3, "c": true}', '{"a": "x", "other": [1, {"deep": null}]}'],
        ['{"a": 1', "[", '"a"'],
    ),
    "nested arrays": (
        {"type": "array", "minItems": 2, "items": {"type": "array", "items": {"type": "number"}, "maxItems": 3}},
        ["[[], [1, 2, 3]]", "[[0.5], [], [-1]]"],
        ["[[1]]", "[[1, 2, 3, ", "[1"],
    ),
    "an enumeration": ({"enum": ["red", "green", 3, None, {"a": [1]}]}, ['"red"', "3", "null", '{"a": [1]}'], ['"blue"', "4", '{"a": [2']),
    "a constant": ({"const": {"grün": "😀"}}, ['{"grün": "😀"}'], ['{"gr"']),
    "a pattern": ({"type": "string", "pattern": "^[A-Z]{2}-\\d{4}$"}, ['"AB-1234"'], ['"A-', '"AB-12345', '"AB-1"']),
    "lengths": ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"äöü"'], ['"a"', '"abcd']),
    "formats": (
        {"type": "array", "prefixItems": [{"type": "string", "format": name} for name in ("date", "ipv4", "uuid")], "minItems": 3},
        ['["2026-01-31", "10.0.0.1", "0b0e3c4e-94fb-4d43-8f5d-2c9e6b1d6f4a"]'],
        ['["2026-13', '["31.1.2026', '["2026-01-31", "256.'],
    ),
    "bounds": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 1000, "multipleOf": 7}, "b": {"type": "number", "exclusiveMinimum": 0.3}},
            "required": ["a", "b"],
        },
        ['{"a": 1001, "b": 0.31}'],
        ['{"a": 1000,', '{"a": 999,', '{"a": 1001, "b": 0.3}'],
    ),
    "a reference to itself": (
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        ['{"value": 1, "next": {"value": 2, "next": null, "children": []}, "children": []}'],
        ['{"value": 1, "next": {"value": 2, "next": null}'],
    ),
    "one of several objects": ({"anyOf": SHAPES}, ['{"kind": "cone", "size": 3}', '{"kind": "cube", "size": 3}'], ['{"kind": "cup"']),
    "exactly one of them": ({"oneOf": SHAPES}, ['{"kind": "circle", "size": 3}'], ['{"kind": "sphere"']),
    "all of several": (
        {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"a": {"minimum": 5}}}]},
        ['{"a": 5}'],
        ['{"a": 4}', "{}"],
    ),
    "a map": ({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1}, ['{"x": 1, "y": 2}'], ["{}", '{"x": "']),
    "several types": ({"type": ["string", "null"]}, ['"x"', "null"], ["1", "t", "{"]),
    "anything": ({}, ['{"a": [1, "x", null]}', "-1.5e-7", "true", '""'], ["nil", "'", "\n"]),
    "the default of uniqueItems": ({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": False}, ["[1, 1]"], ["[3"]),
}


def constraint_of(schema: Any) -> Constraint:
    return COMPILER.compile(json_schema=json.dumps(schema))


def follows(constraint: Constraint, text: str) -> bool:
    """Whether the whole of a text, byte by byte, is an output."""
    return constraint.num_allowed(text.encode()) == len(text.encode()) and EOS_TOKEN in allowed_tokens(all_taken(constraint, text))


def allowed_tokens(constraint: Constraint) -> list[int]:
    return tokens_of(constraint.allowed_mask())


def all_taken(constraint: Constraint, text: str) -> Constraint:
    for byte in text.encode():
        constraint.take(byte)
    return constraint


def text_of(tokens: list[int]) -> str:
    return b"".join(map(TOKENIZER.token_bytes, tokens)).decode()


def check_valid(schema: Any, text: str) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def a_document_request(tokens: "array[int]", request_id: str = "r", num_generated: int = 0, **sampling: Any) -> Any:
    wanted = {"max_tokens": 200, "ignore_eos": False, "json_schema": json.dumps(PERSON)} | sampling
    return a_request(tokens, request_id, num_generated, **wanted)
