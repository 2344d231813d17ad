"""What programs send that no engine does: ignored and named, or refused. Conversations that another model began."""

import json
from typing import Any

import pytest

from docs.fields import PAGE, page
from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.anthropic_writers import error_body
from meshserve.roles.frontend.models.anthropic import parse_count, parse_message
from meshserve.roles.frontend.models.chat import parse_chat
from meshserve.roles.frontend.models.common import Parsed
from meshserve.roles.frontend.models.fields import MAX_NAMED, header_line
from meshserve.roles.frontend.models.responses import parse_response

USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FUNCTION = {"name": "f", "parameters": SCHEMA}
CALLED = {"id": "c", "name": "f", "arguments": '{"a": "b"}'}


def chat(**fields: Any) -> Parsed:
    return parse_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode(), "r", "c")


def response(**fields: Any) -> Parsed:
    return parse_response(json.dumps({"model": "m", "input": "hi", **fields}).encode(), "r", "c")


def message(**fields: Any) -> Parsed:
    return parse_message(json.dumps({"model": "m", "messages": [USER], "max_tokens": 5, **fields}).encode(), "r", "c")


@pytest.mark.parametrize(
    ("parsed", "ignored"),
    [
        (chat(), []),
        (chat(store=False, service_tier="auto", verbosity=None, function_call="none"), []),
        (chat(reasoning_effort="high", verbosity="low", service_tier="flex", store=True, metadata={"a": "b"}),
         ["reasoning_effort", "verbosity", "service_tier", "store", "metadata"]),
        (chat(prediction={"type": "content", "content": "x"}, web_search_options={}, unheard_of=1),
         ["prediction", "web_search_options", "unheard_of"]),
        (chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}]),
         ["cache_control"]),
        (chat(tools=[{"type": "function", "function": FUNCTION}, {"type": "custom", "custom": {"name": "g"}}]), ["tools.custom"]),
        (response(reasoning={"effort": None, "summary": "auto"}, text={"verbosity": "low"}, truncation="auto"),
         ["reasoning", "truncation", "text.verbosity"]),
        (response(include=["reasoning.encrypted_content", "web_search_call.results"], client_metadata={"a": "b"}, store=True),
         ["client_metadata", "include.web_search_call.results"]),
        (response(tools=[{"type": "namespace", "name": "n", "tools": []}, {"type": "web_search"}, {"type": "custom", "name": "g"},
                         {"type": "tool_search"}, {"type": "function", **FUNCTION}]),
         ["tools.namespace", "tools.web_search", "tools.custom", "tools.tool_search"]),
        (message(thinking={"type": "adaptive"}, output_config={"effort": "high"}, service_tier="priority",
                 context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
         ["thinking", "service_tier", "context_management", "output_config.effort"]),
        (message(tools=[{"type": "web_search_20250305", "name": "web_search"}, {"name": "f", "input_schema": SCHEMA},
                        {"type": "bash_20250124", "name": "bash"}], mcp_servers=[{"type": "url", "url": "x", "name": "s"}]),
         ["tools.web_search_20250305", "tools.bash_20250124", "mcp_servers"]),
        (message(system=[{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]), ["cache_control"]),
    ],
)  # fmt: skip
def test_what_asks_for_no_other_answer_is_ignored_and_named(parsed: Parsed, ignored: list[str]) -> None:
    request, options = parsed
    assert options.ignored == ignored
    assert [tool["function"]["name"] for tool in json.loads(request.tools or "[]")] in ([], ["f"])


