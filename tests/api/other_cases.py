"""Cases for the Responses API, for Anthropic's messages, and for refusals in every API: as those of :mod:`tests.api.cases`."""

import json
import re
from typing import Any

from tests.api.cases import CASES, CLOCK, GO_ON, SCHEMA, USER, WEATHER, case, chat, completion
from tests.api.clients import Clients, plain, refusal

FUNCTION: Any = {"type": "function", "strict": False, **WEATHER["function"]}
TOOL: Any = {"name": "get_weather", "description": "The weather in a city", "input_schema": WEATHER["function"]["parameters"]}


def respond(clients: Clients, **fields: Any) -> Any:
    """A response of six tokens."""
    asked = {"model": "dummy", "input": "Tell me about the harbor", "max_output_tokens": 6, "extra_body": GO_ON, **fields}
    return clients.openai.responses.create(**asked)


def message(clients: Clients, **fields: Any) -> Any:
    """A message of six tokens."""
    return clients.anthropic.messages.create(**{"model": "dummy", "messages": USER, "max_tokens": 6, "extra_body": GO_ON, **fields})


# --- what other servers take besides


@case
def a_min_p_of_one_is_greedy_in_every_api(clients: Clients) -> Any:
    greedy = chat(clients, temperature=0).choices[0].message.content
    drawn: Any = {"extra_body": {"temperature": 1.0, "seed": 9, "min_p": 1, **GO_ON}}
    assert chat(clients, **drawn).choices[0].message.content == respond(clients, **drawn).output_text == greedy
    assert message(clients, **drawn).content[0].text == greedy
    return greedy


@case
def a_repetition_penalty_changes_what_is_said_again(clients: Clients) -> Any:
    texts = []
    for penalty in (1, 2, 0.2):
        asked: Any = {"extra_body": {"repetition_penalty": penalty, **GO_ON}}
        texts.append(message(clients, max_tokens=60, **asked).content[0].text)
        assert chat(clients, max_tokens=60, **asked).choices[0].message.content == texts[-1]
        assert respond(clients, max_output_tokens=60, **asked).output_text == texts[-1]
    assert len(set(texts)) == 3
    return texts


