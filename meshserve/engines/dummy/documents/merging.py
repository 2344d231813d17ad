"""What two schemas allow together, what they have in common, and what a few keywords allow. Pure.

A flat schema is a dictionary whose `type` is a list and whose `const` is an `enum`; without `$ref`, `allOf` and what only annotates.
The schemas within it are as they were written.
"""

import json
from collections.abc import Callable
from fractions import Fraction
from math import lcm
from typing import Any

from meshserve.engines.dummy.documents.keywords import LARGEST_NUMBER, PARAM
from meshserve.errors import Unsupported

Schema = dict[str, Any]

_OF_CONTAINERS = frozenset(("properties", "required", "additionalProperties", "items", "minItems", "maxItems", "uniqueItems"))


def merged(one: Schema | None, other: Schema | None) -> Schema | None:
    """What both allow; None if that is nothing. Raises Unsupported where one schema cannot say it."""
    if one is None or other is None:
        return None
    result = {**one, **other}
    for key in one.keys() & other.keys():
        if key not in _MERGERS:
            if _canonical(one[key]) != _canonical(other[key]):
                raise Unsupported(f"two {key} in one place of the schema cannot be merged", param=PARAM)
            continue
        result[key] = _MERGERS[key](one[key], other[key])
        if result[key] == [] and key in ("type", "enum"):
            return None
    if "properties" in result or "additionalProperties" in result:
        result |= _merged_properties(one, other)
    return result


def admits(schema: Schema, value: Any) -> bool:
    """Whether a value is valid under a flat schema. Raises Unsupported for objects and arrays of which more is asked than their type."""
    if "type" in schema and not any(_is_of_type(value, kind) for kind in schema["type"]):
        return False
    if isinstance(value, (dict, list)):
        if schema.keys() & _OF_CONTAINERS:
            raise Unsupported("an enum of objects or arrays cannot be merged with other keywords", param=PARAM)
        return True
    if isinstance(value, str):
        return bool(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)))
    if isinstance(value, bool) or value is None:
        return True
    return _is_within(schema, value)


def are_disjoint(one: Schema | None, other: Schema | None) -> bool:
    """Whether it is plain that no document is valid under both: by type, by enum, or by a property that both require."""
    if one is None or other is None:
        return True
    if {"anyOf", "oneOf"} & (one.keys() | other.keys()):
        return False
    if "type" in one and "type" in other and not _common_types(one["type"], other["type"]):
        return True
    if "enum" in one and "enum" in other:
        return not _common_values(one["enum"], other["enum"])
    if one.get("type") != ["object"] or other.get("type") != ["object"]:
        return False
    shared = {*one.get("required", [])} & {*other.get("required", [])}
    return any(_are_told_apart_by(one.get("properties", {}).get(name), other.get("properties", {}).get(name)) for name in shared)


def have_no_common_value(schemas: list[Schema | None]) -> bool:
    """Whether all of them are enums, and no value is in two of them."""
    if not all(schema is None or "enum" in schema for schema in schemas):
        return False
    values = [{*map(_canonical, schema["enum"])} for schema in schemas if schema is not None]
    return len(set[str]().union(*values)) == sum(map(len, values))


def _are_told_apart_by(one: Any, other: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    first, second = (found.get("enum", [found["const"]] if "const" in found else None) for found in (one, other))
    return isinstance(first, list) and isinstance(second, list) and not _common_values(first, second)


def with_const(schema: Schema) -> Schema:
    """`const` as the `enum` that it is."""
    rest = {key: value for key, value in schema.items() if key != "const"}
    values = [schema["const"]]
    return {**rest, "enum": _common_values(rest["enum"], values) if "enum" in rest else values}


def _common_types(one: list[str], other: list[str]) -> list[str]:
    found = [name for name in one if name in other or (name == "integer" and "number" in other)]
    return found + [name for name in other if name == "integer" and "number" in one]


def _common_values(one: list[Any], other: list[Any]) -> list[Any]:
    known = {_canonical(value) for value in other}
    return [value for value in one if _canonical(value) in known]


def _canonical(value: Any) -> str:
    """Equal for values that are equal in JSON, where 1 is 1.0 and not true."""
    return json.dumps(_with_whole_numbers(value), sort_keys=True)


def _with_whole_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_with_whole_numbers(found) for found in value]
    if isinstance(value, dict):
        return {key: _with_whole_numbers(found) for key, found in value.items()}
    return value


def _both(one: Any, other: Any) -> Any:
    return one if _canonical(one) == _canonical(other) else {"allOf": [one, other]}


def _common_multiple(one: float, other: float) -> float:
    first, second = Fraction(repr(one)), Fraction(repr(other))
    found = Fraction(
        lcm(first.numerator * second.denominator, second.numerator * first.denominator), first.denominator * second.denominator
    )
    if found > Fraction(LARGEST_NUMBER) or (found.denominator != 1 and found not in (first, second)):
        raise Unsupported("two multipleOf in one place of the schema cannot be merged", param=PARAM)
    return int(found) if found.denominator == 1 else one if found == first else other


_MERGERS: dict[str, Callable[[Any, Any], Any]] = {
    "type": _common_types,
    "enum": _common_values,
    "minimum": max,
    "exclusiveMinimum": max,
    "minLength": max,
    "minItems": max,
    "maximum": min,
    "exclusiveMaximum": min,
    "maxLength": min,
    "maxItems": min,
    "multipleOf": _common_multiple,
    "uniqueItems": max,
    "items": _both,
    "required": lambda one, other: [*dict.fromkeys([*one, *other])],
    "properties": lambda one, other: {**one, **other},
    "additionalProperties": _both,
}


def _merged_properties(one: Schema, other: Schema) -> Schema:
    """Each property under what both say of it, where the one that does not name it says `additionalProperties`."""
    parts = [(found.get("properties", {}), found.get("additionalProperties", True)) for found in (one, other)]
    (first, first_rest), (second, second_rest) = parts
    names = dict.fromkeys([*first, *second])
    properties = {name: _joined(first.get(name, first_rest), second.get(name, second_rest)) for name in names}
    rest = {"additionalProperties": _joined(first_rest, second_rest)}
    return {"properties": properties, **rest} if "properties" in one or "properties" in other else rest


def _joined(one: Any, other: Any) -> Any:
    if one is True or other is False:
        return other
    if other is True or one is False:
        return one
    return _both(one, other)


def _is_of_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, (int, float)):
        return kind == "number" or (kind == "integer" and (isinstance(value, int) or value.is_integer()))
    return kind == {dict: "object", list: "array", str: "string", type(None): "null"}[type(value)]


def _is_within(schema: Schema, value: float) -> bool:
    if value < schema.get("minimum", value) or value > schema.get("maximum", value):
        return False
    if ("exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]) or (
        "exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"]
    ):
        return False
    return "multipleOf" not in schema or _is_multiple(value, schema["multipleOf"])


def _is_multiple(value: float, unit: float) -> bool:
    """As validators see it: they divide doubles, so that 0.3 is no multiple of 0.1."""
    if isinstance(unit, int) and isinstance(value, int):
        return value % unit == 0
    return (value / unit).is_integer()
