"""OpenAI's Responses API: from the body of a request to a chat. Pure.

Nothing is stored here, so a conversation is always given as a whole: what refers to something kept elsewhere is refused by name.
"""

from typing import Any

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.fields import (
    Fields,
    boolean,
    integer,
    optional_integer,
    optional_list,
    optional_number,
    optional_object,
    optional_string,
    read_object,
    refuse,
    string,
)
from meshserve.roles.frontend.messages import MAX_CALLS, Message, check_calls, text_of_parts
from meshserve.roles.frontend.parsing import (
    MAX_TEMPERATURE,
    SEEDS,
    ResponseOptions,
    read_extension,
    read_min_p,
    read_repetition_penalty,
    read_session,
    read_top_p,
)
from meshserve.roles.frontend.tooling import MAX_TOOLS, Tools, format_without_schema, function_tool, named_schema, with_choice
from meshserve.wire.completion import MAX_COUNT, MAX_LOGPROBS, MAX_MESSAGES, CompletionRequest

NOT_DONE: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "truncation": ("disabled",),
    "stop": ([], ""),
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
}
LABELS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
LOGPROBS = "message.output_text.logprobs"
MAX_INCLUDED = 16
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
"""Reasoning is given out as it is: nothing is encrypted."""
ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
PARTS = ("input_text", "output_text", "text")
PARAMS = {
    "prompt": "input",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "logprobs": "include",
}
"""How this API calls what a processor may find fault with."""


def parse_response(body: bytes, request_id: str, client_id: str) -> tuple[CompletionRequest, ResponseOptions]:
    """`POST /v1/responses`. Raises InvalidRequest that names the field."""
    fields = read_object(body)
    refuse(fields, NOT_DONE)
    labels = {name: optional_string(fields, name) for name in LABELS}
    tools = _tools(fields)
    schema, text = _text(fields)
    wants_receipt, policy = read_extension(fields)
    request = CompletionRequest(
        request_id=request_id,
        kind="chat",
        model=string(fields, "model"),
        messages=_messages(fields),
        max_tokens=optional_integer(fields, "max_output_tokens", 1, MAX_COUNT),
        min_tokens=integer(fields, "min_tokens", 0, MAX_COUNT, 0),
        temperature=optional_number(fields, "temperature", 0.0, MAX_TEMPERATURE),
        top_p=read_top_p(fields),
        min_p=read_min_p(fields),
        repetition_penalty=read_repetition_penalty(fields),
        seed=optional_integer(fields, "seed", *SEEDS),
        ignore_eos=boolean(fields, "ignore_eos"),
        logprobs=_logprobs(fields),
        json_schema=schema,
        tools=tools.text("tools"),
        tool_choice=tools.choice,
        tool_name=tools.name,
        parallel_tool_calls=tools.is_parallel,
        client_id=client_id,
        wants_receipt=wants_receipt,
        policy=policy,
        session=read_session(fields),
    )
    return request, ResponseOptions(_is_stream(fields), echoed={**_echoed(fields, request), **labels, "text": text})


def _is_stream(fields: Fields) -> bool:
    options = optional_object(fields, "stream_options")
    is_stream = boolean(fields, "stream")
    if options is not None and not is_stream:
        raise InvalidRequest("stream_options goes with stream only", param="stream_options")
    return is_stream


def _echoed(fields: Fields, request: CompletionRequest) -> Fields:
    """What a response repeats of its request."""
    return {
        "instructions": fields.get("instructions"),
        "max_output_tokens": request.max_tokens,
        "max_tool_calls": optional_integer(fields, "max_tool_calls", 1, MAX_COUNT),
        "metadata": optional_object(fields, "metadata") or {},
        "parallel_tool_calls": boolean(fields, "parallel_tool_calls", default=True),
        "temperature": request.temperature,
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": fields.get("tools") or [],
        "top_logprobs": max(0, request.logprobs),
        "top_p": request.top_p,
    }


