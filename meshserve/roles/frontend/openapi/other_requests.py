"""Schemas of the bodies that `responses_parsing.py` and `anthropic_parsing.py` read. Pure."""

from meshserve.roles.frontend import anthropic_parsing, responses_parsing
from meshserve.roles.frontend.openapi.requests import MIN_P, MODEL, REPETITION_PENALTY, STREAM_OPTIONS_RULE, TOP_P
from meshserve.roles.frontend.openapi.schemas import (
    NULL,
    Schema,
    array,
    either,
    kind,
    labels,
    needs_tools,
    neutral,
    one_of,
    optional_boolean,
    optional_integer,
    optional_number,
    optional_string,
    or_null,
    record,
    ref,
    string,
    strings,
    told,
)
from meshserve.roles.frontend.openapi.tools import FORMATS, TOOLS_RULE, function, named_schema, text_or_parts, tool_choice, tools
from meshserve.roles.frontend.parsing import MAX_TEMPERATURE, SEEDS
from meshserve.wire.completion import MAX_COUNT, MAX_LOGPROBS, MAX_MESSAGES, MAX_STOPS

_TOOLS_RULE = needs_tools(either(record({"type": one_of("auto", "none")}, ["type"]), NULL))


def _response() -> Schema:
    """OpenAI's Responses."""
    verbosity = one_of("medium", None)
    body = record(
        {
            "model": MODEL,
            "input": either({"type": "string"}, array(ref("ResponseItem"), 1, MAX_MESSAGES)),
            "instructions": optional_string(),
            "max_output_tokens": optional_integer(1, MAX_COUNT),
            "max_tool_calls": optional_integer(1, MAX_COUNT),
            "metadata": {"type": ["object", "null"]},
            "min_tokens": optional_integer(0, MAX_COUNT, 0),
            "temperature": optional_number(0, MAX_TEMPERATURE),
            "top_p": TOP_P,
            "min_p": MIN_P,
            "repetition_penalty": REPETITION_PENALTY,
            "seed": optional_integer(*SEEDS),
            "ignore_eos": optional_boolean(),
            "include": {
                "type": ["array", "null"],
                "items": {"enum": list(responses_parsing.INCLUDED)},
                "maxItems": responses_parsing.MAX_INCLUDED,
            },
            "top_logprobs": told(optional_integer(0, MAX_LOGPROBS), f"Goes with `include` of `{responses_parsing.LOGPROBS}` only."),
            "text": or_null(record({"format": ref("ResponseTextFormat"), "verbosity": verbosity})),
            "tools": ref("ResponseTools"),
            "tool_choice": tool_choice(record({"type": kind("function"), "name": string()}, ["type", "name"])),
            "parallel_tool_calls": optional_boolean(True),
            "stream": optional_boolean(),
            "stream_options": told({"type": ["object", "null"]}, "Goes with `stream` only."),
            "meshserve": ref("Extension"),
            **labels(responses_parsing.LABELS),
            **neutral(responses_parsing.NOT_DONE),
        },
        ["model", "input"],
    )
    included = {"properties": {"include": {"type": "array", "contains": {"const": responses_parsing.LOGPROBS}}}, "required": ["include"]}
    return {**body, "allOf": [STREAM_OPTIONS_RULE, TOOLS_RULE, either(included, {"properties": {"top_logprobs": one_of(0, None)}})]}


def _response_items() -> Schema:
    content = text_or_parts(*responses_parsing.PARTS)
    message = {"type": kind("message"), "role": {"type": "string", "enum": list(responses_parsing.ROLES)}, "content": content}
    call = {"type": kind("function_call"), "call_id": string(), "name": string(), "arguments": optional_string()}
    output = {"type": kind("function_call_output"), "call_id": string(), "output": content}
    return either(
        record(message, ["role", "content"]),
        told(record(call, ["type", "call_id", "name"]), "Answered by an output right after it, and the calls that follow each other."),
        record(output, ["type", "call_id", "output"]),
        told(record({"type": kind("reasoning")}, ["type"]), "Of an earlier answer; no model is shown it again."),
    )


