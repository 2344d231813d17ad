"""Sampling, tools and formats: what several APIs have, and what it becomes in a request to a processor. Pure."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

from msgspec import Meta

from meshserve.errors import InvalidRequest
from meshserve.roles.frontend.models.common import (
    MAX_SESSION_CHARACTERS,
    Body,
    Fields,
    LabelledBody,
    NonEmpty,
    SampledBody,
    given,
    mistake,
    only_with,
)
from meshserve.routing.policies import POLICIES
from meshserve.wire.generation import AskedSampling
from meshserve.wire.structs import MAX_NESTING, is_shallow

MAX_SCHEMA_CHARACTERS = 262_144
MAX_TOOLS_CHARACTERS = 1_048_576
ANY_OBJECT = '{"type":"object"}'
"""The schema of `json_object`."""
_READ_APART = {"max_tokens", "logit_bias", "logprobs", "regex"}
"""Their names mean something else in one of the APIs, or their values need work."""
_dump = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode

Message = dict[str, Any]
"""Its role (`system`, `user`, `assistant`, `tool`) and content as text; an assistant's may have `tool_calls`, each
with `id`, `name` and `arguments` (JSON text), and `reasoning_content`, which templates may show again; a tool's has
the `tool_call_id` of its call."""

# --- tools and formats

MAX_CALLS = 128
"""Of tools, in one message."""
TOOLS = Meta(max_length=128, description="No two may have the same name.")
HAS_TOOLS = given("tools", type="array", minItems=1)
TOOLS_RULE = only_with(HAS_TOOLS, "tool_choice", "none", "auto")
CHOICE = Meta(
    description="`required`, or a function of the tools: it is called. Without tools, none can be required.",
    extra={
        "words": "must be 'none', 'auto', 'required' or an object that names a function",
        "covers": (".type",),
    },
)
FunctionName = Annotated[
    str,
    Meta(pattern=r"^[a-zA-Z0-9_-]{1,128}$"),
    mistake("must be up to 128 letters, digits, dashes and underscores"),
]
_STRICT = (
    "Arguments are valid under their schema: what the model writes counts as a call only if they are."
)
Parameters = Annotated[
    dict[str, Any],
    Meta(
        description="A JSON Schema of type object. What the model's engine cannot keep to is refused.",
        extra_json_schema={"properties": {"type": {"const": "object"}}},
    ),
]


class Described(Body, kw_only=True):
    """A function that a model may call."""

    name: FunctionName
    description: str | None = None
    strict: Annotated[bool, Meta(description=_STRICT)] = False


class FreeText(Body, tag_field="type", tag="text"):
    """Any text."""


class JsonObject(Body, tag_field="type", tag="json_object"):
    """The text is a JSON object."""


class NamedSchema(Body, kw_only=True):
    """The text is a document that is valid under this JSON Schema."""

    name: NonEmpty
    description: str | None = None
    strict: bool = False
    schema: dict[str, Any]


# --- what they become


def sampled(asked: SampledBody, fields: Fields, max_tokens: int | None) -> Fields:
    """Sampling, the model and meshserve's own field. Raises InvalidRequest that names the field."""
    # a body has few of the fields that it might have: only those are looked at
    found = {name: getattr(asked, name) for name in _passed_on(type(asked)) & fields.keys()}
    found["model"] = asked.model
    if isinstance(asked, LabelledBody):
        found["session"] = (asked.prompt_cache_key or asked.user or "")[:MAX_SESSION_CHARACTERS]
    if max_tokens is not None and asked.min_tokens > max_tokens:
        words = f"min_tokens must be at most max_tokens, which is {max_tokens}"
        raise InvalidRequest(words, param="min_tokens")
    if asked.meshserve is not None:
        policy = asked.meshserve.policy
        if policy is not None and policy not in POLICIES:
            words = f"unknown policy {policy[:64]!r}; there are: {', '.join(POLICIES)}"
            raise InvalidRequest(words, param="meshserve.policy")
        found |= {"wants_receipt": asked.meshserve.receipt, "policy": policy}
    return found


