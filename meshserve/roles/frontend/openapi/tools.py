"""Schemas of messages, tools and formats in OpenAI's form: what `messages.py` and `tooling.py` read. Pure."""

from meshserve.roles.frontend.messages import MAX_CALLS, MAX_NAME_CHARACTERS, ROLES, TEXT_PARTS
from meshserve.roles.frontend.openapi.schemas import (
    NULL,
    TEXT,
    Schema,
    array,
    either,
    kind,
    needs_tools,
    one_of,
    optional_boolean,
    optional_string,
    or_null,
    record,
    ref,
    string,
    told,
)
from meshserve.roles.frontend.tooling import FUNCTION_NAME, MAX_TOOLS
from meshserve.wire.completion import MAX_MESSAGES

FUNCTION_CHOICES = ("none", "auto", "required")
FORMATS = ("text", "json_object")

_PARAMETERS = told(
    {"type": ["object", "null"], "properties": {"type": {"const": "object"}}},
    "A JSON Schema of type object. What the model's engine cannot keep to is refused by name.",
)


def text_or_parts(*kinds: str) -> Schema:
    """Content as text, or as parts whose texts are joined. Images, audio and other parts are refused by name."""
    parts = [record({"type": kind(name), (field := "refusal" if name == "refusal" else "text"): TEXT}, ["type", field]) for name in kinds]
    return either(TEXT, array(parts[0] if len(parts) == 1 else either(*parts)))


def function(parameters: str = "parameters", required: bool = False) -> tuple[dict[str, Schema], list[str]]:
    """What describes a function, and what of it must be there."""
    schema = {**_PARAMETERS, "type": "object"} if required else _PARAMETERS
    properties = {
        "name": {"type": "string", "pattern": f"^{FUNCTION_NAME.pattern}$"},
        "description": optional_string(),
        parameters: schema,
        "strict": told(
            optional_boolean(), "Arguments are valid under their schema: what the model writes counts as a call only if they are."
        ),
    }
    return properties, ["name", parameters] if required else ["name"]


def tools(item: Schema) -> Schema:
    """A list of them, with names that differ."""
    return told({"type": ["array", "null"], "items": item, "maxItems": MAX_TOOLS}, "No two may have the same name.")


def tool_choice(named: Schema) -> Schema:
    """Whether one is called, and which. Without tools, none can be required."""
    return told(either(one_of(*FUNCTION_CHOICES, None), named), "`required`, or a function of the tools: it is called.")


def named_schema() -> dict[str, Schema]:
    """What a format has that is a schema."""
    return {"name": string(), "description": optional_string(), "strict": optional_boolean(), "schema": {"type": "object"}}


TOOLS_RULE = needs_tools(one_of("none", "auto", None))


def _message(role: Schema, more: dict[str, Schema], required: list[str]) -> Schema:
    return record({"role": role, **more}, ["role", *required])


def _assistant() -> Schema:
    content = text_or_parts(*TEXT_PARTS["assistant"])
    message = _message(
        kind("assistant"),
        {
            "content": either(*content["anyOf"], NULL),
            "refusal": optional_string(),
            "reasoning_content": told(optional_string(), "Of an earlier answer: the model's template decides whether it is shown again."),
            "tool_calls": {"type": ["array", "null"], "items": ref("ToolCall"), "maxItems": MAX_CALLS},
            "name": optional_string(MAX_NAME_CHARACTERS),
            "function_call": NULL,
            "audio": NULL,
        },
        [],
    )
    ways = (
        {"properties": {"content": content}, "required": ["content"]},
        {"properties": {"content": NULL, "tool_calls": {"type": "array", "minItems": 1}}, "required": ["tool_calls"]},
        {"properties": {"content": NULL, "refusal": TEXT}, "required": ["refusal"]},
    )
    return {**message, **either(*ways)}


def components() -> dict[str, Schema]:
    """Schemas of a chat's parts, by name."""
    plain = [role for role in reversed(ROLES) if role not in ("assistant", "tool")]
    said = {"content": text_or_parts("text"), "name": optional_string(MAX_NAME_CHARACTERS)}
    answer = {"content": text_or_parts("text"), "tool_call_id": string()}
    called = record({"name": string(), "arguments": told(optional_string(), "JSON.")}, ["name"])
    described, required = function()
    json_schema = record(named_schema(), ["name", "schema"])
    return {
        "Message": either(
            _message({"type": "string", "enum": plain}, said, ["content"]),
            ref("AssistantMessage"),
            told(_message(kind("tool"), answer, ["content", "tool_call_id"]), "The answer to a call, right after the message that has it."),
        ),
        "AssistantMessage": told(_assistant(), "Each of its calls is answered by a message of the role tool right after it."),
        "Messages": array(ref("Message"), 1, MAX_MESSAGES),
        "ToolCall": record({"id": string(), "type": kind("function"), "function": called}, ["id", "function"]),
        "Tool": record({"type": kind("function"), "function": record(described, required)}, ["type", "function"]),
        "Tools": tools(ref("Tool")),
        "ToolChoice": tool_choice(
            record({"type": kind("function"), "function": record({"name": string()}, ["name"])}, ["type", "function"])
        ),
        "ResponseFormat": told(
            or_null(
                either(
                    record({"type": {"type": "string", "enum": list(FORMATS)}}, ["type"]),
                    record({"type": kind("json_schema"), "json_schema": json_schema}, ["type", "json_schema"]),
                )
            ),
            "`json_schema`: the text is a document that is valid under the schema.",
        ),
    }
