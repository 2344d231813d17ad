"""Reads the body of an HTTP request as a struct of its API. Pure.

Whatever the bytes are, the outcome is a struct or an InvalidRequest that names the field. `msgspec` validates
in C. It also refuses what clients may send, as 2.0 for 2 or null inside for what is left out. So a body that
`msgspec` refuses is walked by the struct's types in Python, once: the walk mends what may be sent, and words
each mistake.
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from itertools import accumulate
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.models.common import MAX_TOOLS, Body, Fields, invalid

_Kind = TypeVar("_Kind", bound=Body)
_Parsed = TypeVar("_Parsed")

MAX_DEPTH = 64
"""Objects and lists within each other: schemas and messages have a dozen."""
SHORT_BODY_BYTES = 64 * 1024
"""Whatever is in a body of this size, it is parsed in 3 ms: longer ones are scanned and parsed in a thread, beside the event loop."""
_MAX_COST_NS = 7_000_000
_COMMA_NS, _OPENING_NS, _COLON_NS = 50, 200, 300
"""What a value costs, and what a list or an object and a member's name cost more (measured with json.loads, Python 3.11), a check of its
depth included."""
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def read(kind: type[_Kind], fields: Fields, ignored: list[str], prefix: str = "") -> _Kind:
    """The fields as this struct; names of those that are ignored are appended to `ignored`.

    Raises InvalidRequest or Unsupported, which name the field.
    """
    heeded = _heeded.get(kind) or _note_heeded(kind)
    if not fields.keys() <= heeded:
        set_aside(kind, fields, ignored, prefix)
    if None in fields.values():
        fields = {name: value for name, value in fields.items() if value is not None}
    found = _converted(fields, kind)
    for name, other in kind.GOES_WITH.items():
        if getattr(found, name) not in (None, 0) and not getattr(found, other):
            raise invalid(name, f"goes with {other} only")
    return found


def _converted(fields: Fields, kind: type[_Kind]) -> _Kind:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError:
        mended = _mend(fields, _type_of(kind), "")
    try:
        return msgspec.convert(mended, kind)
    except msgspec.ValidationError as error:  # what the walk lets pass: refused all the same
        raise InvalidRequest(f"the body is malformed: {error}"[:400]) from error


_heeded: dict[type[Body], frozenset[str]] = {}
"""By body, the fields that are simply done: most requests have no others."""


def _note_heeded(kind: type[Body]) -> frozenset[str]:
    looked_at = {*kind.OTHERS, *kind.LEAVES_OUT}
    return _heeded.setdefault(kind, frozenset(kind.__struct_fields__) - looked_at)


def set_aside(kind: type[Body], fields: Fields, ignored: list[str], prefix: str = "") -> None:
    """Note what is ignored of these fields, and leave out the members of lists that are.

    Raises Unsupported for a field that asks for what is not done and would change the answer.
    """
    for name in fields:
        value, how = fields[name], kind.OTHERS.get(name)
        if value is None:
            continue
        if name in kind.LEAVES_OUT:
            fields[name] = _without_others(value, kind.LEAVES_OUT[name], prefix + name, ignored)
        elif how is None:
            if name not in kind.__struct_fields__:
                ignored.append(prefix + name)
        elif any(_is_same(value, other) for other in how.unasked):
            continue
        elif how.line == "ignored":
            ignored.append(prefix + name)
        else:
            place = prefix + name
            raise Unsupported(f"{place} is not supported", param=place, beta=name if how.is_beta else None)


def _without_others(value: Any, types: tuple[str, ...], name: str, ignored: list[str]) -> Any:
    """The list without objects of other types; what is no such list is left to the struct."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        return value
    found = []
    for member in value:
        kind = member.get("type", types[0]) if isinstance(member, dict) else None
        if isinstance(kind, str) and kind not in types:
            ignored.append(f"{name}.{kind}")
        else:
            found.append(member)
    return found


def _is_same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) is isinstance(other, bool)  # 1 is not true


# --- what would hold up the event loop is refused before it is parsed


