"""From a JSON Schema to the writer of its documents. Pure."""

import json
from math import isfinite
from typing import Any

from meshserve.engines.dummy.documents.keywords import PARAM
from meshserve.engines.dummy.documents.merging import Schema, admits
from meshserve.engines.dummy.documents.numbers import sample_numbers
from meshserve.engines.dummy.documents.scope import Scope
from meshserve.engines.dummy.documents.writing import ENDLESS, MOST_NESTED, AnyOf, ArrayOf, Literal, ObjectOf, Template, Text, Writer
from meshserve.errors import InvalidRequest, Unsupported

_MOST_CHARACTERS = 65_536
_MOST_ROUNDS = 12
_LARGEST_DOCUMENT = 16_384
"""Bytes of the shortest valid one."""
_MOST_BRANCHES = 64
_VALUES_A_NUMBER = 64

_TEMPLATES = {
    "date": "20##-0+-1#",
    "time": "1#:~#:~#Z",
    "date-time": "20##-0+-1#T1#:~#:~#Z",
    "duration": "P+DT+H",
    "email": "?????@????.org",
    "hostname": "?????.example.org",
    "ipv4": "10.+.+.+",
    "ipv6": "fd00::%%%%",
    "uuid": "%%%%%%%%-%%%%-4%%%-8%%%-%%%%%%%%%%%%",
    "uri": "https://????.org/?????",
}
"""How a string of each format may look, in the classes of `writing.CLASSES`."""
_WORDS_OF_TYPES = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
"""A schema that names no type allows any; the first that it says something about is written."""
_INVENTED_KEYS = ("answer", "note", "count")
_ANY: Schema = {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "boolean"}]}
_INVENTED: Schema = {
    "properties": {"answer": {"type": "string"}, "note": {"type": "string"}, "count": {"type": "integer", "minimum": 1}},
    "required": ["answer"],
}
"""What an object of which nothing is said looks like."""


