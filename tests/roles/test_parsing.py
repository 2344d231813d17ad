"""From bodies to requests, and from mistakes to the name of the field at fault: tables, and laws for hostile bodies."""

import json
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.models.anthropic import parse_count, parse_message
from meshserve.roles.frontend.models.chat import parse_chat, parse_tokenize
from meshserve.roles.frontend.models.completions import parse_completion, parse_detokenize, parse_generate
from meshserve.roles.frontend.models.reading import check_json, read_object
from meshserve.roles.frontend.models.responses import parse_response
from meshserve.wire.completion import CompletionRequest

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "description": "finds", "parameters": {"type": "object", "properties": {}}},
}
STRICT = {"type": "function", "function": {**TOOL["function"], "strict": True}}
FLAT_TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True}
ASKS_NOTHING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Said all the same, so that a model's own values do not count."""
SAMPLED = tuple(ASKS_NOTHING)
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"properties": schema}
    return schema


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": "p", **fields}).encode(), "r", "c")[0]


def chat(**fields: Any) -> CompletionRequest:
    return parse_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode(), "r", "c")[0]


def response(**fields: Any) -> CompletionRequest:
    return parse_response(json.dumps({"model": "m", "input": "hi", **fields}).encode(), "r", "c")[0]


def message(**fields: Any) -> CompletionRequest:
    return parse_message(json.dumps({"model": "m", "messages": [USER], "max_tokens": 5, **fields}).encode(), "r", "c")[0]


Ask = Callable[..., CompletionRequest]


