"""Tools that a request offers: the schema by which an answer is made to be a call, and the judge of calls of strict tools. Pure.

Calls of strict tools that a model wrote as text count only if a schema could have forced them. The grammar library judges them, as it
judges calls that are forced: what a strict tool may ask of its arguments is the same in both cases, and a hostile schema is bounded in
the same way.
"""

import json
from typing import Any

from meshserve.engines.constraints.constraint import ConstraintCompiler
from meshserve.errors import InvalidRequest, ProtocolError
from meshserve.roles.processor.call_formats import Accepts
from meshserve.wire.card import ModelCard
from meshserve.wire.completion import CompletionRequest
from meshserve.wire.structs import is_shallow

Json = dict[str, Any]

_NO_SCHEMAS = frozenset(("const", "enum", "default", "examples"))
"""Keywords of JSON Schema that hold values: what looks like a reference in there is none."""
_BYTES = [bytes([value]) for value in range(256)]
_END = len(_BYTES)
_MOST_FOLLOWED = 64
"""References of a schema that lead to other references, and levels of arguments that are put in order."""


def wants_call(request: CompletionRequest, card: ModelCard) -> bool:
    """Whether the answer is made to be a call, by a schema.

    Where the client leaves it open (`auto`, `strict`), a model that writes calls as text decides for itself; for any other the answer is
    a call unless the last message is a tool's result: that asks for words.
    """
    if request.tool_choice in ("required", "function"):
        return True
    if request.tool_choice == "none" or writes_calls(card):
        return False
    return not request.messages or request.messages[-1]["role"] != "tool"


def writes_calls(card: ModelCard) -> bool:
    """Whether this model writes calls of tools and reasoning as text that has to be parsed."""
    return "tool_text" in card.features


def tools_of(request: CompletionRequest) -> list[Json]:
    """The tools, for the chat template and the schema. Raises ProtocolError: frontends pass on only what they could read."""
    tools = _read_tools(request)
    for tool in tools:
        tool["function"].pop("strict", None)  # models are not shown that word
    return tools


def _read_tools(request: CompletionRequest) -> list[Json]:
    if not request.tools:
        return []
    try:
        tools = json.loads(request.tools)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("completion request: tools cannot be read") from error
    if not isinstance(tools, list) or not all(map(_is_tool, tools)) or not is_shallow(tools):
        raise ProtocolError("completion request: tools cannot be read")
    return tools


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str) and isinstance(function.get("parameters"), dict)


def call_schema(tools: list[Json], name: str = "") -> str:
    """JSON Schema of a call of one of these tools, or of the one of this name: `{"name": NAME, "arguments": {...}}`."""
    functions = [tool["function"] for tool in tools if not name or tool["function"]["name"] == name]
    if not functions:
        raise ProtocolError("completion request: no tool of this name")
    if len(functions) == 1:
        return json.dumps(_one_call(functions[0], "#/properties/arguments"))
    return json.dumps({"anyOf": [_one_call(function, f"#/anyOf/{index}/properties/arguments") for index, function in enumerate(functions)]})


def _one_call(function: Json, place: str) -> Json:
    arguments = {"type": "object", **_moved(function["parameters"], place)}
    properties = {"name": {"const": function["name"]}, "arguments": arguments}
    return {"type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False}


def _moved(schema: Any, place: str) -> Any:
    """The schema with its references to itself, now that it stands at this place of another."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else (value if key in _NO_SCHEMAS else _moved(value, place))
        for key, value in schema.items()
    }


class StrictCalls:
    """Judges calls; keeps what it compiled for the next request. Belongs to one thread."""

    def __init__(self) -> None:
        self._compiler = ConstraintCompiler(lambda: [*_BYTES, b""], [_END], lambda text: text.encode())

    def judge(self, request: CompletionRequest) -> Accepts | None:
        """What judges the calls that a model writes as text in this request's answers; None if all of them count.

        Takes up to 0.1 s for the first request with these tools. Raises InvalidRequest for a schema that is malformed, Unsupported for
        one that cannot be kept to.
        """
        if request.tool_choice != "strict":
            return None
        tools = [tool for tool in _read_tools(request) if tool["function"].get("strict") is True]
        if not tools:
            return None
        schema = call_schema(tools)
        try:
            self._compiler.compile(json_schema=schema)
        except InvalidRequest as error:
            raise type(error)(error.message, param="tools") from error
        parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        return lambda name, arguments: name not in parameters or self._is_valid(schema, name, arguments, parameters[name])

    def _is_valid(self, schema: str, name: str, arguments: Json, parameters: Json) -> bool:
        call = {"name": name, "arguments": in_order(arguments, parameters)}
        text = json.dumps(call, ensure_ascii=False).encode("utf-8", "replace")
        return self._compiler.compile(json_schema=schema).num_allowed(list(text)) == len(text)


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
            pending.append(_referred(root, schema.get("$ref")))
    return found


def _referred(root: Json, reference: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    place: Any = root
    for part in reference[1:].split("/")[1:]:
        place = place.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
    return place