def check_json(body: bytes) -> None:
    """Raises InvalidRequest for what would take long to parse, or is nested too deeply; it need not be JSON.

    A short, flat body costs two counts, another one 1 ns a byte.
    """
    # The C parser holds the interpreter for as long as it runs, in whatever thread. It reads text at 1 GB/s, but
    # values at 50 to 400 ns each: 4 MiB of `[],[],` take 180 ms, of text 2 to 7 ms. So the values of a long body
    # are counted first, outside of its strings. A faster parser would move the bound, and not remove it (orjson
    # and msgspec: 30 to 360 ms for 8 MiB of values).
    if len(body) <= SHORT_BODY_BYTES and _num_opening(body) <= MAX_DEPTH:
        return
    outside = outside_strings(body)
    num_opening = _num_opening(outside)
    depth_at_end = num_opening - outside.count(b"]") - outside.count(b"}")
    # the cost comes before the depth, which is counted bracket by bracket
    if depth_at_end <= MAX_DEPTH and cost_ns(outside) > _MAX_COST_NS:
        raise InvalidRequest("the body holds too many values; long prompts are shorter as text")
    if depth_at_end > MAX_DEPTH or (num_opening > MAX_DEPTH and _deepest(outside) > MAX_DEPTH):
        raise InvalidRequest(f"the body is nested too deeply: at most {MAX_DEPTH} levels")


def _num_opening(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def outside_strings(body: bytes) -> bytes:
    """What a JSON text holds outside of its strings."""
    return b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])


def cost_ns(outside: bytes) -> int:
    """How long the parser takes for a text that is this outside of its strings."""
    num_commas, num_colons = outside.count(b","), outside.count(b":")
    return _COMMA_NS * num_commas + _OPENING_NS * _num_opening(outside) + _COLON_NS * num_colons


def _deepest(outside: bytes) -> int:
    return max(accumulate(map(_STEPS.__getitem__, outside.translate(None, _NOT_BRACKETS))))


async def read_json(body: bytes, parse: Callable[[bytes], _Parsed]) -> _Parsed:
    """What `parse` makes of a body that can be parsed; a long one in a thread. Raises InvalidRequest."""

    def parsed() -> _Parsed:
        check_json(body)
        return parse(body)

    return parsed() if len(body) <= SHORT_BODY_BYTES else await asyncio.to_thread(parsed)


# --- from bytes to an object