@pytest.mark.parametrize(
    ("ask", "fields", "expected"),
    [
        (completion, {}, {"prompt": "p", "max_tokens": 16, "n": 1, "logprobs": -1, "temperature": None, "stop": ()}),
        *((ask, {}, dict.fromkeys(SAMPLED)) for ask in (completion, chat, response, message)),
        *((ask, dict.fromkeys(SAMPLED), dict.fromkeys(SAMPLED)) for ask in (completion, chat, response, message)),
        *((ask, ASKS_NOTHING, ASKS_NOTHING) for ask in (completion, chat, message)),
        (response, ASKS_NOTHING, {**ASKS_NOTHING, "top_k": None}),
        (completion, {"prompt": ["p"]}, {"prompt": "p", "is_plain": True}),
        (completion, {"prompt": [1, 2]}, {"prompt": array("I", [1, 2])}),
        (completion, {"prompt": [1.0, 2], "max_tokens": 5.0}, {"prompt": array("I", [1, 2]), "max_tokens": 5}),
        (completion, {"prompt": [[1], [2]], "n": 3}, {"prompt": (array("I", [1]), array("I", [2])), "num_choices": 6}),
        (completion, {"prompt": ["a", "b"], "n": 64, "best_of": 64}, {"num_choices": 128, "is_plain": False}),
        (completion, {"max_tokens": 0, "echo": True, "logprobs": 0}, {"max_tokens": 0, "echo": True, "logprobs": 0}),
        (completion, {"stop": "x", "suffix": "", "user": "me", "whatever": {"x": 1}}, {"stop": ("x",)}),
        (completion, {"top_k": -1, "seed": -5, "ignore_eos": True, "min_tokens": 3}, {"top_k": 0, "seed": -5, "min_tokens": 3}),
        (completion, {"logit_bias": {"7": -100, "8": 0.5, "9": None}}, {"logit_bias": ((7, -100.0), (8, 0.5), (9, 0.0))}),
        (completion, {"meshserve": {"receipt": True, "policy": "random"}}, {"wants_receipt": True, "policy": "random"}),
        (completion, {"user": "alice"}, {"session": "alice"}),
        (chat, {"user": "alice", "prompt_cache_key": "chat 7"}, {"session": "chat 7"}),
        (response, {"prompt_cache_key": "chat 7"}, {"session": "chat 7"}),
        (message, {"metadata": {"user_id": "alice"}}, {"session": "alice"}),
        (chat, {}, {"messages": [USER], "max_tokens": None, "tool_choice": "none", "tools": ""}),
        (chat, {"max_tokens": 3, "max_completion_tokens": 4, "n": 2}, {"max_tokens": 4, "n": 2}),
        (chat, {"logprobs": True}, {"logprobs": 0}),
        (chat, {"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        (chat, {"logprobs": False, "top_logprobs": 0, "parallel_tool_calls": True, "tool_choice": "auto"}, {"logprobs": -1}),
        (chat, {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, USER]},
         {"messages": [{"role": "system", "content": "ab"}, USER]}),
        (chat, {"messages": [USER, ASKED, RESULT]},
         {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "name": "f", "arguments": '{"a": 1}'}]},
                       RESULT]}),
        (chat, {"tools": [TOOL]}, {"tools": json.dumps([TOOL], separators=(",", ":")), "tool_choice": "auto"}),
        (chat, {"tools": [TOOL], "tool_choice": "none"}, {"tool_choice": "none", "is_plain": True}),
        (chat, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
         {"tool_choice": "function", "tool_name": "f"}),
        (chat, {"response_format": {"type": "text"}}, {"json_schema": ""}),
        (chat, {"response_format": {"type": "json_object"}}, {"json_schema": '{"type":"object"}'}),
        (chat, {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}},
         {"json_schema": json.dumps(SCHEMA, separators=(",", ":"))}),
        (completion, {"min_p": 0.25, "repetition_penalty": 1.5}, {"min_p": 0.25, "repetition_penalty": 1.5, "needs_features": True}),
        (chat, {"min_p": None, "repetition_penalty": 1, "guided_json": None}, {"min_p": None, "repetition_penalty": 1.0}),
        (response, {"min_p": 0.5, "repetition_penalty": 2}, {"min_p": 0.5, "repetition_penalty": 2.0}),
        (message, {"min_p": 1, "repetition_penalty": 0.5}, {"min_p": 1.0, "repetition_penalty": 0.5}),
        (completion, {"guided_json": SCHEMA}, {"json_schema": json.dumps(SCHEMA, separators=(",", ":"))}),
        (completion, {"guided_json": json.dumps(SCHEMA)}, {"json_schema": json.dumps(SCHEMA, separators=(",", ":"))}),
        (completion, {"guided_regex": "a+", "response_format": {"type": "text"}}, {"regex": "a+", "json_schema": ""}),
        (completion, {"guided_choice": ["yes", "no"], "structured_outputs": {}}, {"choices": ("yes", "no"), "regex": ""}),
        (chat, {"structured_outputs": {"json": {}, "disable_fallback": False}}, {"json_schema": "{}"}),
        (chat, {"structured_outputs": {"json_object": True}}, {"json_schema": '{"type":"object"}'}),
        (chat, {"structured_outputs": {"regex": "[ab]"}}, {"regex": "[ab]"}),
        (chat, {"structured_outputs": {"choice": ["a"]}}, {"choices": ("a",), "needs_features": True}),
        (chat, {"tools": [STRICT], "parallel_tool_calls": False}, {"tool_choice": "strict", "parallel_tool_calls": False,
                                                                   "tools": json.dumps([STRICT], separators=(",", ":"))}),
        (chat, {"tools": [STRICT], "tool_choice": "none"}, {"tool_choice": "none"}),
        (message, {"tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
         {"tool_choice": "auto", "parallel_tool_calls": False}),
        (message, {"messages": [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""},
                                                                        {"type": "text", "text": "so"}]}, USER]},
         {"messages": [USER, {"role": "assistant", "content": "so", "reasoning_content": "hm"}, USER]}),
        (response, {"input": [{"type": "message", **USER}, {"type": "reasoning", "id": "rs_1", "summary": []},
                              {"type": "message", "role": "assistant", "content": "so"}, {"type": "message", **USER}]},
         {"messages": [USER, {"role": "assistant", "content": "so"}, USER]}),
        (response, {"instructions": "be brief", "max_output_tokens": 9, "store": False},
         {"messages": [{"role": "system", "content": "be brief"}, USER], "max_tokens": 9, "kind": "chat"}),
        (response, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], "stream": True}, {"messages": [USER]}),
        (response, {"input": [{"type": "message", **USER}, {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                              {"type": "function_call", "call_id": "c2", "name": "g", "arguments": ""},
                              {"type": "function_call_output", "call_id": "c2", "output": "two"},
                              {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "one"}]}]},
         {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "name": "f", "arguments": "{}"},
                                                                                  {"id": "c2", "name": "g", "arguments": "{}"}]},
                       {"role": "tool", "tool_call_id": "c2", "content": "two"},
                       {"role": "tool", "tool_call_id": "c1", "content": "one"}]}),
        (response, {"tools": [FLAT_TOOL], "tool_choice": {"type": "function", "name": "f"}}, {"tool_choice": "function", "tool_name": "f"}),
        (response, {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
         {"json_schema": json.dumps(SCHEMA, separators=(",", ":"))}),
        (response, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}, {"logprobs": 2}),
        (message, {"system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}], "stop_sequences": ["x"]},
         {"messages": [{"role": "system", "content": "be brief"}, USER], "stop": ("x",), "max_tokens": 5, "wants_start": False}),
        (message, {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "so"},
                                       {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}]},
                                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1",
                                                              "content": "bad", "is_error": True},
                                                             {"type": "text", "text": "go on"}]}]},
         {"messages": [USER, {"role": "assistant", "content": "so", "tool_calls": [{"id": "c1", "name": "f", "arguments": '{"a":1}'}]},
                       {"role": "tool", "tool_call_id": "c1", "content": "Error: bad"}, {"role": "user", "content": "go on"}]}),
        (message, {"tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}, "stream": True},
         {"tool_choice": "required", "wants_start": True}),
    ],
)  # fmt: skip
def test_a_request_is_read_as_it_is_meant(ask: Ask, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    request = ask(**fields)
    assert {name: getattr(request, name) for name in expected} == expected
    assert CompletionRequest.from_wire(request.to_wire()) == request


@pytest.mark.parametrize(
    ("ask", "fields", "param"),
    [
        (completion, {"prompt": None}, "prompt"),
        (completion, {"prompt": [1, "a"]}, "prompt"),
        (completion, {"prompt": ["a", [1]], "n": 65}, "n"),
        (completion, {"prompt": ["a"] * 129}, "prompt"),
        (completion, {"prompt": [True]}, "prompt"),
        (completion, {"prompt": [2**32]}, "prompt"),
        (completion, {"model": ""}, "model"),
        (completion, {"max_tokens": 0}, "max_tokens"),
        (completion, {"max_tokens": "5"}, "max_tokens"),
        (completion, {"max_tokens": 5.5}, "max_tokens"),
        (completion, {"prompt": [1, 2.5]}, "prompt"),
        (completion, {"prompt": [1, True]}, "prompt"),
        (completion, {"prompt": [1.0, -1.0]}, "prompt"),
        (completion, {"prompt": []}, "prompt"),
        (completion, {"best_of": True}, "best_of"),
        (completion, {"meshserve": {"policy": "nonsense"}}, "meshserve.policy"),
        (completion, {"max_tokens": 10**30}, "max_tokens"),
        (completion, {"min_tokens": 17}, "min_tokens"),
        (completion, {"n": 0}, "n"),
        (completion, {"n": True}, "n"),
        (completion, {"best_of": 3}, "best_of"),
        (completion, {"suffix": "end"}, "suffix"),
        (completion, {"logprobs": 21}, "logprobs"),
        (completion, {"logprobs": True}, "logprobs"),
        (completion, {"echo": "yes"}, "echo"),
        (completion, {"temperature": 2.5}, "temperature"),
        (completion, {"temperature": True}, "temperature"),
        (completion, {"top_p": 0}, "top_p"),
        (completion, {"seed": 2**63}, "seed"),
        (completion, {"stop": [""]}, "stop"),
        (completion, {"stop": ["x"] * 17}, "stop"),
        (completion, {"stop": [["x"]]}, "stop"),
        (completion, {"presence_penalty": 2.1}, "presence_penalty"),
        (completion, {"logit_bias": {"x": 1}}, "logit_bias"),
        (completion, {"logit_bias": {"1": 101}}, "logit_bias"),
        (completion, {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        (completion, {"stream_options": {"include_usage": True}}, "stream_options"),
        (completion, {"stream": "yes"}, "stream"),
        (completion, {"user": 7}, "user"),
        (completion, {"min_p": 1.5}, "min_p"),
        (completion, {"min_p": True}, "min_p"),
        (completion, {"repetition_penalty": 0}, "repetition_penalty"),
        (chat, {"repetition_penalty": 1e-50}, "repetition_penalty"),
        (message, {"repetition_penalty": 11}, "repetition_penalty"),
        (response, {"min_p": -0.1}, "min_p"),
        (completion, {"guided_grammar": "a"}, "guided_grammar"),
        (completion, {"guided_json": "no JSON"}, "guided_json"),
        (completion, {"guided_json": "[]"}, "guided_json"),
        (completion, {"guided_json": 7}, "guided_json"),
        (completion, {"guided_json": deep(80)}, "guided_json"),
        (completion, {"guided_regex": ""}, "guided_regex"),
        (completion, {"guided_regex": "a" * 16_385}, "guided_regex"),
        (completion, {"guided_choice": []}, "guided_choice"),
        (completion, {"guided_choice": ["a", ""]}, "guided_choice"),
        (completion, {"guided_choice": "ab"}, "guided_choice"),
        (completion, {"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        (chat, {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        (chat, {"structured_outputs": {"json": {}, "choice": ["a"]}}, "structured_outputs.choice"),
        (chat, {"structured_outputs": {"grammar": "root ::= x"}}, "grammar"),
        (chat, {"structured_outputs": "json"}, "structured_outputs"),
        (chat, {"response_format": {"type": "regex", "pattern": "a"}}, "response_format.type"),
        (completion, {"meshserve": {"policy": 7}}, "meshserve.policy"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": "hi"}, "messages"),
        (chat, {"messages": [7]}, "messages[0]"),
        (chat, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        (chat, {"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
        (chat, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content[0]"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        (chat, {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        (chat, {"messages": [{"role": "assistant"}]}, "messages[0].content"),
        (chat, {"messages": [{"role": "assistant", "content": "", "function_call": {}}]}, "messages[0].function_call"),
        (chat, {"messages": [RESULT]}, "messages"),
        (chat, {"messages": [USER, ASKED]}, "messages"),
        (chat, {"messages": [USER, ASKED, USER]}, "messages"),
        (chat, {"messages": [USER, ASKED, {**RESULT, "tool_call_id": "c2"}]}, "messages"),
        (chat, {"messages": [USER, {**ASKED, "tool_calls": [{**CALL, "type": "custom"}]}]}, "messages[1].tool_calls[0].type"),
        (chat, {"messages": [USER, {**ASKED, "tool_calls": [CALL, CALL]}, RESULT]}, "messages"),
        (chat, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        (chat, {"top_logprobs": 3}, "top_logprobs"),
        (chat, {"logprobs": 3}, "logprobs"),
        (chat, {"functions": [{"name": "f"}]}, "functions"),
        (chat, {"function_call": {"name": "f"}}, "function_call"),
        (chat, {"modalities": ["text", "audio"]}, "modalities"),
        (chat, {"tools": [7]}, "tools[0]"),
        (chat, {"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        (chat, {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        (chat, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}], "tool_choice": "required"},
         "tools[0].function.parameters"),
        (chat, {"tools": [{"type": "function", "function": {"name": "f", "parameters": deep(80)}}]}, "tools[0].function.parameters"),
        (chat, {"tools": [TOOL, TOOL]}, "tools"),
        (chat, {"tools": [TOOL] * 129}, "tools"),
        (chat, {"tool_choice": "required"}, "tool_choice"),
        (chat, {"tools": [TOOL], "tool_choice": "f"}, "tool_choice"),
        (chat, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        (chat, {"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (chat, {"response_format": "json"}, "response_format"),
        (chat, {"response_format": {"type": "grammar"}}, "response_format.type"),
        (chat, {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        (chat, {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
        (response, {"input": None}, "input"),
        (response, {"input": []}, "input"),
        (response, {"input": [{"type": "reasoning"}]}, "input"),
        (response, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        (response, {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        (response, {"conversation": "c"}, "conversation"),
        (response, {"background": True}, "background"),
        (response, {"max_output_tokens": 0}, "max_output_tokens"),
        (response, {"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        (response, {"instructions": 7}, "instructions"),
        (message, {"max_tokens": None}, "max_tokens"),
        (message, {"max_tokens": 0}, "max_tokens"),
        (message, {"temperature": 1.5}, "temperature"),
        (message, {"messages": [{"role": "king", "content": "x"}]}, "messages[0]"),
        (message, {"thread": {"id": "t"}}, "thread"),
        (message, {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type"),
        (message, {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "output_config.format"),
        (message, {"messages": [USER, {"role": "assistant", "content": "so"}]}, "messages"),
        (message, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        (message, {"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        (message, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "tool_result", "tool_use_id": "c"}]}]},
         "messages"),
        (message, {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c"}]}]}, "messages"),
        (message, {"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        (message, {"tool_choice": {"type": "any"}}, "tool_choice"),
        (message, {"system": 7}, "system"),
        (message, {"stop_sequences": [7]}, "stop_sequences"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_the_name_of_its_field(ask: Ask, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(**fields)
    assert caught.value.param == param and caught.value.http_status == 400
    assert 0 < len(caught.value.message) < 400


def test_only_an_api_with_a_role_for_tools_is_told_of_that_role() -> None:
    old = {"messages": [{"role": "function", "name": "f", "content": "x"}]}
    with pytest.raises(Unsupported, match="use the role tool"):
        chat(**old)
    with pytest.raises(InvalidRequest) as caught:
        message(**old)
    assert type(caught.value) is InvalidRequest and "role tool" not in caught.value.message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"\xff", "UTF-8"),
        (b'"text"', "must be a JSON object"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"model": "a", "model": "b"}', "'model' occurs twice"),
        (b'{"tools": [{"a": 1, "a": 2}]}', "'a' occurs twice"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested"),
        (b'{"x":' * 50_000, "nested"),
        (b'{"prompt": "\\ud800"}', "half a character"),
        (b'{"x": {"\\udc00": 1}}', "half a character"),
        (b'{"\\ud800": 1}', "half a character"),
    ],
)
def test_a_body_that_parsers_disagree_about_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_object(body)


def test_a_long_text_full_of_commas_is_not_many_values() -> None:
    with pytest.raises(InvalidRequest, match="too many values"):
        check_json(b'{"x": [' + b"0," * 600_000 + b"0]}")
    text = "a, " * 600_000
    check_json(json.dumps({"prompt": text}).encode())
    assert read_object(json.dumps({"prompt": text}).encode()) == {"prompt": text}
    assert read_object(b'{"prompt": "\\ud83d\\ude00 \\\\ud800"}') == {"prompt": "\U0001f600 \\ud800"}


def test_generate_and_the_counting_routes_read_their_simple_forms() -> None:
    request, _ = parse_generate(b'{"prompt": "p", "request_id": "mine"}', "r", "c", "first")
    assert (request.model, request.client_id, request.max_tokens) == ("first", "mine", 64)
    with pytest.raises(Unsupported):
        parse_generate(b'{"prompt": "p", "n": 2}', "r", "c", "first")
    tokenized, wants_texts = parse_tokenize(b'{"prompt": "p", "return_token_strs": true}', "r")
    assert (tokenized.kind, tokenized.prompt, tokenized.model, wants_texts) == ("completion", "p", "", True)
    asked = {"messages": [USER], "add_generation_prompt": False, "model": "m"}
    tokenized, wants_texts = parse_tokenize(json.dumps(asked).encode(), "r")
    assert (tokenized.kind, tokenized.messages, tokenized.model, wants_texts) == ("chat", [USER], "m", False)
    assert tokenized.add_generation_prompt is False
    with pytest.raises(InvalidRequest):
        parse_tokenize(json.dumps({"messages": [USER], "prompt": "p"}).encode(), "r")
    detokenized = parse_detokenize(b'{"tokens": [1, 2.0]}')
    assert (detokenized.model, detokenized.tokens) == ("", array("I", [1, 2]))
    assert parse_count(b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}', "r")[0].messages == [USER]
