"""Calls of tools: what an engine is asked for so that its output is one, and how that output is read as it comes. Pure."""

import json
import re
from typing import Any

from meshserve.errors import ProtocolError
from meshserve.wire.card import ModelCard
from meshserve.wire.completion import CompletionRequest
from meshserve.wire.structs import is_shallow

Json = dict[str, Any]

MAX_SPACE_CHARACTERS = 256
"""White space in one place around a call. Models may write it without end, and what is held back is looked at again with every token."""
SPACE = rf"\s{{0,{MAX_SPACE_CHARACTERS}}}+"
"""Such white space, in a pattern. It is never given back, so that two in a row are not tried at every place between them."""
_HEAD = re.compile(
    rf'{SPACE}\{{{SPACE}"name"{SPACE}:{SPACE}("[^"\\]*+(?:\\.[^"\\]*+)*"){SPACE},{SPACE}"arguments"{SPACE}:{SPACE}(?=\S)',
)
_MAX_HEAD_CHARACTERS = 4096
"""What has a longer head is read at its end."""
_MARKS = re.compile(r'[\\"{}\[\]]')
_NO_SCHEMAS = frozenset(("const", "enum", "default", "examples"))
"""Keywords of JSON Schema that hold values: what looks like a reference in there is none."""


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


def strict_tools_of(request: CompletionRequest) -> list[Json]:
    """Those whose calls must be valid. Raises as :func:`tools_of`."""
    return [tool for tool in _read_tools(request) if tool["function"].get("strict") is True]


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


class Brackets:
    """Looks for the bracket that closes the first one, in the text of a JSON value that comes in pieces."""

    __slots__ = ("_depth", "_escaped", "_in_string", "is_over")

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.is_over = False
        """It was found."""

    def feed(self, text: str) -> int:
        """How much of this text belongs to the value: up to that bracket, which included."""
        place = 0
        while place < len(text) and not self.is_over:
            if self._escaped:
                self._escaped, place = False, place + 1
            elif (found := _MARKS.search(text, place)) is not None:
                place = found.end()
                self._mark(found[0])
            else:
                place = len(text)
        return place

    def _mark(self, mark: str) -> None:
        if mark == "\\":
            self._escaped = self._in_string
        elif mark == '"':
            self._in_string = not self._in_string
        elif not self._in_string:
            self._depth += 1 if mark in "{[" else -1
            self.is_over = self._depth <= 0


class CallParser:
    """Reads a call as its text comes: the name once it is complete, then the arguments' text piece by piece, and nothing else."""

    __slots__ = ("_brackets", "_held", "name")

    def __init__(self) -> None:
        self.name: str | None = None
        """None until it is complete."""
        self._held = ""
        self._brackets = Brackets()

    def feed(self, text: str) -> str:
        """More of the arguments, as far as this text goes."""
        if self.name is None:
            is_head = len(self._held) < _MAX_HEAD_CHARACTERS
            self._held += text
            head = _HEAD.match(self._held, 0, _MAX_HEAD_CHARACTERS) if is_head else None
            if head is None:
                return ""
            self.name = json.loads(head[1])
            text, self._held = self._held[head.end() :], ""
        return text[: self._brackets.feed(text)]

    def finish(self) -> tuple[str, bool]:
        """What was held back, and whether it is the arguments of a call that had another form; else it is no call but text."""
        held, self._held = self._held, ""
        if self.name is not None or not held:
            return "", False
        try:
            call = json.loads(held)
            self.name, arguments = str(call["name"]), json.dumps(call["arguments"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return held, False
        return arguments, True
