"""The parts of a JSON Schema that the engine can enforce, and the schema without the other parts. Pure.

What only annotates never refuses a schema. What cannot be kept to does, unless it stands in one branch of an
`anyOf` that has others: then those are the schema.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

Json = dict[str, Any]

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")
_NEVER_KEPT = frozenset(
    (
        *("propertyNames", "contains", "minContains", "maxContains", "uniqueItems", "dependentRequired"),
        *("dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
        *("not", "if", "then", "else", "$dynamicRef", "$recursiveRef", "$dynamicAnchor"),
    )
)
"""Keywords that the grammar library does not support (llguidance 1.x, `Unimplemented keys`)."""
_LOOK_AROUND, _BACK_REFERENCE = re.compile(r"\(\?<?[=!]"), re.compile(r"\\[1-9]")
_FORMATS = frozenset("date time date-time duration email hostname ipv4 ipv6 uuid uri".split())
"""Formats that the library enforces; any other format is an annotation, as JSON Schema says by default."""
_ANNOTATIONS = frozenset(
    (
        *("title", "description", "examples", "example", "default", "$comment", "deprecated", "readOnly", "writeOnly"),
        *("contentEncoding", "contentMediaType", "contentSchema", "markdownDescription"),
    )
)
_JUDGED = ("not", "if", "then", "else", "contains", "propertyNames")
"""Keywords that hold a schema for a condition, and that are never enforced."""
_SAYING_NOTHING: dict[str, Callable[[Json], bool]] = {
    "format": lambda schema: isinstance(schema["format"], str) and schema["format"] not in _FORMATS,
    "propertyNames": lambda schema: _says_string(schema["propertyNames"]),  # as names are strings: generators write it for every map
    "minProperties": lambda schema: schema["minProperties"] == 0,
}
"""When a keyword allows all that the rest of its schema allows."""
_OUTLINED = frozenset(
    (
        *("type", "enum", "const", "required", "minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum"),
        *("$ref", *_MAPS, "anyOf", "items", "additionalProperties"),
    )
)


def subschemas(schema: Any, path: str = "#") -> Iterator[tuple[str, Json]]:
    """This schema and all within it, each with its place as a JSON pointer. The schema must not nest deep."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    for key in _MAPS:
        parts = schema.get(key)
        for name, part in parts.items() if isinstance(parts, dict) else ():
            yield from subschemas(part, f"{path}/{key}/{_escaped(name)}")
    for key in _LISTS:
        parts = schema.get(key)
        for index, part in enumerate(parts) if isinstance(parts, list) else ():
            yield from subschemas(part, f"{path}/{key}/{index}")
    for key in _SINGLE:
        yield from subschemas(schema.get(key), f"{path}/{key}")


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def strip(root: Json) -> None:
    """Remove annotations, and keywords without effect at their place, at any depth."""
    pending = [root]
    for schema in pending:  # which grows: no recursion, however deep the schema nests
        for key in _ANNOTATIONS.intersection(schema):
            del schema[key]
        for key in [key for key, says_nothing in _SAYING_NOTHING.items() if key in schema and says_nothing(schema)]:
            del schema[key]
        if schema is not root:
            schema.pop("$schema", None)
        pending += _within(schema)


def _within(schema: Json) -> list[Json]:
    """The schemas right within this one."""
    found = [schema[key] for key in (*_SINGLE, *_JUDGED) if key in schema]
    found += [part for key in _MAPS if isinstance(schema.get(key), dict) for part in schema[key].values()]
    found += [part for key in _LISTS if isinstance(schema.get(key), list) for part in schema[key]]
    return [part for part in found if isinstance(part, dict)]


def prepare(root: Json) -> None:
    """Remove branches of `anyOf` that cannot be enforced, if another branch can."""
    bad = _bad_references(root)
    for _, schema in [*subschemas(root)]:
        branches = schema.get("anyOf")
        if isinstance(branches, list):
            schema["anyOf"] = [branch for branch in branches if _is_kept(branch, bad)] or branches


def _says_string(names: Any) -> bool:
    """Whether this schema of a property's name allows any name."""
    if not isinstance(names, dict):
        return names is True
    return names.keys() <= {"type", *_ANNOTATIONS} and names.get("type", "string") == "string"


def _is_kept(schema: Any, bad: set[str]) -> bool:
    return all(not _own_faults(part) and part.get("$ref") not in bad for _, part in subschemas(schema))


def _bad_references(root: Json) -> set[str]:
    """What is referred to and cannot be kept to, or refers to what cannot. Each is walked once, whoever refers to it."""
    referring: dict[str, list[str]] = {}
    bad, pending = list[str](), [("", root)]
    for place, schema in pending:  # which grows
        for _, part in subschemas(schema):
            if _own_faults(part):
                bad.append(place)
            if (reference := _reference(part)) is not None:
                if reference not in referring:
                    pending.append((reference, referred(root, reference)))
                referring.setdefault(reference, []).append(place)
    found = set[str]()
    while bad:
        if (place := bad.pop()) not in found:
            found.add(place)
            bad += referring.get(place, ())
    return found


def _reference(schema: Json) -> str | None:
    reference = schema.get("$ref")
    return reference if isinstance(reference, str) and reference.startswith("#/") else None


def _own_faults(schema: Json) -> list[str]:
    """Keywords of this schema, not of its parts, that cannot be enforced."""
    found = [key for key in schema if key in _NEVER_KEPT] if not _NEVER_KEPT.isdisjoint(schema) else []
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and (_LOOK_AROUND.search(pattern) or _BACK_REFERENCE.search(pattern)):
        found.append("pattern")
    return found


def faults(root: Json) -> Iterator[tuple[str, str]]:
    """Each keyword that cannot be enforced, and its place in the schema or in a schema that it refers to."""
    pending, seen = [("#", root)], set[str]()
    for place, schema in pending:  # which grows
        for path, part in subschemas(schema, place):
            yield from ((key, path) for key in _own_faults(part))
            reference = _reference(part)
            if reference is not None and reference not in seen:
                seen.add(reference)
                pending.append((reference, referred(root, reference)))


def referred(root: Any, reference: str) -> Any:
    """The target of a reference within the schema; None if there is none."""
    place = root
    for part in reference.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        place = place.get(name) if isinstance(place, dict) else None
    return place


def outline(schema: Any) -> Any:
    """The schema's types, names and bounds alone: a hint of what an output looks like, which any output keeps to in part."""
    if not isinstance(schema, dict):
        return schema
    found: Json = {}
    for key, value in {**schema, "anyOf": schema.get("anyOf", schema.get("oneOf"))}.items():
        is_lost = key == "$ref" and not str(value).startswith(("#/$defs/", "#/definitions/"))
        if key not in _OUTLINED or value is None or is_lost:
            continue
        if key in _MAPS and isinstance(value, dict):
            found[key] = {name: outline(part) for name, part in value.items()}
        elif key == "anyOf":
            found[key] = [outline(part) for part in value] if isinstance(value, list) else []
        else:
            found[key] = outline(value) if key in _SINGLE else value
    return found
