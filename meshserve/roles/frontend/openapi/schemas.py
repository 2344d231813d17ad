"""JSON Schemas (2020-12) in the words that the parsers use, so that the two can be read side by side. Pure.

As in the parsers, a field that is null is a field that is not there: every `optional_...` takes null.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Schema = dict[str, Any]

MAX_TOKEN_ID = 2**32 - 1
NULL: Schema = {"type": "null"}
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
"""In answers."""


def told(schema: Schema, words: str) -> Schema:
    """The schema with a description."""
    return {**schema, "description": words}


def optional_boolean(default: bool = False) -> Schema:
    """True, false or null."""
    return {"type": ["boolean", "null"], "default": default}


def optional_integer(least: int, most: int, default: int | None = None) -> Schema:
    """A whole number in these bounds, or null."""
    schema: Schema = {"type": ["integer", "null"], "minimum": least, "maximum": most}
    return schema if default is None else {**schema, "default": default}


def optional_number(least: float, most: float, default: float | None = None) -> Schema:
    """A number in these bounds, or null."""
    schema: Schema = {"type": ["number", "null"], "minimum": least, "maximum": most}
    return schema if default is None else {**schema, "default": default}


def optional_string(max_length: int | None = None) -> Schema:
    """Text or null."""
    return {"type": ["string", "null"], **({"maxLength": max_length} if max_length is not None else {})}


def string() -> Schema:
    """Text that is not empty."""
    return {"type": "string", "minLength": 1}


def strings(most: int) -> Schema:
    """One string or several, none of them empty, or null."""
    return either(string(), {"type": "array", "items": string(), "maxItems": most}, NULL)


def array(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """A list."""
    schema: Schema = {"type": "array", "items": items}
    if least:
        schema["minItems"] = least
    return schema if most is None else {**schema, "maxItems": most}


def token_ids(least: int = 0) -> Schema:
    """A list of them."""
    return array({"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}, least)


def record(properties: Mapping[str, Schema], required: Sequence[str] = ()) -> Schema:
    """An object. What else is in it is ignored in requests; in answers, fields are only ever added."""
    return {"type": "object", "properties": dict(properties), **({"required": list(required)} if required else {})}


def whole(properties: Mapping[str, Schema]) -> Schema:
    """An object of an answer: everything is always there."""
    return record(properties, list(properties))


def or_null(schema: Schema) -> Schema:
    """The same, or null."""
    if isinstance(kind := schema.get("type"), str) and "enum" not in schema and "const" not in schema:
        return {**schema, "type": [kind, "null"]}
    return either(schema, NULL)


def either(*schemas: Schema) -> Schema:
    """One of these at least."""
    return {"anyOf": list(schemas)}


def one_of(*values: Any) -> Schema:
    """One of these values."""
    return {"enum": list(values)}


def kind(name: str) -> Schema:
    """What tells records apart."""
    return {"type": "string", "const": name}


def ref(name: str) -> Schema:
    """A schema of the document's own."""
    return {"$ref": f"#/components/schemas/{name}"}


def neutral(fields: Mapping[str, tuple[Any, ...]]) -> dict[str, Schema]:
    """Fields that ask for what is not done here: taken with the values that ask for nothing."""
    return {name: told(one_of(*values, None), "Not done here: other values are refused.") for name, values in fields.items()}


def labels(names: Sequence[str]) -> dict[str, Schema]:
    """Fields that change no answer."""
    return {name: optional_string() for name in names}


def needs_tools(choices: Schema) -> Schema:
    """A rule: there are tools, or the choice among them is one of these."""
    given = {"properties": {"tools": {"type": "array", "minItems": 1}}, "required": ["tools"]}
    return either(given, {"properties": {"tool_choice": choices}})


def needs(field: str, unasked: Schema, other: str, asked: Any = True) -> Schema:
    """A rule: where `field` asks for something, `other` must be given so."""
    given = {"properties": {other: {"const": asked}}, "required": [other]}
    return either(given, {"properties": {field: unasked}})