@case
def structured_outputs_are_asked_for_as_of_vllm(clients: Clients) -> Any:
    replies = []
    for asked in ({"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}, {"structured_outputs": {"json": SCHEMA}}):
        replies.append(chat(clients, max_tokens=300, extra_body=asked).choices[0].message.content)
    assert type(json.loads(replies[0])["answer"]) is int and len(set(replies)) == 1
    replies += [chat(clients, max_tokens=300, extra_body={"guided_regex": "[a-c]{3}-[0-9]{2}"}).choices[0].message.content]
    replies += [chat(clients, max_tokens=300, extra_body={"guided_choice": ["red", "green"]}).choices[0].message.content]
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", replies[-2]) and replies[-1] in ("red", "green")
    refused = refusal(lambda: completion(clients, extra_body={"guided_regex": "a", "guided_choice": ["a"]}))
    assert refused["param"] == "guided_choice" and refused["status"] == 400
    return [replies, refused]


# --- the Responses API


@case
def a_response(clients: Clients) -> Any:
    reply = respond(clients)
    assert reply.id.startswith("resp_") and reply.object == "response" and reply.status == "incomplete"
    assert reply.incomplete_details.reason == "max_output_tokens" and reply.usage.output_tokens == 6
    assert reply.output_text == chat(clients).choices[0].message.content
    return plain(reply)


@case
def a_response_that_ends_by_itself(clients: Clients) -> Any:
    reply = respond(clients, max_output_tokens=2000, extra_body={})
    assert reply.status == "completed" and reply.incomplete_details is None
    return plain(reply)


@case
def a_response_streamed(clients: Clients) -> Any:
    events = list(respond(clients, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == text
    assert plain(events[-1].response) == plain(respond(clients))
    return [event.type for event in events]


@case
def a_response_with_instructions_and_items(clients: Clients) -> Any:
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Tell me about the harbor"}]}]
    reply = respond(clients, instructions="Be brief", input=items)
    assert reply.output_text == chat(clients, messages=[{"role": "system", "content": "Be brief"}, *USER]).choices[0].message.content
    return plain(reply)


@case
def a_response_calls_a_function_and_takes_its_result(clients: Clients) -> Any:
    asked = respond(clients, tools=[FUNCTION], max_output_tokens=300, extra_body={})
    (call,) = asked.output
    assert call.type == "function_call" and call.name == "get_weather" and json.loads(call.arguments).keys() == {"city"}
    items = [*USER, call.model_dump(exclude_none=True), {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}]
    reply = respond(clients, input=items, tools=[FUNCTION])
    assert reply.output_text
    return [plain(asked), plain(reply)]


@case
def a_response_calls_a_function_in_a_stream(clients: Clients) -> Any:
    with clients.openai.responses.stream(model="dummy", input="Hello", tools=[FUNCTION]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.done" in kinds and kinds[-1] == "response.completed"
    return [kinds, plain(final)]


@case
def a_response_under_a_schema(clients: Clients) -> Any:
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"], "additionalProperties": False}
    wanted = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    reply = respond(clients, text=wanted, max_output_tokens=300, extra_body={})
    assert json.loads(reply.output_text).keys() == {"answer"}
    return plain(reply)


@case
def a_response_with_logprobs(clients: Clients) -> Any:
    reply = respond(clients, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = reply.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries) == reply.output_text and len(entries[0].top_logprobs) == 2
    return plain(reply)


# --- Anthropic's messages


@case
def a_message(clients: Clients) -> Any:
    reply = message(clients)
    assert reply.id.startswith("msg_") and reply.stop_reason == "max_tokens" and reply.usage.output_tokens == 6
    assert reply.content[0].text == chat(clients).choices[0].message.content
    return plain(reply)


@case
def a_message_that_ends_by_itself(clients: Clients) -> Any:
    reply = message(clients, max_tokens=2000, extra_body={})
    assert reply.stop_reason == "end_turn"
    return plain(reply)


@case
def a_message_streamed(clients: Clients) -> Any:
    with clients.anthropic.messages.stream(model="dummy", messages=USER, max_tokens=6, extra_body=GO_ON) as stream:
        kinds = [event.type for event in stream if event.type != "text"]
        final = stream.get_final_message()
    assert plain(final) == plain(message(clients)) and kinds[0] == "message_start" and kinds[-1] == "message_stop"
    return [kinds, plain(final)]


@case
def a_message_with_system_and_a_stop_sequence(clients: Clients) -> Any:
    text = message(clients, max_tokens=30, system="Be brief").content[0].text
    reply = message(clients, max_tokens=30, system=[{"type": "text", "text": "Be brief"}], stop_sequences=[text[20:25]])
    assert reply.stop_reason == "stop_sequence" and reply.stop_sequence == text[20:25]
    assert reply.content[0].text == text[: text.index(text[20:25])]
    return plain(reply)


@case
def a_message_is_sampled(clients: Clients) -> Any:
    sampled = {"temperature": 0.9, "top_p": 0.9, "top_k": 7, "seed": 4}  # not all versions of the client name the first two
    return plain(message(clients, extra_body={**sampled, **GO_ON}))


@case
def a_message_uses_a_tool_and_takes_its_result(clients: Clients) -> Any:
    asked = message(clients, tools=[TOOL], max_tokens=300, extra_body={})
    (use,) = asked.content
    assert asked.stop_reason == "tool_use" and use.name == "get_weather" and use.input.keys() == {"city"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "Sunny"}
    messages = [*USER, {"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
    reply = message(clients, messages=messages, tools=[TOOL])
    assert reply.content[0].text
    return [plain(asked), plain(reply)]


@case
def a_message_uses_a_tool_in_a_stream(clients: Clients) -> Any:
    choice: Any = {"type": "tool", "name": "get_weather"}
    with clients.anthropic.messages.stream(model="dummy", messages=USER, max_tokens=300, tools=[TOOL], tool_choice=choice) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    assert plain(final) == plain(message(clients, tools=[TOOL], tool_choice=choice, max_tokens=300, extra_body={}))
    return plain(final)


@case
def a_messages_tokens_are_counted(clients: Clients) -> Any:
    counted = clients.anthropic.messages.count_tokens(model="dummy", messages=USER).input_tokens
    assert counted == chat(clients).usage.prompt_tokens
    return counted


# --- what asks for no other answer


@case
def what_no_engine_does_is_ignored_and_named_where_it_changes_no_answer(clients: Clients) -> Any:
    effort = {"reasoning_effort": "high", "store": True, "metadata": {"a": "b"}}
    server_tools = {"reasoning": {"effort": "low", "summary": "auto"}, "tools": [{"type": "web_search"}], "truncation": "auto"}
    thinks = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "service_tier": "auto"}
    asked: list[Any] = [
        (chat(clients), clients.openai.chat.completions, {"messages": USER, "max_tokens": 6}, effort),
        (respond(clients), clients.openai.responses, {"input": "Tell me about the harbor", "max_output_tokens": 6}, server_tools),
        (message(clients), clients.anthropic.messages, {"messages": USER, "max_tokens": 6}, thinks),
    ]
    found = []
    for expected, api, fields, more in asked:
        raw = api.with_raw_response.create(model="dummy", extra_body=GO_ON, **fields, **more)
        assert plain(raw.parse()) == plain(expected)
        found.append(sorted(raw.headers["x-meshserve-ignored"].split(", ")))
    assert found == [
        ["metadata", "reasoning_effort", "store"],
        ["reasoning", "tools.web_search", "truncation"],
        ["thinking"],
    ]
    return found


ODD: Any = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {
        "pick": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        "when": {"type": "string", "format": "natural-language", "pattern": "^(?!never)"},
        "many": {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "minProperties": 1},
    },
    "not": {"required": ["pick", "when"]},
}
"""No output can be kept to this."""


@case
def a_schema_binds_only_where_it_is_asked_to(clients: Clients) -> Any:
    function: Any = {"name": "odd", "description": "Does what it does", "parameters": ODD}
    chats: Any = [{"type": "function", "function": function}]
    flat: Any = [{"type": "function", "strict": False, **function}]
    own: Any = [{"name": "odd", "input_schema": ODD}]
    called = [
        chat(clients, tools=chats, max_tokens=300, extra_body={}).choices[0].message.tool_calls[0].function.name,
        respond(clients, tools=flat, max_output_tokens=300, extra_body={}).output[0].name,
        message(clients, tools=own, max_tokens=300, extra_body={}).content[-1].name,
    ]
    assert called == ["odd"] * 3
    found = [
        refusal(lambda: chat(clients, tools=chats, tool_choice="required")),
        refusal(lambda: respond(clients, tools=[{**flat[0], "strict": True}])),
        refusal(lambda: respond(clients, tools=flat, tool_choice={"type": "function", "name": "odd"})),
        refusal(lambda: message(clients, tools=own, tool_choice={"type": "any"})),
    ]
    for refused_call in found:
        assert refused_call["status"] == 400 and refused_call["param"] == "tools", refused_call
        assert "not at # of the tool 'odd'" in refused_call["message"], refused_call
    return found


# --- refusals


def refused(name: str, status: int, param: str | None, ask: Any) -> None:
    """A case: this is refused with this status, and the field is named."""

    def run(clients: Clients) -> Any:
        found = refusal(lambda: ask(clients))
        assert (found["status"], found["param"]) == (status, param), found
        assert found["message"] and found["code"]
        return found

    run.__name__ = f"refused_{name}"
    CASES.append(run)


refused("unknown_model", 404, "model", lambda clients: chat(clients, model="gpt-9"))
refused("unknown_model_of_a_message", 404, "model", lambda clients: message(clients, model="gpt-9"))
refused("too_many_answers", 400, "n", lambda clients: chat(clients, n=129))
refused("too_many_prompts", 400, "prompt", lambda clients: completion(clients, prompt=["x"] * 129))
refused("best_of", 400, "best_of", lambda clients: completion(clients, best_of=4))
refused("suffix", 400, "suffix", lambda clients: completion(clients, suffix="the end"))
refused("image", 400, "messages[0].content[0]", lambda clients: chat(
    clients, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]))  # fmt: skip
refused("image_in_a_message", 400, "messages[0].content[0]", lambda clients: message(clients, messages=[{"role": "user", "content": [
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}]}]))  # fmt: skip
refused("functions", 400, "functions", lambda clients: chat(clients, functions=[{"name": "f"}]))
refused("unknown_tool", 400, "tool_choice", lambda clients: chat(
    clients, tools=[CLOCK], tool_choice={"type": "function", "function": {"name": "get_weather"}}))  # fmt: skip
refused("unanswered_call", 400, "messages", lambda clients: chat(clients, messages=[*USER, {"role": "assistant", "tool_calls": [
    {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, *USER]))  # fmt: skip
refused("longer_than_the_context", 400, "messages", lambda clients: chat(clients, max_tokens=1_000_000))
refused("longer_than_the_context_streamed", 400, "messages", lambda clients: list(chat(clients, max_tokens=1_000_000, stream=True)))
refused("longer_than_the_context_response", 400, "input", lambda clients: respond(clients, max_output_tokens=1_000_000))
refused("temperature", 400, "temperature", lambda clients: chat(clients, temperature=3))
refused("previous_response", 404, "previous_response_id", lambda clients: respond(clients, previous_response_id="resp_1"))
refused("policy", 400, "meshserve.policy", lambda clients: chat(clients, extra_body={"meshserve": {"policy": "best"}}))


@case
def bodies_that_no_client_sends_are_refused(clients: Clients) -> Any:
    hostile = [b'{"model": NaN}', b'{"a": 1, "a": 2}', b'{"x":' * 5000, b'{"model": "\\ud800"}', b'{"n": ' + b"9" * 5000 + b"}"]
    bodies = [b"", b"[]", b"{", *hostile]
    found = []
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/v1/messages/count_tokens"):
        for body in bodies:
            answer = clients.post(path, body)
            assert answer["status"] == 400 and answer["body"]["error"]["type"] == "invalid_request_error"
            found.append(answer)
    return found
