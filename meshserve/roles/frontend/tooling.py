"""Tools that a model may call, and the form that its answer must have: one form for all APIs. Pure."""

import re
from dataclasses import dataclass
from typing import Any

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.fields import Fields, boolean, json_text, optional_list, optional_object, optional_string, string

MAX_TOOLS = 128
MAX_SCHEMA_CHARACTERS = 262_144
MAX_TOOLS_CHARACTERS = 1_048_576
ANY_OBJECT = '{"type":"object"}'
"""The schema of `json_object`."""
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tools:
    """What goes into a :class:`~meshserve.wire.completion.CompletionRequest`."""

    definitions: tuple[dict[str, Any], ...] = ()
    """Each in OpenAI's form: `{"type": "function", "function": {...}}`."""
    choice: str = "none"
    name: str = ""
    is_parallel: bool = True
    """An answer may have several calls."""

    def text(self, param: str) -> str:
        """The definitions as JSON; empty if there are none."""
        return json_text(list(self.definitions), param, MAX_TOOLS_CHARACTERS) if self.definitions else ""


def read_tools(fields: Fields) -> Tools:
    """OpenAI's `tools` and `tool_choice` of a chat. Raises InvalidRequest that names the field."""
    given = optional_list(fields, "tools", max_length=MAX_TOOLS) or []
    definitions = tuple(_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(given))
    is_parallel = boolean(fields, "parallel_tool_calls", default=True)
    return with_choice(definitions, *_chat_choice(fields.get("tool_choice")), is_parallel)


def with_choice(definitions: tuple[dict[str, Any], ...], choice: str | None, name: str, is_parallel: bool = True) -> Tools:
    """The tools, once their names and the choice among them are found to be sound; no choice is `auto`.

    Where one of them is strict, `auto` becomes `strict`.
    """
    is_strict = True in [tool["function"].get("strict", False) for tool in definitions]
    names = [tool["function"]["name"] for tool in definitions]
    if len(set(names)) != len(names):
        raise InvalidRequest("two tools have the same name", param="tools")
    if not names:
        if choice in ("required", "function"):
            raise InvalidRequest("tool_choice goes with tools only", param="tool_choice")
        return Tools()
    if choice == "function" and name not in names:
        raise InvalidRequest(f"tool_choice names {name[:64]!r}, which is not among the tools", param="tool_choice")
    if choice in (None, "auto"):
        choice = "strict" if is_strict else "auto"
    return Tools(definitions, choice or "auto", name, is_parallel)


def _chat_tool(value: Any, param: str) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{param} must be an object with a type", param=param)
    if kind != "function":
        raise Unsupported(f"{param}: tools of type {kind[:64]!r} are not supported, only 'function'", param=param)
    function = value.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(f"{param}.function must be an object", param=f"{param}.function")
    return function_tool(function, f"{param}.function")


def function_tool(function: Fields, param: str, parameters: str = "parameters") -> dict[str, Any]:
    """One tool in OpenAI's form, from its name, its description and its parameters, a JSON Schema of type object."""
    name = string(function, "name", f"{param}.name")
    if not FUNCTION_NAME.fullmatch(name):
        raise InvalidRequest(f"{param}.name must be up to 128 letters, digits, dashes and underscores", param=f"{param}.name")
    description = optional_string(function, "description", f"{param}.description")
    schema = optional_object(function, parameters, f"{param}.{parameters}") or {"type": "object", "properties": {}}
    is_strict = boolean(function, "strict", f"{param}.strict")
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"{param}.{parameters} must be a schema of type 'object'", param=f"{param}.{parameters}")
    json_text(schema, f"{param}.{parameters}", MAX_SCHEMA_CHARACTERS)
    told = {"name": name, **({"description": description} if description is not None else {}), "parameters": schema}
    return {"type": "function", "function": {**told, "strict": True} if is_strict else told}


def _chat_choice(value: Any) -> tuple[str | None, str]:
    if value is None or value in ("none", "auto", "required"):
        return value, ""
    if not isinstance(value, dict):
        raise InvalidRequest("tool_choice must be 'none', 'auto', 'required' or an object that names a function", param="tool_choice")
    if value.get("type") != "function":
        raise Unsupported(f"tool_choice of type {str(value.get('type'))[:64]!r} is not supported", param="tool_choice")
    function = optional_object(value, "function", "tool_choice.function") or {}
    return "function", string(function, "name", "tool_choice.function.name")


def read_response_format(fields: Fields) -> str:
    """OpenAI's `response_format`: the schema that the text must be valid under, empty for free text."""
    value = optional_object(fields, "response_format")
    if value is None:
        return ""
    if value.get("type") == "json_schema":
        return named_schema(optional_object(value, "json_schema", "response_format.json_schema") or {}, "response_format.json_schema")
    return format_without_schema(value, "response_format")


def format_without_schema(value: Fields, param: str) -> str:
    """The formats `text` and `json_object`. Raises Unsupported for others."""
    kind = string(value, "type", f"{param}.type")
    if kind not in ("text", "json_object"):
        raise Unsupported(f"{param}.type must be text, json_object or json_schema, not {kind[:64]!r}", param=f"{param}.type")
    return ANY_OBJECT if kind == "json_object" else ""


def named_schema(value: Fields, param: str) -> str:
    """The schema of a format that has a `name` and a `schema`."""
    string(value, "name", f"{param}.name")
    optional_string(value, "description", f"{param}.description")
    boolean(value, "strict", f"{param}.strict")
    schema = optional_object(value, "schema", f"{param}.schema")
    if schema is None:
        raise InvalidRequest(f"{param}.schema is missing", param=f"{param}.schema")
    return json_text(schema, f"{param}.schema", MAX_SCHEMA_CHARACTERS)