class Reader:
    """Reads one schema; every place of it is looked at once, whatever its references say."""

    def __init__(self, root: Any) -> None:
        self._scope = Scope(root)
        self._writers: list[Writer] = []  # those within a writer before it, so that sizes settle in a few rounds
        self._by_reference: dict[str, AnyOf] = {}
        self._by_bounds: dict[tuple[Any, ...], Literal] = {}
        self._any: Writer | None = None

    @classmethod
    def read(cls, text: str) -> Writer:
        """Raises InvalidRequest and Unsupported."""
        if len(text) > _MOST_CHARACTERS:
            raise Unsupported(f"the schema has {len(text)} characters; at most {_MOST_CHARACTERS} are read", param=PARAM)
        try:
            root = json.loads(text, parse_constant=_finite, parse_float=_finite)
        except (ValueError, RecursionError) as exc:
            raise InvalidRequest("the schema is not JSON, or nests too deep", param=PARAM) from exc
        reader = cls(root)
        writer = reader._writer(root, 0)
        reader._settle()
        if writer.size >= ENDLESS:
            raise Unsupported("the schema allows no document that ends", param=PARAM)
        if writer.size > _LARGEST_DOCUMENT or writer.height > MOST_NESTED:
            raise Unsupported("the shortest document that the schema allows is too long, or nests too deep", param=PARAM)
        return writer

    def _settle(self) -> None:
        """Sizes and heights of what refers back to itself need a round more for every way back."""
        for _ in range(_MOST_ROUNDS):
            if not sum(writer.settle() for writer in self._writers):
                return
        raise Unsupported("the schema refers back to itself too often", param=PARAM)

    def _writer(self, schema: Any, nested: int) -> Writer:
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if isinstance(reference, str) and self._scope.is_only_reference(schema):
            return self._referred(reference, nested)
        return self._kept(self._written(self._scope.flat(schema, nested), nested))

    def _kept(self, writer: Writer) -> Writer:
        self._writers.append(writer)
        return writer

    def _referred(self, reference: str, nested: int) -> Writer:
        """One writer for all places that refer here, so that a schema may refer to what it is part of."""
        self._scope.count()
        found = self._by_reference.get(reference)
        if found is None:
            found = self._by_reference[reference] = AnyOf()
            found.branches = [self._writer(self._scope.resolve(reference, nested), nested + 1)]
            self._writers.append(found)
        return found

    def _written(self, schema: Schema | None, nested: int) -> Writer:
        """The writer of a schema that is flat: without references and `allOf` at its top."""
        if schema is None:
            return Literal(())
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self._any_of({key: schema[key] for key in schema if key != word}, schema[word], word, nested)
        if "enum" in schema:
            return Literal([_text(value) for value in schema["enum"] if admits(schema, value)])
        types = schema.get("type") or [kind for kind, words in _WORDS_OF_TYPES.items() if any(word in schema for word in words)][:1]
        if not types:
            return self._anything(nested)
        writers = [self._of_type(kind, schema, nested) for kind in types]
        return writers[0] if len(writers) == 1 else AnyOf([self._kept(writer) for writer in writers])

    def _anything(self, nested: int) -> Writer:
        if self._any is None:
            self._any = self._writer(_ANY, nested + 1)
        return self._any

    def _any_of(self, base: Schema, branches: list[Any], word: str, nested: int) -> Writer:
        if len(branches) > _MOST_BRANCHES:
            raise Unsupported(f"the schema's {word} has {len(branches)} branches; at most {_MOST_BRANCHES} are read", param=PARAM)
        if not base and word == "anyOf":
            return AnyOf([self._writer(branch, nested + 1) for branch in branches])
        flat = [self._scope.merged(base, self._scope.flat(branch, nested)) for branch in branches]
        if word == "oneOf":
            self._scope.check_exclusive(flat)
        if not base:
            return AnyOf([self._writer(branch, nested + 1) for branch in branches])
        return AnyOf([self._kept(self._written(branch, nested + 1)) for branch in flat])

    def _of_type(self, kind: str, schema: Schema, nested: int) -> Writer:
        if kind == "object":
            return self._object(schema, nested)
        if kind == "array":
            return self._array(schema, nested)
        if kind == "string":
            return _string(schema)
        if kind == "boolean":
            return Literal((b"true", b"false"))
        if kind == "null":
            return Literal((b"null",))
        return self._number(kind, {word: schema[word] for word in _WORDS_OF_TYPES["number"] if word in schema})

    def _number(self, kind: str, bounds: Schema) -> Writer:
        """One writer for all numbers of the same bounds: to find some that are within them takes a while."""
        key = (kind, *bounds.items())
        found = self._by_bounds.get(key)
        if found is None:
            self._scope.count(_VALUES_A_NUMBER)
            found = Literal(sample_numbers(bounds, kind == "integer", lambda value: admits(bounds | {"type": [kind]}, value)))
            self._by_bounds[key] = found
        return found

    def _array(self, schema: Schema, nested: int) -> Writer:
        least, most = schema.get("minItems", 0), schema.get("maxItems", ENDLESS)
        if schema.get("uniqueItems"):
            if least > 1:
                raise Unsupported("uniqueItems cannot be kept to with minItems above 1", param=PARAM)
            most = min(most, 1)
        items = self._writer(schema.get("items", True), nested + 1) if most else None
        return ArrayOf(items, least, most)

    def _object(self, schema: Schema, nested: int) -> Writer:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if "properties" not in schema and not required and others is not False:
            return self._invented(others, nested)
        names = [*properties, *dict.fromkeys(name for name in required if name not in properties)]
        needed = {*required}
        return ObjectOf(
            [(_text(name), self._writer(properties.get(name, others), nested + 1), name in needed) for name in names],
        )

    def _invented(self, others: Any, nested: int) -> Writer:
        """An object without a property of its own, but with leave to have some."""
        if others is True or others == {}:
            return self._object(_INVENTED, nested)
        writer = self._writer(others, nested + 1)
        return ObjectOf([(_text(name), writer, False) for name in _INVENTED_KEYS])


def _string(schema: Schema) -> Writer:
    least, most = schema.get("minLength", 0), schema.get("maxLength", ENDLESS)
    if "format" not in schema:
        return Text(least, most)
    template = _TEMPLATES.get(schema["format"])
    if template is None:
        raise Unsupported(f"the string format {schema['format']!r:.40} is unknown; known are {', '.join(_TEMPLATES)}", param=PARAM)
    if not least <= len(template) <= most:
        raise Unsupported(f"a string of format {schema['format']} cannot be kept to its minLength or maxLength", param=PARAM)
    return Template(template)


def _text(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate can only stand there escaped
        return json.dumps(value).encode()


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text} is no number in JSON")
    return value