def _logprobs(fields: Fields) -> int:
    included = optional_list(fields, "include", max_length=MAX_INCLUDED) or []
    for name in included:
        if name not in INCLUDED:
            raise Unsupported(f"include: {str(name)[:64]!r} is not supported", param="include")
    most = optional_integer(fields, "top_logprobs", 0, MAX_LOGPROBS)
    if most and LOGPROBS not in included:
        raise InvalidRequest(f"top_logprobs goes with include of {LOGPROBS} only", param="top_logprobs")
    return (most or 0) if LOGPROBS in included else -1


def _text(fields: Fields) -> tuple[str, Fields]:
    """The schema of `text.format`, and the form in which a response repeats `text`."""
    text = optional_object(fields, "text") or {}
    if text.get("verbosity") not in (None, "medium"):
        raise Unsupported("text.verbosity is not supported", param="text.verbosity")
    given = optional_object(text, "format", "text.format")
    given = {"type": "text"} if given is None else given
    echoed = {"format": given, "verbosity": "medium"}
    if given.get("type") == "json_schema":
        return named_schema(given, "text.format"), echoed
    return format_without_schema(given, "text.format"), echoed


def _tools(fields: Fields) -> Tools:
    given = optional_list(fields, "tools", max_length=MAX_TOOLS) or []
    definitions = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(given))
    choice, is_parallel = fields.get("tool_choice"), boolean(fields, "parallel_tool_calls", default=True)
    if choice is None or choice in ("none", "auto", "required"):
        return with_choice(definitions, choice, "", is_parallel)
    if not isinstance(choice, dict):
        raise InvalidRequest("tool_choice must be 'none', 'auto', 'required' or an object that names a function", param="tool_choice")
    if choice.get("type") != "function":
        raise Unsupported(f"tool_choice of type {str(choice.get('type'))[:64]!r} is not supported", param="tool_choice")
    return with_choice(definitions, "function", string(choice, "name", "tool_choice.name"), is_parallel)


def _tool(value: Any, param: str) -> Fields:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{param} must be an object with a type", param=param)
    if kind != "function":
        raise Unsupported(f"{param}: tools of type {kind[:64]!r} are not supported, only 'function'", param=param)
    return function_tool(value, param)


def _messages(fields: Fields) -> list[Message]:
    given = fields.get("input")
    messages: list[Message] = []
    if (instructions := optional_string(fields, "instructions")) is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given or len(given) > MAX_MESSAGES:
        word = "is missing" if given is None else f"must be text or a list of 1 to {MAX_MESSAGES} items"
        raise InvalidRequest(f"input {word}", param="input")
    for index, item in enumerate(given):
        _add_item(messages, item, f"input[{index}]")
    if not messages:
        raise InvalidRequest("input has no message", param="input")
    check_calls(messages, "input")
    return messages


def _add_item(messages: list[Message], item: Any, param: str) -> None:
    """One item of the input. Calls that follow each other, or a text of the assistant, belong to one message."""
    if not isinstance(item, dict):
        raise InvalidRequest(f"{param} must be an object", param=param)
    kind = item.get("type", "message")
    if kind == "message":
        role = ROLES.get(string(item, "role", f"{param}.role"))
        if role is None:
            raise InvalidRequest(f"{param}.role must be one of {', '.join(ROLES)}", param=f"{param}.role")
        messages.append({"role": role, "content": text_of_parts(item.get("content"), f"{param}.content", PARTS)})
    elif kind == "function_call":
        call = {name: string(item, field, f"{param}.{field}") for name, field in (("id", "call_id"), ("name", "name"))}
        _add_call(messages, {**call, "arguments": optional_string(item, "arguments", f"{param}.arguments") or "{}"}, param)
    elif kind == "function_call_output":
        answered = string(item, "call_id", f"{param}.call_id")
        messages.append({"role": "tool", "tool_call_id": answered, "content": text_of_parts(item.get("output"), f"{param}.output", PARTS)})
    elif kind != "reasoning":  # of an earlier answer: no model is shown it again
        raise Unsupported(f"{param}: items of type {str(kind)[:64]!r} are not supported", param=param)


def _add_call(messages: list[Message], call: dict[str, str], param: str) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    calls = messages[-1].setdefault("tool_calls", [])
    calls.append(call)
    if len(calls) > MAX_CALLS:
        raise InvalidRequest(f"{param}: at most {MAX_CALLS} calls may follow each other", param=param)
