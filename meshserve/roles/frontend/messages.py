"""A chat's messages, in the one form that all APIs are translated into, and the rules that hold for all of them. Pure.

A message is a role (`system`, `user`, `assistant`, `tool`) and its content as text; an assistant's may have `tool_calls`, each with `id`,
`name` and `arguments` (JSON text), and `reasoning_content`, which templates may show again; a tool's has the `tool_call_id` of its call.
"""

from typing import Any

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.fields import Fields, optional_list, optional_string, string
from meshserve.wire.completion import MAX_MESSAGES

Message = dict[str, Any]

TEXT_PARTS = {"system": ("text",), "user": ("text",), "assistant": ("text", "refusal"), "tool": ("text",)}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""As clients call them, and as chat templates do: `developer` is what newer models of OpenAI call `system`."""
MAX_CALLS = 128
"""Of tools, in one message."""
MAX_NAME_CHARACTERS = 256


def read_messages(fields: Fields) -> list[Message]:
    """OpenAI's `messages` of a chat. Raises InvalidRequest that names the message, or the part of it, at fault."""
    given = optional_list(fields, "messages", max_length=MAX_MESSAGES)
    if not given:
        raise InvalidRequest("messages is missing" if given is None else "messages must have at least one message", param="messages")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(given)]
    check_calls(messages, "messages")
    return messages


def check_calls(messages: list[Message], param: str) -> None:
    """Every call of a tool is answered, by messages that follow it at once. Raises InvalidRequest if not."""
    open_ids: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            if message["tool_call_id"] not in open_ids:
                words = "answers no tool call of the assistant's message before it"
                raise InvalidRequest(f"{param}: the tool message for {message['tool_call_id'][:64]!r} {words}", param=param)
            open_ids.remove(message["tool_call_id"])
            continue
        _refuse_unanswered(open_ids, param)
        open_ids = {call["id"] for call in message.get("tool_calls", ())}
        if len(open_ids) != len(message.get("tool_calls", ())):
            raise InvalidRequest(f"{param}: two tool calls of one message have the same id", param=param)
    _refuse_unanswered(open_ids, param)


def _refuse_unanswered(open_ids: set[str], param: str) -> None:
    if open_ids:
        raise InvalidRequest(f"{param}: the tool call {min(open_ids)[:64]!r} is not answered by a tool message right after it", param=param)


def _message(value: Any, param: str) -> Message:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object with a role", param=param)
    given = string(value, "role", f"{param}.role")
    if given == "function":
        raise Unsupported(f"{param}: the role function is the old form of tools; use the role tool", param=f"{param}.role")
    role = ROLES.get(given)
    if role is None:
        raise InvalidRequest(f"{param}.role must be one of {', '.join(ROLES)}, not {given[:64]!r}", param=f"{param}.role")
    message: Message = {"role": role}
    if role == "assistant":
        _read_assistant(value, message, param)
    else:
        message["content"] = text_of_parts(value.get("content"), f"{param}.content", TEXT_PARTS[role])
    if role == "tool":
        message["tool_call_id"] = string(value, "tool_call_id", f"{param}.tool_call_id")
    elif (name := optional_string(value, "name", f"{param}.name", MAX_NAME_CHARACTERS)) is not None:
        message["name"] = name
    return message


def _read_assistant(value: Fields, message: Message, param: str) -> None:
    for name in ("function_call", "audio"):
        if value.get(name) is not None:
            raise Unsupported(f"{param}.{name} is not supported", param=f"{param}.{name}")
    calls = optional_list(value, "tool_calls", f"{param}.tool_calls", MAX_CALLS)
    refusal = optional_string(value, "refusal", f"{param}.refusal")
    content = value.get("content")
    if content is None and (calls or refusal is not None):
        content = refusal or ""
    message["content"] = text_of_parts(content, f"{param}.content", TEXT_PARTS["assistant"])
    if (thought := optional_string(value, "reasoning_content", f"{param}.reasoning_content")) is not None:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [_call(call, f"{param}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _call(value: Any, param: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object", param=param)
    kind = value.get("type", "function")
    if kind != "function":
        raise Unsupported(f"{param}: only calls of type 'function' are supported", param=f"{param}.type")
    function = value.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(f"{param}.function must be an object", param=f"{param}.function")
    return {
        "id": string(value, "id", f"{param}.id"),
        "name": string(function, "name", f"{param}.function.name"),
        "arguments": optional_string(function, "arguments", f"{param}.function.arguments") or "{}",
    }


def text_of_parts(value: Any, param: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """Content as text, or as a list of parts whose texts are joined. Raises Unsupported for images, audio and other parts, by name."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        word = "is missing" if value is None else "must be text, or a list of parts"
        raise InvalidRequest(f"{param} {word}", param=param)
    return "".join(_text_of_part(part, f"{param}[{index}]", kinds) for index, part in enumerate(value))


def _text_of_part(part: Any, param: str, kinds: tuple[str, ...]) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InvalidRequest(f"{param} must be an object with a type", param=param)
    kind = part["type"]
    if kind not in kinds:
        raise Unsupported(f"{param}: parts of type {kind[:64]!r} are not supported here, only {' and '.join(kinds)}", param=param)
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{param}: a part of type {kind!r} has a text", param=param)
    return text