@pytest.mark.parametrize(
    ("ask", "fields"),
    [
        (chat, {"tools": [{"type": "web_search"}], "tool_choice": "required"}),
        (chat, {"tools": [{"type": "function", "function": FUNCTION}, {"type": "custom"}], "tool_choice": {"type": "custom"}}),
        (response, {"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}),
        (response, {"tools": [{"type": "web_search"}], "tool_choice": "required"}),
        (message, {"tools": [{"type": "web_search_20250305", "name": "w"}], "tool_choice": {"type": "tool", "name": "w"}}),
        (message, {"tools": [{"type": "web_search_20250305", "name": "w"}], "tool_choice": {"type": "any"}}),
    ],
)  # fmt: skip
def test_a_forced_choice_of_a_tool_that_was_left_out_is_refused(ask: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(**fields)
    assert caught.value.param == "tool_choice"


def test_a_beta_field_is_refused_in_the_words_with_which_its_client_goes_on_without() -> None:
    with pytest.raises(Unsupported) as caught:
        message(thread={"type": "create"})
    told = json.loads(error_body(caught.value))["error"]
    assert told["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert "details" not in json.loads(error_body(Unsupported("x", param="thread")))["error"]


def test_the_header_holds_nothing_but_short_plain_names() -> None:
    assert header_line(["a", "tools.web_search", "a"]) == b"x-meshserve-ignored: a, tools.web_search\r\n"
    assert header_line(["a\r\nset-cookie: b", "x" * 65, "\u00e9"]) == b"x-meshserve-ignored: ?\r\n"
    assert header_line([f"n{number}" for number in range(1000)]).count(b",") == MAX_NAMED


def test_the_page_of_fields_is_the_one_that_the_table_makes() -> None:
    assert PAGE.read_text() == page(), "python -m docs.fields writes it anew"


# --- as two coding agents send it

CODEX: dict[str, Any] = {
    "stream": True,
    "input": [
        {"type": "message", "id": "msg_1", "role": "developer", "content": [{"type": "input_text", "text": "You work on code."}],
         "internal_chat_message_metadata_passthrough": {"content_item_kinds": ["model.base_instructions"]}},
        {"type": "message", "id": "msg_2", "role": "developer", "content": [{"type": "input_text", "text": "Skills: none."},
                                                                            {"type": "input_text", "text": " No sandbox."}]},
        {"type": "message", "id": "msg_3", "role": "user", "content": [{"type": "input_text", "text": "<cwd>/work</cwd>"}]},
        {"type": "message", "id": "msg_4", "role": "user", "content": [{"type": "input_text", "text": "Write the file"}]},
    ],
    "tools": [
        {"type": "function", "name": "exec_command", "strict": False, "parameters": SCHEMA},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}},
        {"type": "namespace", "name": "agents", "tools": [{"type": "function", "name": "g", "parameters": SCHEMA}]},
        {"type": "web_search", "external_web_access": True},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "session 1",
    "client_metadata": {"turn_id": "1"},
}  # fmt: skip
CLAUDE_CODE: dict[str, Any] = {
    "stream": True,
    "max_tokens": 32_000,
    "system": [{"type": "text", "text": "billing: none;"}, {"type": "text", "text": "You help.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "<today>"},
                                     {"type": "text", "text": "Write the file", "cache_control": {"type": "ephemeral"}}]},
        {"role": "system", "content": "Agents: none."},
    ],
    "tools": [
        {"name": "Write", "description": "Writes.", "input_schema": {
            "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object",
            "properties": {"of": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}},
                           "offset": {"type": "integer", "minimum": 0, "maximum": 9007199254740991},
                           "url": {"type": "string", "format": "uri"}}}},
    ],
    "metadata": {"user_id": '{"device_id": "1"}'},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
}  # fmt: skip


def test_the_first_request_of_codex_is_read() -> None:
    request, options = response(**CODEX)
    assert request.messages is not None and [said["role"] for said in request.messages] == ["system", "system", "user", "user"]
    assert options.ignored == ["tools.custom", "tools.namespace", "tools.web_search", "reasoning", "client_metadata"]
    assert (request.tool_choice, request.session, options.is_stream) == ("auto", "session 1", True)


def test_the_first_request_of_claude_code_is_read_and_counted() -> None:
    request, options = message(**CLAUDE_CODE)
    assert request.messages is not None and [said["role"] for said in request.messages] == ["system", "user", "system"]
    assert options.ignored == ["thinking", "context_management", "output_config.effort", "cache_control"]
    asked = {name: CLAUDE_CODE[name] for name in ("messages", "system", "tools", "thinking")}
    counted, told = parse_count(json.dumps({"model": "m", **asked}).encode(), "r")
    assert counted.messages == request.messages and counted.tools == request.tools
    assert told.ignored == ["thinking", "cache_control"]


