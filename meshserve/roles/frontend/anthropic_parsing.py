"""Anthropic's Messages API: from the body of a request to a chat. Pure."""

from typing import Any

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.fields import (
    Fields,
    boolean,
    integer,
    json_text,
    optional_integer,
    optional_list,
    optional_number,
    optional_object,
    optional_string,
    read_object,
    refuse,
    string,
    strings,
)
from meshserve.roles.frontend.messages import MAX_CALLS, Message, check_calls, text_of_parts
from meshserve.roles.frontend.parsing import (
    MAX_SESSION_CHARACTERS,
    SEEDS,
    ResponseOptions,
    read_extension,
    read_min_p,
    read_repetition_penalty,
    read_top_p,
)
from meshserve.roles.frontend.tooling import MAX_TOOLS, Tools, function_tool, with_choice
from meshserve.wire.completion import MAX_COUNT, MAX_MESSAGES, MAX_STOPS, CompletionRequest

NOT_DONE: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": ({},),
    "inference_geo": (),
    "mcp_servers": ([],),
    "output_config": ({},),
    "output_format": (),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "thinking": ({"type": "disabled"},),
}
PARAMS = {"stop": "stop_sequences", "prompt": "messages", "tool_name": "tool_choice"}
"""How this API calls what a processor may find fault with."""
THOUGHTS = ("thinking", "redacted_thinking")
"""Blocks of earlier answers that no model is shown again."""
MAX_TEMPERATURE = 1.0
_MAX_ARGUMENTS = 1_048_576


def parse_message(body: bytes, request_id: str, client_id: str) -> tuple[CompletionRequest, ResponseOptions]:
    """`POST /v1/messages`. Raises InvalidRequest that names the field."""
    fields = read_object(body)
    max_tokens = optional_integer(fields, "max_tokens", 1, MAX_COUNT)
    if max_tokens is None:
        raise InvalidRequest("max_tokens is missing", param="max_tokens")
    metadata = optional_object(fields, "metadata") or {}
    session = optional_string(metadata, "user_id", "metadata.user_id") or ""
    wants_receipt, policy = read_extension(fields)
    is_stream = boolean(fields, "stream")
    request = CompletionRequest(
        request_id=request_id,
        kind="chat",
        **_asked(fields),
        max_tokens=max_tokens,
        min_tokens=integer(fields, "min_tokens", 0, max_tokens, 0),
        temperature=optional_number(fields, "temperature", 0.0, MAX_TEMPERATURE),
        top_p=read_top_p(fields),
        top_k=optional_integer(fields, "top_k", 0, MAX_COUNT),
        min_p=read_min_p(fields),
        repetition_penalty=read_repetition_penalty(fields),
        seed=optional_integer(fields, "seed", *SEEDS),
        ignore_eos=boolean(fields, "ignore_eos"),
        stop=strings(fields, "stop_sequences", MAX_STOPS),
        wants_start=is_stream,
        client_id=client_id,
        wants_receipt=wants_receipt,
        policy=policy,
        session=session[:MAX_SESSION_CHARACTERS],
    )
    return request, ResponseOptions(is_stream)


def parse_count(body: bytes, request_id: str) -> CompletionRequest:
    """`POST /v1/messages/count_tokens`."""
    return CompletionRequest(request_id=request_id, kind="chat", **_asked(read_object(body)))


def _asked(fields: Fields) -> dict[str, Any]:
    """What counts as input."""
    refuse(fields, NOT_DONE)
    tools = _tools(fields)
    return {
        "model": string(fields, "model"),
        "messages": _messages(fields),
        "tools": tools.text("tools"),
        "tool_choice": tools.choice,
        "tool_name": tools.name,
        "parallel_tool_calls": tools.is_parallel,
    }


