"""Bounds of a JSON Schema before the grammar library compiles it. Pure.

The library follows references and merges by recursion without a bound of its own: a chain of some hundred references overflows the
stack, which ends the process, and some merges and multiples take it seconds or minutes. All that can be told from the schema's text.
"""

import json
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from math import isfinite, lcm
from typing import Any
from urllib.parse import unquote

from meshserve.engines.constraints.keeping import prepare, strip
from meshserve.errors import InvalidRequest, Unsupported

PARAM = "response_format"
"""The field of the API that constraints come in."""
_MOST_CHARACTERS, _MOST_GIVEN_CHARACTERS = 65_536, 1_048_576
"""Without annotations, and with them."""
_MOST_NESTED = 64
_MOST_LEVELS = 512
"""Of all that is referred to, one below the other: each takes at most 5.5 kB of a stack of 8 MB."""
_MOST_VALUES = 200_000
"""What is referred to counts as often as it is: to merge 900 references to 4,000 names takes 3 s."""
_MOST_PROPERTIES = 512
"""Of all objects together. The time grows with the square: 500 take up to 0.1 s, 1,500 take 0.4 s."""
_MOST_MULTIPLE = 10_000
"""In the last digit of all `multipleOf` together: 10,000 takes 50 ms, 1,000,000 takes 13 s."""
_FREE_PATTERNS, _MOST_MERGES = 4, 6
"""To intersect 8 patterns takes 13 ms, each more takes three times as long."""

_DEFINITIONS = ("$defs", "definitions")
_MAPS = frozenset(("properties", "patternProperties", "dependentSchemas", *_DEFINITIONS))
"""Keywords whose values are schemas by name."""
_VALUES = frozenset(("const", "enum", "default", "examples", "example", "required", "type"))
"""Keywords whose values hold no schemas."""
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BRANCHES = frozenset(("anyOf", "oneOf", "$ref"))
_SAY_NOTHING = frozenset(("title", "description", "default", "examples", "$schema", "$id", "$comment", *_DEFINITIONS))

Json = dict[str, Any]


def checked_schema(text: str) -> str:
    """The schema as the library may compile it: without the library's own options and keywords that say nothing.

    Raises InvalidRequest for what is no schema, Unsupported for one that is too large to be kept to; both name :data:`PARAM`.
    """
    _demand(len(text) <= _MOST_GIVEN_CHARACTERS, f"has {len(text)} characters; at most {_MOST_GIVEN_CHARACTERS} are read")
    try:
        root = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest("the schema is not JSON, or nests too deep", param=PARAM) from exc
    _demand(root is not False, "allows no document")
    root = {} if root is True else root
    if not isinstance(root, dict):
        raise InvalidRequest("the schema is an object, true or false", param=PARAM)
    root.pop("x-guidance", None)  # the library would take options from there
    strip(root)
    stripped = json.dumps(root) if len(text) > _MOST_CHARACTERS else text
    words = f"has {len(stripped)} characters besides annotations; at most {_MOST_CHARACTERS} are read"
    _demand(len(stripped) <= _MOST_CHARACTERS, words)
    _Survey(root).check()
    prepare(root)
    return json.dumps(root)


def property_names(schema: Any) -> Iterator[str]:
    """Names of all properties that a parsed schema speaks of, wherever."""
    if isinstance(schema, dict):
        found = schema.get("properties")
        yield from found if isinstance(found, dict) else ()
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from property_names(part)