# --- a conversation that another model began

ANSWERED = {"role": "assistant", "content": "so", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("parsed", "messages", "ignored"),
    [
        (chat(messages=[USER, {"role": "assistant", "content": None, "reasoning_content": "hm"}, USER]),
         [USER, {**ANSWERED, "content": ""}, USER], []),
        (chat(messages=[USER, {"role": "assistant", "content": "so", "reasoning": "hm"}, USER]), [USER, ANSWERED, USER], []),
        (chat(messages=[USER, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "b'}}]},
                        {"role": "tool", "tool_call_id": "c", "content": "no"}]),
         [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "name": "f", "arguments": '{"a": "b'}]},
          {"role": "tool", "tool_call_id": "c", "content": "no"}], []),
        (chat(messages=[{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER]),
         [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, USER], []),
        (response(input=[USER, {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}],
                                "encrypted_content": "x"},
                         {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "so"}]}, USER]),
         [USER, ANSWERED, USER], []),
        (response(input=[USER, {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": "b"}'},
                         {"type": "reasoning", "summary": []}, {"role": "developer", "content": "be brief"},
                         {"type": "function_call_output", "call_id": "c", "output": "one"}]),
         [USER, {"role": "assistant", "content": "", "tool_calls": [CALLED]}, {"role": "tool", "tool_call_id": "c", "content": "one"},
          {"role": "system", "content": "be brief"}], []),
        (response(input=[USER, {"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "b"},
                         {"type": "custom_tool_call_output", "call_id": "c", "output": "one"},
                         {"type": "tool_search_call", "call_id": "d", "status": "completed"}, {"type": "tool_search_output", "tools": []},
                         {"type": "function_call_output", "name": "goal", "output": "done"}]),
         [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "name": "f", "arguments": '{"input": "b"}'}]},
          {"role": "tool", "tool_call_id": "c", "content": "one"}, {"role": "user", "content": "goal: done"}],
         ["input.tool_search_call", "input.tool_search_output"]),
        (message(messages=[USER, {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
            {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}, {"type": "text", "text": "so"}]}, USER]),
         [USER, ANSWERED, USER],
         ["messages.redacted_thinking", "messages.server_tool_use", "messages.web_search_tool_result"]),
        (message(messages=[USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": "b"}}]},
                           {"role": "user", "content": [{"type": "text", "text": "now"},
                                                        {"type": "tool_result", "tool_use_id": "c", "content": "one"}]},
                           {"role": "system", "content": "be brief"}]),
         [USER, {"role": "assistant", "content": "", "tool_calls": [{**CALLED, "arguments": '{"a":"b"}'}]},
          {"role": "tool", "tool_call_id": "c", "content": "one"}, {"role": "user", "content": "now"},
          {"role": "system", "content": "be brief"}], []),
        (message(messages=[{"role": "user", "content": [
            {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "words"}},
            {"type": "text", "text": "hi"}]}]),
         [{"role": "user", "content": "T\nwords\nhi"}], []),
    ],
)  # fmt: skip
def test_what_another_model_said_is_read_or_left_out_and_named(
    parsed: Parsed, messages: list[dict[str, Any]], ignored: list[str]
) -> None:
    request, options = parsed
    assert request.messages == messages
    assert options.ignored == ignored


@pytest.mark.parametrize(
    ("ask", "fields", "param"),
    [
        (message, {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64", "data": "x"}}]}]},
         "messages[0].content[0].source.type"),
        (message, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        (response, {"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        (response, {"input": [USER, {"type": "function_call", "call_id": "c", "name": "f"}]}, "input"),
        (response, {"input": [USER, {"type": "function_call_output", "output": "x"}]}, "input[1].call_id"),
    ],
)  # fmt: skip
def test_what_would_be_lost_of_a_conversation_is_refused(ask: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(**fields)
    assert caught.value.param == param
