"""From the body of an HTTP request to a JSON object, and from its fields to values of the right type. Pure.

Whatever the bytes are, the outcome is a value or an InvalidRequest that names the field.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from meshserve.errors import InvalidRequest, RequestTooLarge, Unsupported
from meshserve.wire.structs import MAX_NESTING, is_shallow

MAX_VALUES = 524_288
"""Of all kinds, in one body: four times the tokens of the longest prompts."""
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_dump = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode

Fields = dict[str, Any]


def read_object(body: bytes) -> Fields:
    """The JSON object in a body. Raises InvalidRequest for anything else, also where JSON parsers disagree.

    Those are NaN and infinities, names that occur twice in one object, and halves of characters (lone surrogates).
    """
    if len(body) > MAX_VALUES:
        _refuse_many_values(body)
    try:
        fields = _decoder.decode(body.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest("the body is not UTF-8") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object")
    if b"\\ud" in body or b"\\uD" in body:
        _refuse_surrogates(fields)
    return fields


def _refuse_many_values(body: bytes) -> None:
    """A megabyte of empty objects takes seventy of memory. Commas in strings are let off, but only looked for where there are many."""
    if body.count(b",") > MAX_VALUES and _STRING.sub(b"", body).count(b",") > MAX_VALUES:
        raise RequestTooLarge(f"the body has more than {MAX_VALUES} values")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Fields:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"{_shown(twice)} occurs twice in one object")
    return fields


def _refuse_constant(name: str) -> None:
    raise InvalidRequest(f"the body is not JSON: {name} is no JSON number")


_decoder = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)


def _refuse_surrogates(fields: Fields) -> None:
    for name, value in fields.items():
        if not _is_encodable(name) or not _is_encodable(value):
            known = name if _is_encodable(name) else None
            raise InvalidRequest(f"{_shown(name)} contains half a character (a lone surrogate)", param=known)


def _is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    return True


def _shown(name: str) -> str:
    """A client's own word, short enough for a message."""
    return repr(name if len(name) <= 64 else name[:61] + "...")


def boolean(fields: Fields, name: str, param: str | None = None, default: bool = False) -> bool:
    """True or false; null is the default."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidRequest(f"{param or name} must be true or false", param=param or name)
    return value


def optional_integer(fields: Fields, name: str, least: int, most: int) -> int | None:
    """A whole number in these bounds; null is none. 2.0 is whole too, as JSON knows one kind of numbers only."""
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise InvalidRequest(f"{name} must be an integer", param=name)
    if not least <= value <= most:
        raise InvalidRequest(f"{name} must be between {least} and {most}{_not(value)}", param=name)
    return value


def _not(value: int) -> str:
    return f", not {value}" if abs(value) < 10**18 else ""  # a number may have thousands of digits


def integer(fields: Fields, name: str, least: int, most: int, default: int) -> int:
    """A whole number in these bounds; null is the default."""
    value = optional_integer(fields, name, least, most)
    return default if value is None else value


def optional_number(fields: Fields, name: str, least: float, most: float, param: str | None = None) -> float | None:
    """A finite number in these bounds; null is none."""
    value = fields.get(name)
    param = param or name
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidRequest(f"{param} must be a number", param=param)
    if not least <= value <= most:
        raise InvalidRequest(f"{param} must be between {least:g} and {most:g}", param=param)
    return float(value)


def number(fields: Fields, name: str, least: float, most: float, default: float) -> float:
    """A finite number in these bounds; null is the default."""
    value = optional_number(fields, name, least, most)
    return default if value is None else value


def optional_string(fields: Fields, name: str, param: str | None = None, max_length: int | None = None) -> str | None:
    """A string; null is none."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidRequest(f"{param or name} must be a string", param=param or name)
    if max_length is not None and len(value) > max_length:
        raise InvalidRequest(f"{param or name} must be at most {max_length} characters", param=param or name)
    return value


def string(fields: Fields, name: str, param: str | None = None) -> str:
    """A string that must be there and not be empty."""
    value = optional_string(fields, name, param)
    if not value:
        raise InvalidRequest(f"{param or name} is {'missing' if value is None else 'empty'}", param=param or name)
    return value


def optional_object(fields: Fields, name: str, param: str | None = None) -> Fields | None:
    """A JSON object; null is none."""
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise InvalidRequest(f"{param or name} must be an object", param=param or name)
    return value


def optional_list(fields: Fields, name: str, param: str | None = None, max_length: int | None = None) -> list[Any] | None:
    """A list; null is none."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, list):
        raise InvalidRequest(f"{param or name} must be a list", param=param or name)
    if max_length is not None and len(value) > max_length:
        raise InvalidRequest(f"{param or name} must have at most {max_length} elements, not {len(value)}", param=param or name)
    return value


def strings(fields: Fields, name: str, max_length: int) -> tuple[str, ...]:
    """One string or a list of them, none of them empty; null is none."""
    value = fields.get(name)
    if value is None:
        return ()
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > max_length or not all(isinstance(text, str) and text for text in found):
        raise InvalidRequest(f"{name} must be a string or up to {max_length} strings, none of them empty", param=name)
    return tuple(found)


def json_text(value: Any, param: str, max_characters: int) -> str:
    """What is passed on as JSON. Raises InvalidRequest for what is nested too deeply or too long."""
    if not is_shallow(value):
        raise InvalidRequest(f"{param} is nested too deeply: at most {MAX_NESTING} levels", param=param)
    try:
        text = _dump(value)
    except ValueError as error:  # a number like 1e999, which JSON can write and floats cannot hold
        raise InvalidRequest(f"{param} holds a number that is out of range", param=param) from error
    if len(text) > max_characters:
        raise InvalidRequest(f"{param} is too long: at most {max_characters} characters of JSON", param=param)
    return text


def refuse(fields: Fields, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises Unsupported for a field that asks for what is not done here: one of these, with a value that is not neutral."""
    for name in fields.keys() & neutral.keys():
        value = fields[name]
        if value is None or any(value == unasked and isinstance(value, bool) is isinstance(unasked, bool) for unasked in neutral[name]):
            continue
        raise Unsupported(f"{name} is not supported", param=name)