@cache
def _passed_on(kind: type[SampledBody]) -> frozenset[str]:
    """Sampling fields of this API that a CompletionRequest has by the same name."""
    return frozenset(AskedSampling.__struct_fields__) & set(kind.__struct_fields__) - _READ_APART


def text_of(content: str | list[Any]) -> str:
    """Content as text, or as parts whose texts are joined."""
    return content if isinstance(content, str) else "".join([part.text for part in content])


def check_calls(messages: Sequence[Message], param: str) -> None:
    """Every call of a tool is answered, by messages that follow it at once. Raises InvalidRequest if not."""
    open_ids: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            answered = message["tool_call_id"]
            if answered not in open_ids:
                words = "answers no tool call of the assistant's message before it"
                raise InvalidRequest(
                    f"{param}: the tool message for {answered[:64]!r} {words}", param=param
                )
            open_ids.remove(answered)
            continue
        if open_ids:
            break
        calls = message.get("tool_calls", ())
        open_ids = {call["id"] for call in calls}
        if len(open_ids) != len(calls):
            words = "two tool calls of one message have the same id"
            raise InvalidRequest(f"{param}: {words}", param=param)
    if open_ids:
        words = "is not answered by a tool message right after it"
        raise InvalidRequest(f"{param}: the tool call {min(open_ids)[:64]!r} {words}", param=param)


def tool_fields(
    tools: Sequence[tuple[Described, Fields | None]],
    param: str,
    choice: object,
    name: str | None,
    is_parallel: bool,
) -> Fields:
    """Tools and the choice among them: no choice is `auto`, and `auto` is `strict` where a tool is strict.

    `param` is the field of a tool that has its parameters; `name` is that of the one tool that is called.
    Raises InvalidRequest for two tools of one name, and for a choice of a tool that is not there.
    """
    names = [function.name for function, _ in tools]
    if len(set(names)) != len(names):
        raise InvalidRequest("two tools have the same name", param="tools")
    if not names:
        if choice == "required" or name is not None:
            raise InvalidRequest("tool_choice goes with tools only", param="tool_choice")
        return {}
    if name is not None and name not in names:
        words = f"tool_choice names {name[:64]!r}, which is not among the tools"
        raise InvalidRequest(words, param="tool_choice")
    if choice in (None, "auto"):
        choice = "strict" if any(function.strict for function, _ in tools) else "auto"
    told = [_tool(*tool, f"tools[{index}].{param}") for index, tool in enumerate(tools)]
    return {
        "tools": json_text(told, "tools", MAX_TOOLS_CHARACTERS),
        "tool_choice": choice if name is None else "function",
        "tool_name": name or "",
        "parallel_tool_calls": is_parallel,
    }


def _tool(function: Described, parameters: Fields | None, param: str) -> Fields:
    """In OpenAI's form."""
    schema = parameters or {"type": "object", "properties": {}}
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"{param} must be a schema of type 'object'", param=param)
    json_text(schema, param, MAX_SCHEMA_CHARACTERS)
    told: Fields = {"name": function.name, "description": function.description, "parameters": schema}
    if function.description is None:
        del told["description"]
    if function.strict:
        told["strict"] = True
    return {"type": "function", "function": told}


def format_schema(wanted: object, param: str) -> str:
    """The schema that a format asks the text to be valid under; empty for free text."""
    if isinstance(wanted, NamedSchema):
        return json_text(wanted.schema, f"{param}.schema", MAX_SCHEMA_CHARACTERS)
    return ANY_OBJECT if isinstance(wanted, JsonObject) else ""


def json_text(value: Any, param: str, max_characters: int) -> str:
    """What is passed on as JSON. Raises InvalidRequest for what is nested too deeply or too long."""
    if not is_shallow(value):
        words = f"{param} is nested too deeply: at most {MAX_NESTING} levels"
        raise InvalidRequest(words, param=param)
    try:
        text = _dump(value)
    except ValueError as error:  # a number like 1e999, which JSON can write and floats cannot hold
        raise InvalidRequest(f"{param} holds a number that is out of range", param=param) from error
    if len(text) > max_characters:
        words = f"{param} is too long: at most {max_characters} characters of JSON"
        raise InvalidRequest(words, param=param)
    return text