def read_object(body: bytes) -> Fields:
    """The JSON object in a body. Raises InvalidRequest for anything else, also where JSON parsers disagree.

    Those are NaN and infinities, names that occur twice in one object, and halves of characters (lone
    surrogates). `msgspec` would take the later of two names, so the library's own parser reads the text.
    """
    try:
        fields = _decoded(body.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest("the body is not UTF-8") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object")
    if b"\\" in body and (b"\\ud" in body or b"\\uD" in body):
        _refuse_surrogates(fields)
    return fields


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


def _decoded(text: str) -> Any:
    if text.startswith("{"):
        value, end = _decoder.raw_decode(text)
        if end == len(text):  # nearly always: no regular expressions need to look for white space around it
            return value
    return _decoder.decode(text)


def _refuse_surrogates(fields: Fields) -> None:
    for name, value in fields.items():
        if not _is_encodable(name) or not _is_encodable(value):
            words = f"{_shown(name)} contains half a character (a lone surrogate)"
            raise InvalidRequest(words, param=name if _is_encodable(name) else None)


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


# --- the walk, for what `msgspec` refused

_FORMS: dict[type, tuple[Any, str]] = {
    inspect.BoolType: (bool, "true or false"),
    inspect.IntType: (int, "an integer"),
    inspect.FloatType: ((int, float), "a number"),
    inspect.StrType: (str, "a string"),
    inspect.LiteralType: (str, "a string"),
    inspect.ListType: (list, "a list"),
    inspect.DictType: (dict, "an object"),
    inspect.StructType: (dict, "an object"),
}
"""How each kind of value looks in JSON."""


@cache
def _type_of(kind: type[Body]) -> inspect.Type:
    return inspect.type_info(kind)


def _mend(value: Any, kind: Any, param: str) -> Any:
    """The value as `msgspec` takes it. Raises InvalidRequest for what is not of this kind."""
    if isinstance(kind, inspect.Metadata):
        return _mend_described(value, kind, param)
    if isinstance(kind, inspect.UnionType):
        return _mend_union(value, kind, param)
    if isinstance(kind, inspect.AnyType):
        return value
    if isinstance(kind, inspect.NoneType):
        raise Unsupported(f"{param} is not supported", param=param)
    if isinstance(kind, inspect.IntType) and isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON knows one kind of numbers only
    form, words = _FORMS[type(kind)]
    if not isinstance(value, form) or (isinstance(value, bool) and form is not bool):
        raise invalid(param, f"must be {words}")
    if isinstance(kind, inspect.StructType):
        return _mend_struct(value, kind, param)
    _check_bounds(value, kind, param)
    if isinstance(kind, inspect.ListType):
        items = enumerate(value)
        return [_mend(item, kind.item_type, f"{param}[{index}]") for index, item in items]
    if isinstance(kind, inspect.DictType):
        keys, values = kind.key_type, kind.value_type
        return {_mend(name, keys, param): _mend(value[name], values, param) for name in value}
    return value


def _check_bounds(value: Any, kind: Any, param: str) -> None:
    if isinstance(kind, inspect.LiteralType):
        if value not in kind.values:
            words = f"{param} must be {' or '.join(map(str, kind.values))}, not {value[:64]!r}"
            raise (Unsupported if param.endswith(".type") else InvalidRequest)(words, param=param)
    elif isinstance(kind, (inspect.IntType, inspect.FloatType)):  # all of them have bounds
        least, most = kind.gt if kind.ge is None else kind.ge, kind.le
        if not least <= value <= most or value == kind.gt:
            between = f"above {least} and at most" if kind.ge is None else f"between {least} and"
            # a number may have thousands of digits
            shown = f", not {value}" if isinstance(value, float) or abs(value) < 10**18 else ""
            raise invalid(param, f"must be {between} {most}{shown}")
    elif isinstance(kind, (inspect.StrType, inspect.ListType, inspect.DictType)):
        things = "characters" if isinstance(value, str) else "elements"
        if kind.max_length is not None and len(value) > kind.max_length:
            raise invalid(param, f"must have at most {kind.max_length} {things}, not {len(value)}")
        if kind.min_length is not None and len(value) < kind.min_length:
            raise invalid(param, f"must have at least {kind.min_length} {things[:-1]}" if value != "" else "is empty")
        if isinstance(kind, inspect.StrType) and kind.pattern and not re.search(kind.pattern, value):
            raise invalid(param, "is malformed")


def _mend_struct(value: Fields, kind: inspect.StructType, param: str) -> Fields:
    mended = {} if kind.tag_field is None else {kind.tag_field: kind.tag}
    for field in sorted(kind.fields, key=lambda field: field.name != "type"):  # the kind first
        found, place = value.get(field.name), f"{param}.{field.name}" if param else field.name
        if field.name == "type" and field.required and (known := getattr(field.type, "values", ())):
            _check_kind(value, "type", known, param)
        if found is not None:
            mended[field.name] = _mend(found, field.type, place)
        elif field.required:
            raise invalid(place, "is missing")
    return mended


def _mend_union(value: Any, kind: inspect.UnionType, param: str) -> Any:
    """By what the value looks like, and of objects by what they say of their kind."""
    ways = [way for way in kind.types if not isinstance(way, inspect.NoneType)]
    if value is None and len(ways) < len(kind.types):
        return None
    tagged = {way.tag: way for way in ways if isinstance(way, inspect.StructType) and way.tag}
    if tagged and (isinstance(value, dict) or len(tagged) == len(ways)):
        name = ways[-1].tag_field  # type: ignore[attr-defined]
        return _mend(value, tagged[_check_kind(value, name, tuple(tagged), param)], param)
    for way in ways:
        if len(ways) == 1 or isinstance(value, _FORMS[type(way)][0]):
            return _mend(value, way, param)
    raise invalid(param, "is of the wrong type")


def _check_kind(value: Any, name: str, known: tuple[Any, ...], param: str) -> Any:
    """What an object says of its kind. In a list, an object of another kind is at fault itself."""
    place = param if name == "type" and param.endswith("]") else f"{param}.{name}"
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, dict) or (place == param and not isinstance(found, str)):
        raise invalid(param, f"must be an object with a {name}")
    if found is None:
        raise invalid(place, "is missing")
    if found in known:
        return found
    shown = repr(str(found)[:64])
    if name == "type":
        words = f"{param}: type {shown} is not supported here, only {' and '.join(known)}"
        raise Unsupported(words, param=place)
    if found == "function" and "tool" in known:
        words = f"{param}: the role function is the old form of tools; use the role tool"
        raise Unsupported(words, param=place)
    raise invalid(place, f"must be one of {', '.join(known)}, not {shown}")


def _mend_described(value: Any, kind: inspect.Metadata, param: str) -> Any:
    """With the words that the field has for its mistakes, if it has some."""
    extra: Mapping[str, Any] = kind.extra or {}
    try:
        return _mend(value, kind.type, param)
    except InvalidRequest as error:
        covers = extra.get("covers")
        inside = (error.param or "")[len(param) :]
        if covers is None or not (inside in ("", *covers) or "*" in covers):
            raise
        message = error.message if isinstance(error, Unsupported) else f"{param} {extra['words']}"
        raise type(error)(message, param=param) from error