def _message() -> Schema:
    """Anthropic's Messages."""
    fields = {
        **_counted(),
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_COUNT},
        "min_tokens": told(optional_integer(0, MAX_COUNT, 0), "At most `max_tokens`."),
        "temperature": optional_number(0, anthropic_parsing.MAX_TEMPERATURE),
        "top_p": TOP_P,
        "top_k": optional_integer(0, MAX_COUNT),
        "min_p": MIN_P,
        "repetition_penalty": REPETITION_PENALTY,
        "seed": optional_integer(*SEEDS),
        "ignore_eos": optional_boolean(),
        "stop_sequences": strings(MAX_STOPS),
        "metadata": or_null(record({"user_id": optional_string()})),
        "stream": optional_boolean(),
        "meshserve": ref("Extension"),
    }
    return {**record(fields, ["model", "messages", "max_tokens"]), "allOf": [_TOOLS_RULE]}


def _counted() -> dict[str, Schema]:
    """What counts as input."""
    return {
        "model": MODEL,
        "messages": told(array(ref("AnthropicMessage"), 1, MAX_MESSAGES), "The last one is the user's."),
        "system": either(*text_or_parts("text")["anyOf"], NULL),
        "tools": ref("AnthropicTools"),
        "tool_choice": ref("AnthropicToolChoice"),
        **neutral(anthropic_parsing.NOT_DONE),
    }


def _anthropic_message() -> Schema:
    text = record({"type": kind("text"), "text": {"type": "string"}}, ["type", "text"])
    result = record(
        {
            "type": kind("tool_result"),
            "tool_use_id": string(),
            "content": either(*text_or_parts("text")["anyOf"], NULL),
            "is_error": optional_boolean(),
        },
        ["type", "tool_use_id"],
    )
    use = record(
        {"type": kind("tool_use"), "id": string(), "name": string(), "input": {"type": ["object", "null"]}}, ["type", "id", "name"]
    )
    user = {"role": kind("user"), "content": either({"type": "string"}, array(either(text, result)))}
    thought = told(record({"type": one_of(*anthropic_parsing.THOUGHTS)}, ["type"]), "Of an earlier answer; no model is shown it again.")
    assistant = {"role": kind("assistant"), "content": either({"type": "string"}, array(either(text, use, thought)))}
    return either(
        told(record(user, ["role", "content"]), "`tool_result` blocks come first, one for each `tool_use` of the message before."),
        record(assistant, ["role", "content"]),
    )


def _anthropic_choice() -> Schema:
    quiet = {"disable_parallel_tool_use": optional_boolean()}
    named = record({"type": kind("tool"), "name": string(), **quiet}, ["type", "name"])
    return either(record({"type": {"type": "string", "enum": ["auto", "any", "none"]}, **quiet}, ["type"]), named, NULL)


def components() -> dict[str, Schema]:
    """Schemas of requests and their parts, by name."""
    described, required = function()
    flat = record({"type": kind("function"), **described}, ["type", *required])
    anthropic, its_required = function("input_schema", required=True)
    json_schema = record({"type": kind("json_schema"), **named_schema()}, ["type", "name", "schema"])
    return {
        "ResponseRequest": _response(),
        "ResponseItem": _response_items(),
        "ResponseTools": tools(flat),
        "ResponseTextFormat": or_null(either(record({"type": {"type": "string", "enum": list(FORMATS)}}, ["type"]), json_schema)),
        "MessageRequest": _message(),
        "CountRequest": {**record(_counted(), ["model", "messages"]), "allOf": [_TOOLS_RULE]},
        "AnthropicMessage": _anthropic_message(),
        "AnthropicTools": tools(record({"type": one_of("custom", None), **anthropic}, its_required)),
        "AnthropicToolChoice": _anthropic_choice(),
    }
