"""Tools that a request offers: the schema by which an answer is made to be a call, and the judge of calls of strict tools. Pure.

Calls of strict tools that a model wrote as text count only if a schema could have forced them. The grammar library judges them, as it
judges calls that are forced: what a strict tool may ask of its arguments is the same in both cases, and a hostile schema is bounded in
the same way.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from meshserve.engines.constraints.constraint import ConstraintCompiler
from meshserve.engines.constraints.keeping import outline
from meshserve.engines.constraints.ordering import in_order
from meshserve.engines.constraints.schemas import property_names
from meshserve.errors import InvalidRequest, MeshserveError, ProtocolError
from meshserve.roles.processor.call_formats import Accepts
from meshserve.wire.card import ModelCard
from meshserve.wire.completion import CompletionRequest
from meshserve.wire.structs import is_shallow

Json = dict[str, Any]

_NO_SCHEMAS = frozenset(("const", "enum", "default", "examples"))
"""Keywords of JSON Schema that hold values: what looks like a reference in there is none."""
_BYTES = [bytes([value]) for value in range(256)]
_END = len(_BYTES)
_CONSTRAINTS = {
    "json_schema": "response_format",
    "response_format": "response_format",
    "regex": "structured_outputs",
    "choices": "structured_outputs",
}
"""The field by which a client knows what an engine finds fault with."""
_MOST_HINTED_CHARACTERS, _MOST_HINTED_PROPERTIES = 32_768, 256
"""Of all schemas together that only hint at what arguments look like: half of what a schema may have that binds."""
_PLACE = re.compile(r"#(?:/anyOf/(\d+))?/properties/arguments((?:/[^\s,]*)?)")


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


def call_schema(request: CompletionRequest, can_be_kept: Callable[[str], bool]) -> str:
    """JSON Schema of a call of one of the tools, or of the one that is named: `{"name": NAME, "arguments": {...}}`.

    Arguments keep to the tool's schema where a call is required, or the tool is strict. Elsewhere they are of its outline, and
    anything where `can_be_kept` says no to that: a schema that does not bind is never refused.
    """
    functions, num_binding = _callable(request)
    if not functions:
        raise ProtocolError("completion request: no tool of this name")
    binding, others = functions[:num_binding], functions[num_binding:]
    hinted = [{**function, "parameters": _hint(function["parameters"])} for function in others]
    hinted = _fitting(hinted, has_others=num_binding > 0)
    schema = _any_call([*binding, *hinted])
    if not hinted or can_be_kept(schema):
        return schema
    sound = [function if can_be_kept(_any_call([function])) else {**function, "parameters": {}} for function in hinted]
    return _any_call([*binding, *sound])


def _hint(parameters: Json) -> Json:
    """What a call looks like that need not be valid."""
    found: Json = outline(parameters) if parameters.get("type", "object") == "object" else {}
    return found


def _callable(request: CompletionRequest) -> tuple[list[Json], int]:
    """The functions that the answer may call: first those whose schemas bind, and how many these are."""
    functions = [tool["function"] for tool in _read_tools(request)]
    if request.tool_choice == "function":
        functions = [function for function in functions if function["name"] == request.tool_name]
    if request.tool_choice in ("required", "function"):
        return functions, len(functions)
    functions.sort(key=lambda function: function.get("strict") is not True)
    return functions, sum(function.get("strict") is True for function in functions)


def _fitting(functions: list[Json], *, has_others: bool) -> list[Json]:
    """As many of them, from the first on, as one grammar has room for: none of them must be called."""
    found: list[Json] = []
    num_characters = num_properties = 0
    for function in functions:
        num_characters += len(json.dumps(function["parameters"]))
        num_properties += sum(1 for _ in property_names(function["parameters"]))
        is_full = num_characters > _MOST_HINTED_CHARACTERS or num_properties > _MOST_HINTED_PROPERTIES
        if is_full and (found or has_others):
            break
        found.append({**function, "parameters": {}} if is_full else function)
    return found


def _any_call(functions: list[Json]) -> str:
    if len(functions) == 1:
        return json.dumps(_one_call(functions[0], "#/properties/arguments"))
    calls = [_one_call(function, f"#/anyOf/{index}/properties/arguments") for index, function in enumerate(functions)]
    return json.dumps({"anyOf": calls})


def in_fields(error: MeshserveError, request: CompletionRequest, *, is_call: bool) -> MeshserveError:
    """The error, with the field by which the client knows what an engine finds fault with."""
    if not isinstance(error, InvalidRequest) or error.param not in _CONSTRAINTS:
        return error
    return in_tools(error, request) if is_call else type(error)(error.message, param=_CONSTRAINTS[error.param])


def in_tools(error: InvalidRequest, request: CompletionRequest) -> InvalidRequest:
    """An error about the schema of a call, in words of the tools: which one, and which place in its parameters."""
    functions, _ = _callable(request)

    def named(found: re.Match[str]) -> str:
        index = int(found[1] or 0)
        name = functions[index]["name"] if index < len(functions) else "?"
        return f"#{found[2]} of the tool {name!r}"

    return type(error)(_PLACE.sub(named, error.message), param="tools")


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
    """Judges calls, and schemas of calls; keeps what it compiled for the next request. Belongs to one thread."""

    def __init__(self) -> None:
        self._compiler = ConstraintCompiler(lambda: [*_BYTES, b""], [_END], lambda text: text.encode())

    def can_be_kept(self, schema: str) -> bool:
        """Whether an output can keep to this schema. Takes up to 0.1 s for a new one."""
        try:
            self._compiler.compile(json_schema=schema)
        except InvalidRequest:
            return False
        return True

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
        schema = _any_call([tool["function"] for tool in tools])
        try:
            self._compiler.compile(json_schema=schema)
        except InvalidRequest as error:
            raise in_tools(error, request) from error
        parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        return lambda name, arguments: name not in parameters or self._is_valid(schema, name, arguments, parameters[name])

    def _is_valid(self, schema: str, name: str, arguments: Json, parameters: Json) -> bool:
        call = {"name": name, "arguments": in_order(arguments, parameters)}
        text = json.dumps(call, ensure_ascii=False).encode("utf-8", "replace")
        return self._compiler.compile(json_schema=schema).num_allowed(list(text)) == len(text)
