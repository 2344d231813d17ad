"""JSON Schemas (2020-12) of the structs: those that `msgspec` makes, with null for what is left out and with the rules. Pure."""

from collections.abc import Iterable, Iterator
from typing import Any

from msgspec import json

from meshserve.roles.frontend.models.common import Body, Schema, either, given, only_with
from meshserve.roles.frontend.models.fields import Handling

_ROOT = "#/components/schemas/"
_NULL: Schema = {"type": "null"}
REFUSED, IGNORED = "Not supported: other values are refused.", "Ignored."


def name_of(kind: str) -> str:
    """What the document calls a struct: the body of a request is a request there."""
    return kind.removesuffix("Body") + "Request" if kind.endswith("Body") else kind


def components(kinds: Iterable[type[Body]]) -> dict[str, Schema]:
    """Schemas of these structs and of all that are in them, by name."""
    _, made = json.schema_components(kinds, ref_template=_ROOT + "{name}")
    bodies = {body.__name__: body for body in _subclasses(Body)}
    for name, schema in made.items():
        if name in bodies:
            _complete(schema, bodies[name])
    return {name_of(name): _tidied(schema) for name, schema in made.items()}


def _subclasses(kind: type[Body]) -> Iterator[type[Body]]:
    for found in kind.__subclasses__():
        yield found
        yield from _subclasses(found)


def _complete(schema: Schema, kind: type[Body]) -> None:
    """What a field is that may be left out, and what the struct's own words add."""
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        if name not in required:
            schema["properties"][name] = _or_null(field)
    for name, how in kind.OTHERS.items():
        schema["properties"][name] = _other(schema["properties"].get(name, {}), how)
    for name, types in kind.LEAVES_OUT.items():
        members = schema["properties"][name]
        members["items"] = either(members["items"], _of_other_types(types))
    if kind.IS_UNTAGGED:
        required.remove("type")
    rules = []
    for name, other in kind.GOES_WITH.items():
        default = schema["properties"][name].get("default")
        asks_nothing = () if default is None else (default,)
        rules.append(only_with(given(other, const=True), name, *asks_nothing))
    if rules or kind.RULES:
        schema["allOf"] = [*rules, *kind.RULES]


def _other(own: Schema, how: Handling) -> Schema:
    """A field that is not done."""
    if how.line == "ignored":
        return {**own, "description": f"{IGNORED} {how.why}"}
    return {"description": f"{REFUSED} {how.why}", "enum": [*how.unasked, None]}


def _of_other_types(types: tuple[str, ...]) -> Schema:
    """An object that is ignored in a list of objects of these types."""
    kind = {"type": "string", "not": {"enum": list(types)}}
    return {"type": "object", "properties": {"type": kind}, "required": ["type"], "description": "Ignored."}


def _or_null(schema: Schema) -> Schema:
    """The same, or null, in as few words as can be."""
    own = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    if schema.get("default") is not None:
        own["default"] = schema["default"]
    ways = [way for way in schema.get("anyOf", ()) if way != _NULL]
    if len(ways) == 1 and "$ref" not in ways[0]:
        return _or_null({**ways[0], **own})
    if ways or "$ref" in own:
        inner = ways or [{"$ref": own.pop("$ref")}]
        return {**own, "anyOf": [*inner, _NULL]}
    if "enum" in own and None not in own["enum"]:
        own["enum"] = [*own["enum"], None]
    if isinstance(own.get("type"), str) and own["type"] != "null":
        own["type"] = [own["type"], "null"]
    return own


def _tidied(schema: Any) -> Any:
    """Without what repeats other parts, and with the document's names."""
    if isinstance(schema, list):
        return [_tidied(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = {**schema, "$ref": _ROOT + name_of(schema["$ref"].removeprefix(_ROOT))}
    return {name: _tidied(part) for name, part in schema.items() if not _is_noise(name, part)}


def _is_noise(name: str, part: Any) -> bool:
    return (name == "title" and isinstance(part, str)) or (name == "discriminator" and "mapping" in part)
