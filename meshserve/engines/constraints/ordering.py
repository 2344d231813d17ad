"""A JSON value in the order in which the grammar of its schema writes it. Pure."""

from typing import Any

from meshserve.engines.constraints.keeping import referred

Json = dict[str, Any]

_MOST_FOLLOWED = 64
"""References of a schema that lead to other references, and levels of values that are put in order."""


def in_order(arguments: Any, parameters: Json) -> Any:
    """The same value, as the grammar of this schema writes it: properties in the schema's order, whole numbers without a fraction."""
    return _in_order(arguments, [parameters], parameters, 0)


def _in_order(value: Any, schemas: list[Any], root: Json, level: int) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, (dict, list)) or level > _MOST_FOLLOWED:
        return value
    schemas = _alternatives(schemas, root)
    if isinstance(value, list):
        return [_in_order(part, [_item(schema, at) for schema in schemas], root, level + 1) for at, part in enumerate(value)]
    known: dict[str, list[Any]] = {}
    for schema in schemas:
        properties = schema.get("properties")
        for name, part in properties.items() if isinstance(properties, dict) else ():
            known.setdefault(name, []).append(part)
    rest = [schema.get("additionalProperties") for schema in schemas]
    names = [*(name for name in known if name in value), *(name for name in value if name not in known)]
    return {name: _in_order(value[name], known.get(name, rest), root, level + 1) for name in names}


def _item(schema: Json, at: int) -> Any:
    """What the element at this place must be."""
    first = schema.get("prefixItems")
    return first[at] if isinstance(first, list) and at < len(first) else schema.get("items")


def _alternatives(schemas: list[Any], root: Json) -> list[Json]:
    """These schemas and all that they are made of."""
    found: list[Json] = []
    pending = list(schemas)
    while pending and len(found) < _MOST_FOLLOWED:
        schema = pending.pop(0)
        if isinstance(schema, dict) and schema not in found:
            found.append(schema)
            for key in ("allOf", "anyOf", "oneOf"):
                pending += schema[key] if isinstance(schema.get(key), list) else []
            reference = schema.get("$ref")
            if isinstance(reference, str) and reference.startswith("#"):
                pending.append(referred(root, reference))
    return found
