"""The keywords of JSON Schema that are kept to, and the form that their values must have. Pure."""

from typing import Any

from meshserve.errors import InvalidRequest, Unsupported

PARAM = "response_format"
"""The field of the API that schemas come in."""
LARGEST_NUMBER = 1e100
"""What is written stays below; a bound beyond it, as the largest double often is, is taken for it."""
_LONGEST = 2**40
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_ANNOTATIONS = frozenset(("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "discriminator"))
_OF_THE_DOCUMENT = frozenset(("$schema", "$id", "$comment", "$defs", "definitions"))
_COUNTS = frozenset(("minLength", "maxLength", "minItems", "maxItems"))
_NUMBERS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"))
_LISTS = frozenset(("anyOf", "oneOf", "allOf"))
_FORMS: dict[str, Any] = {"$ref": str, "format": str, "properties": dict, "required": list, "enum": list, "uniqueItems": bool}
_FREE = frozenset(("const", "items", "additionalProperties"))


def is_annotation(key: str) -> bool:
    """Whether a keyword constrains nothing."""
    return key in _ANNOTATIONS or key in _OF_THE_DOCUMENT or key.startswith("x-")


def checked(key: str, value: Any) -> Any:
    """A keyword's value, in its one form. Raises InvalidRequest for a malformed one, Unsupported for a keyword that is not kept to."""
    if key in _COUNTS:
        return _count(key, value)
    if key in _NUMBERS:
        return _number(key, value)
    if key == "type":
        return _type_names(value)
    if key in _LISTS:
        if not isinstance(value, list) or not value:
            raise malformed(key, value)
    elif key in _FORMS:
        if not isinstance(value, _FORMS[key]) or (key == "required" and not all(isinstance(name, str) for name in value)):
            raise malformed(key, value)
    elif key not in _FREE:
        raise Unsupported(f"the schema uses {key!r:.60}, which this model cannot keep to", param=PARAM)
    return value


def malformed(key: str, value: Any) -> InvalidRequest:
    """What to raise for a keyword with this value."""
    shown = f"an {type(value).__name__}" if isinstance(value, (dict, list)) else f"{value!r:.60}"
    return InvalidRequest(f"the schema's {key} must not be {shown}", param=PARAM)


def _type_names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
        raise malformed("type", value)
    return [name for name in dict.fromkeys(names) if name != "integer" or "number" not in names]


def _count(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _LONGEST or value != int(value):
        raise malformed(key, value)
    return int(value)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise malformed(key, value)
    number: float = value
    if key in ("maximum", "exclusiveMaximum"):
        number = min(number, LARGEST_NUMBER)
    elif key in ("minimum", "exclusiveMinimum"):
        number = max(number, -LARGEST_NUMBER)
    elif not number > 1 / LARGEST_NUMBER:
        raise malformed(key, value)
    if abs(number) > LARGEST_NUMBER:
        raise malformed(key, value)
    return number