def _tools(fields: Fields) -> Tools:
    given = optional_list(fields, "tools", max_length=MAX_TOOLS) or []
    definitions = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(given))
    choice = optional_object(fields, "tool_choice")
    if choice is None:
        return with_choice(definitions, None, "")
    is_single = boolean(choice, "disable_parallel_tool_use", "tool_choice.disable_parallel_tool_use")
    kind = string(choice, "type", "tool_choice.type")
    if kind not in ("auto", "any", "tool", "none"):
        raise InvalidRequest(f"tool_choice.type must be auto, any, tool or none, not {kind[:64]!r}", param="tool_choice.type")
    name = string(choice, "name", "tool_choice.name") if kind == "tool" else ""
    return with_choice(definitions, {"any": "required", "tool": "function"}.get(kind, kind), name, not is_single)


def _tool(value: Any, param: str) -> Fields:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object", param=param)
    kind = value.get("type", "custom")
    if kind not in (None, "custom"):
        raise Unsupported(f"{param}: tools of type {str(kind)[:64]!r} are not supported, only 'custom'", param=f"{param}.type")
    if value.get("input_schema") is None:
        raise InvalidRequest(f"{param}.input_schema is missing", param=f"{param}.input_schema")
    return function_tool(value, param, "input_schema")


def _messages(fields: Fields) -> list[Message]:
    given = optional_list(fields, "messages", max_length=MAX_MESSAGES)
    if not given:
        raise InvalidRequest("messages is missing" if given is None else "messages must have at least one message", param="messages")
    messages: list[Message] = []
    if (system := fields.get("system")) is not None:
        messages.append({"role": "system", "content": text_of_parts(system, "system")})
    for index, message in enumerate(given):
        _add_message(messages, message, f"messages[{index}]")
    check_calls(messages, "messages")
    if messages[-1]["role"] == "assistant":
        raise Unsupported("messages: the last one must be the user's; an answer that is begun already is not continued", param="messages")
    return messages


def _add_message(messages: list[Message], value: Any, param: str) -> None:
    role = value.get("role") if isinstance(value, dict) else None
    if role not in ("user", "assistant"):
        raise InvalidRequest(f"{param} must be an object with the role user or assistant", param=param)
    content = value.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise InvalidRequest(f"{param}.content must be text, or a list of blocks", param=f"{param}.content")
    if role == "user":
        _add_user(messages, blocks, f"{param}.content")
    else:
        _add_assistant(messages, blocks, f"{param}.content")


def _add_user(messages: list[Message], blocks: list[Fields], param: str) -> None:
    """Results of tools are messages of their own, and come first, so that they follow the calls that they answer."""
    results = [index for index, block in enumerate(blocks) if block.get("type") == "tool_result"]
    if results != list(range(len(results))):
        raise InvalidRequest(f"{param}: tool_result blocks come before all others", param=param)
    messages += [_result(blocks[index], f"{param}[{index}]") for index in results]
    if len(results) < len(blocks) or not blocks:
        messages.append({"role": "user", "content": text_of_parts(blocks[len(results) :], param)})


def _result(block: Fields, param: str) -> Message:
    content = block.get("content")
    text = "" if content is None else text_of_parts(content, f"{param}.content")
    failed = boolean(block, "is_error", f"{param}.is_error")
    answered = string(block, "tool_use_id", f"{param}.tool_use_id")
    return {"role": "tool", "tool_call_id": answered, "content": f"Error: {text}" if failed else text}


def _add_assistant(messages: list[Message], blocks: list[Fields], param: str) -> None:
    calls = [(index, block) for index, block in enumerate(blocks) if block.get("type") == "tool_use"]
    if len(calls) > MAX_CALLS:
        raise InvalidRequest(f"{param}: at most {MAX_CALLS} tool_use blocks", param=param)
    texts = [block for block in blocks if block.get("type") not in ("tool_use", *THOUGHTS)]
    message: Message = {"role": "assistant", "content": text_of_parts(texts, param)}
    if calls:
        message["tool_calls"] = [_use(block, f"{param}[{index}]") for index, block in calls]
    messages.append(message)


def _use(block: Fields, param: str) -> dict[str, str]:
    arguments = optional_object(block, "input", f"{param}.input") or {}
    return {
        "id": string(block, "id", f"{param}.id"),
        "name": string(block, "name", f"{param}.name"),
        "arguments": json_text(arguments, f"{param}.input", _MAX_ARGUMENTS),
    }