class _Survey:
    """What the library will go through: the root and, once each, what is referred to from what it goes through."""

    def __init__(self, root: Json) -> None:
        self._root = root
        self._references: Counter[str] = Counter()
        self._multiples: set[int] = set()
        self._num_levels = self._num_values = self._num_properties = self._num_patterns = self._num_merges = 0

    def check(self) -> None:
        self._num_levels = self._visit(self._root, 0)
        sizes: dict[str, int] = {}
        while pending := [reference for reference in self._references if reference not in sizes]:
            for reference in pending:
                before = self._num_values
                self._num_levels += self._visit(_resolved(self._root, reference), 0)
                sizes[reference] = self._num_values - before
                self._check_sizes()
        self._num_values += sum(self._references[reference] * size for reference, size in sizes.items())
        self._check_sizes()
        is_mergeable = self._num_patterns <= _FREE_PATTERNS or self._num_merges <= _MOST_MERGES
        _demand(is_mergeable, "merges too many schemas with patterns by allOf or $ref")
        _demand(lcm(*self._multiples) <= _MOST_MULTIPLE, f"has multipleOf that together have more than {_MOST_MULTIPLE} steps")

    def _check_sizes(self) -> None:
        _demand(self._num_levels <= _MOST_LEVELS, f"nests more than {_MOST_LEVELS} levels, with all that it refers to")
        _demand(self._num_values <= _MOST_VALUES, "is too large, with all that it refers to")
        _demand(self._num_properties <= _MOST_PROPERTIES, f"has more than {_MOST_PROPERTIES} properties")

    def _visit(self, value: Any, nested: int) -> int:
        """Note what this schema, or list or map of schemas, says; returns how many levels it has."""
        _demand(nested <= _MOST_NESTED, f"nests more than {_MOST_NESTED} levels")
        self._num_values += 1
        if isinstance(value, list):
            return 1 + max((self._visit(part, nested + 1) for part in value), default=0)
        if not isinstance(value, dict):
            return 0
        self._note(value, nested)
        num_levels = 0
        for key, part in value.items():
            if key in _VALUES:
                self._num_values += len(part) if isinstance(part, (list, dict)) else 1
            elif key in _MAPS and isinstance(part, dict):
                if key not in _DEFINITIONS:  # those count where they are referred to
                    num_levels = max([num_levels, *(1 + self._visit(found, nested + 2) for found in part.values())])
            else:
                num_levels = max(num_levels, self._visit(part, nested + 1))
        return 1 + num_levels

    def _note(self, schema: Json, nested: int) -> None:
        if schema.get("uniqueItems") is False:
            del schema["uniqueItems"]  # the default, at which the library stumbles
        for key in _COUNTS:
            if isinstance(schema.get(key), float) and schema[key].is_integer():
                schema[key] = int(schema[key])  # 2.0, which is a whole number to JSON Schema and none to the library
        reference, properties, merged, step = map(schema.get, ("$ref", "properties", "allOf", "multipleOf"))
        _demand(not nested or not isinstance(schema.get("$id"), str), "has a $id within, which cannot be followed")
        if isinstance(reference, str):
            _demand(reference == "#" or reference.startswith("#/"), "has references of which only '#' and '#/...' can be followed")
            self._references[reference] += 1
        self._num_properties += len(properties) if isinstance(properties, dict) else 0
        self._num_patterns += sum(isinstance(schema.get(key), str) for key in ("pattern", "format"))
        self._num_merges += len(merged) - 1 if isinstance(merged, list) and merged else 0
        has_others = any(key not in _SAY_NOTHING and key not in _BRANCHES for key in schema)
        self._num_merges += max(0, sum(key in _BRANCHES for key in schema) - 1 + has_others)
        if isinstance(step, (int, float)) and step:  # in units of its last digit: 25 for 2.5
            self._multiples.add(int("".join(map(str, Decimal(repr(step)).as_tuple().digits))) if isinstance(step, float) else abs(step))


def _resolved(root: Json, reference: str) -> Any:
    found: Any = root
    for step in reference.split("/")[1:]:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(name) if isinstance(found, list) and name.isdecimal() else name]
        except (LookupError, TypeError) as exc:
            raise InvalidRequest(f"the schema refers to {reference!r:.60}, which is not there", param=PARAM) from exc
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text} is no number in JSON")
    return value


def _demand(is_kept: bool, words: str) -> None:
    if not is_kept:
        raise Unsupported(f"the schema {words}", param=PARAM)
