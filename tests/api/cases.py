"""Cases for OpenAI's chats, tokens and models, and for requests without a client's help.

Each takes clients, checks what must hold in every deployment, and returns an outcome that must be the same in all of them.
"""

import json
from collections.abc import Callable
from typing import Any

import openai

from tests.api.clients import Clients, gather, plain, refusal

Case = Callable[[Clients], Any]
CASES: list[Case] = []

USER: Any = [{"role": "user", "content": "Tell me about the harbor"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False},
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
SCHEMA: Any = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"], "additionalProperties": False}
GO_ON: Any = {"ignore_eos": True}


def case(function: Case) -> Case:
    """Add to the table."""
    CASES.append(function)
    return function


def chat(clients: Clients, **fields: Any) -> Any:
    """A chat of six tokens."""
    return clients.openai.chat.completions.create(**{"model": "dummy", "messages": USER, "max_tokens": 6, "extra_body": GO_ON, **fields})


def completion(clients: Clients, **fields: Any) -> Any:
    """A completion of six tokens."""
    asked = {"model": "dummy", "prompt": "Once upon a time", "max_tokens": 6, "extra_body": GO_ON, **fields}
    return clients.openai.completions.create(**asked)


# --- chats


@case
def a_chat(clients: Clients) -> Any:
    reply = chat(clients)
    assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion" and reply.created > 1_600_000_000
    assert reply.system_fingerprint and reply.model == "dummy" and reply.usage.completion_tokens == 6
    assert reply.choices[0].message.role == "assistant" and reply.choices[0].finish_reason == "length"
    return plain(reply)


@case
def a_streamed_chat_says_the_same(clients: Clients) -> Any:
    made = gather(chat(clients, stream=True))
    assert made.usage is None and made.texts[0] == chat(clients).choices[0].message.content
    return made.outcome()


@case
def a_streamed_chat_with_usage(clients: Clients) -> Any:
    made = gather(chat(clients, stream=True, stream_options={"include_usage": True}))
    assert made.usage == plain(chat(clients).usage)
    return made.outcome()


@case
def a_chat_that_names_no_limit(clients: Clients) -> Any:
    reply = clients.openai.chat.completions.create(model="dummy", messages=USER)
    assert reply.choices[0].finish_reason == "stop"
    return plain(reply)


@case
def max_completion_tokens_counts(clients: Clients) -> Any:
    reply = chat(clients, max_tokens=openai.omit, max_completion_tokens=3)
    assert reply.usage.completion_tokens == 3
    return plain(reply)


@case
def min_tokens_holds_off_the_end(clients: Clients) -> Any:
    reply = chat(clients, max_tokens=300, extra_body={"min_tokens": 200})
    assert reply.usage.completion_tokens >= 200
    return plain(reply)


@case
def min_tokens_holds_off_stop_strings(clients: Clients) -> Any:
    reply = chat(clients, max_tokens=40, stop=[" "], extra_body={"min_tokens": 12, **GO_ON})
    assert 12 <= reply.usage.completion_tokens <= 14 and reply.choices[0].finish_reason == "stop"
    return plain(reply)


@case
def several_answers(clients: Clients) -> Any:
    reply = chat(clients, n=3, seed=5, temperature=1.0)
    assert [choice.index for choice in reply.choices] == [0, 1, 2] and reply.usage.completion_tokens == 18
    assert reply.usage.prompt_tokens == chat(clients).usage.prompt_tokens, "the prompt counts once"
    return plain(reply)


@case
def several_answers_streamed(clients: Clients) -> Any:
    made = gather(chat(clients, n=3, seed=5, temperature=1.0, stream=True, stream_options={"include_usage": True}))
    whole = chat(clients, n=3, seed=5, temperature=1.0)
    assert made.texts == {choice.index: choice.message.content for choice in whole.choices} and made.usage == plain(whole.usage)
    return made.outcome()


@case
def a_seed_makes_an_answer_repeatable(clients: Clients) -> Any:
    one, same, other = (chat(clients, seed=seed, temperature=1.5, max_tokens=20).choices[0].message.content for seed in (1, 1, 2))
    assert one == same != other
    return [one, other]


@case
def temperature_top_p_and_top_k(clients: Clients) -> Any:
    return plain(chat(clients, seed=9, temperature=0.8, top_p=0.9, extra_body={"top_k": 5, **GO_ON}))


@case
def a_top_k_of_one_is_greedy(clients: Clients) -> Any:
    reply = chat(clients, seed=9, temperature=2.0, extra_body={"top_k": 1, **GO_ON})
    assert reply.choices[0].message.content == chat(clients, temperature=0).choices[0].message.content
    return plain(reply)


@case
def a_stop_string_ends_the_text_before_it(clients: Clients) -> Any:
    text = chat(clients, max_tokens=30).choices[0].message.content
    reply = chat(clients, max_tokens=30, stop=[text[20:25], "never said"])
    assert reply.choices[0].message.content == text[: text.index(text[20:25])] and reply.choices[0].finish_reason == "stop"
    return plain(reply)


@case
def a_stop_string_streamed_never_shows_a_part_of_itself(clients: Clients) -> Any:
    text = chat(clients, max_tokens=30).choices[0].message.content
    made = gather(chat(clients, max_tokens=30, stop=text[18:27], stream=True))
    assert made.texts[0] == text[: text.index(text[18:27])] and made.reasons == {0: "stop"}
    return made.outcome()


@case
def content_in_parts(clients: Clients) -> Any:
    parts = [{"type": "text", "text": "Tell me about "}, {"type": "text", "text": "the harbor"}]
    reply = chat(clients, messages=[{"role": "user", "content": parts}])
    assert plain(reply) == plain(chat(clients))
    return plain(reply)


@case
def system_and_developer_are_one_role(clients: Clients) -> Any:
    one, other = (chat(clients, messages=[{"role": role, "content": "Be brief"}, *USER]) for role in ("system", "developer"))
    assert plain(one) == plain(other)
    return plain(one)


@case
def the_bodys_labels_change_nothing(clients: Clients) -> Any:
    reply = chat(clients, user="somebody", metadata={"a": "b"}, extra_body={"unknown_to_all": [1], **GO_ON})
    assert plain(reply) == plain(chat(clients))
    return plain(reply)


@case
def a_chats_logprobs(clients: Clients) -> Any:
    reply = chat(clients, logprobs=True, top_logprobs=3)
    entries = reply.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == reply.choices[0].message.content
    assert all(bytes(entry.bytes).decode() == entry.token and len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in entries)
    return plain(reply)


@case
def a_chats_logprobs_streamed(clients: Clients) -> Any:
    made = gather(chat(clients, logprobs=True, top_logprobs=3, stream=True))
    assert made.logprobs[0] == plain(chat(clients, logprobs=True, top_logprobs=3).choices[0].logprobs.content)
    return made.outcome()


@case
def logprobs_end_with_the_text_at_a_stop_string(clients: Clients) -> Any:
    text = chat(clients, max_tokens=30).choices[0].message.content
    reply = chat(clients, max_tokens=30, stop=text[20:24], logprobs=True)
    told = "".join(entry.token for entry in reply.choices[0].logprobs.content)
    assert told.startswith(reply.choices[0].message.content) and text.startswith(told)
    return plain(reply)


@case
def a_bias_forces_a_token(clients: Clients) -> Any:
    reply = chat(clients, logit_bias={"65": 100})
    assert reply.choices[0].message.content == "AAAAAA"
    return plain(reply)


@case
def penalties_are_taken(clients: Clients) -> Any:
    return plain(chat(clients, presence_penalty=1.0, frequency_penalty=0.5, max_tokens=20))


# --- tools and formats


@case
def a_tool_is_called(clients: Clients) -> Any:
    reply = chat(clients, tools=[WEATHER], max_tokens=300, extra_body={})
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.id and call.type == "function" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments).keys() == {"city"}
    return plain(reply)


@case
def a_tool_is_called_in_a_stream(clients: Clients) -> Any:
    made = gather(chat(clients, tools=[WEATHER], max_tokens=300, extra_body={}, stream=True))
    whole = chat(clients, tools=[WEATHER], max_tokens=300, extra_body={}).choices[0].message.tool_calls[0].function
    assert made.reasons == {0: "tool_calls"} and made.texts == {0: ""}
    assert made.calls[0]["id"] and (made.calls[0]["name"], made.calls[0]["arguments"]) == (whole.name, whole.arguments)
    return made.outcome()


@case
def the_named_tool_is_called(clients: Clients) -> Any:
    choice: Any = {"type": "function", "function": {"name": "get_time"}}
    reply = chat(clients, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=300, extra_body={})
    assert reply.choices[0].message.tool_calls[0].function.name == "get_time"
    return plain(reply)


@case
def a_required_call_is_of_one_of_the_tools(clients: Clients) -> Any:
    reply = chat(clients, tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=300, extra_body={})
    assert reply.choices[0].message.tool_calls[0].function.name in ("get_time", "get_weather")
    return plain(reply)


@case
def no_tool_is_called_where_none_may_be(clients: Clients) -> Any:
    reply = chat(clients, tools=[WEATHER], tool_choice="none")
    assert reply.choices[0].message.content and not reply.choices[0].message.tool_calls
    return plain(reply)


@case
def a_tools_result_is_answered_in_words(clients: Clients) -> Any:
    asked = chat(clients, tools=[WEATHER], max_tokens=300, extra_body={}).choices[0].message
    call = asked.tool_calls[0]
    messages = [*USER, asked.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}]
    reply = chat(clients, messages=messages, tools=[WEATHER])
    assert reply.choices[0].message.content and reply.choices[0].finish_reason == "length"
    return plain(reply)


@case
def a_schema_is_kept_to(clients: Clients) -> Any:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
    reply = chat(clients, response_format=wanted, max_tokens=300, extra_body={})
    assert type(json.loads(reply.choices[0].message.content)["answer"]) is int and reply.choices[0].finish_reason == "stop"
    return plain(reply)


@case
def any_json_object_is_one(clients: Clients) -> Any:
    reply = chat(clients, response_format={"type": "json_object"}, max_tokens=2000, extra_body={})
    assert isinstance(json.loads(reply.choices[0].message.content), dict)
    return plain(reply)


# --- ways of asking


@case
def the_asynchronous_client(clients: Clients) -> Any:
    async def ask(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(model="dummy", messages=USER, max_tokens=6, extra_body=GO_ON)

    reply = plain(clients.run(ask))
    assert reply == plain(chat(clients))
    return reply


@case
def the_asynchronous_client_streams(clients: Clients) -> Any:
    async def ask(client: openai.AsyncOpenAI) -> Any:
        stream = await client.chat.completions.create(model="dummy", messages=USER, max_tokens=6, stream=True, extra_body=GO_ON)
        return [chunk async for chunk in stream]

    made = gather(clients.run(ask))
    assert made.texts[0] == chat(clients).choices[0].message.content
    return made.outcome()


@case
def a_raw_response_has_its_request_id(clients: Clients) -> Any:
    raw = clients.openai.chat.completions.with_raw_response.create(
        model="dummy", messages=USER, max_tokens=2, extra_headers={"x-request-id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine" and raw.headers["content-type"] == "application/json"
    return plain(raw.parse())


@case
def models_are_listed(clients: Clients) -> Any:
    listed = [model.id for model in clients.openai.models.list()]
    assert listed == ["dummy"] and clients.openai.models.retrieve("dummy").object == "model"
    return [listed, refusal(lambda: clients.openai.models.retrieve("gpt-9"))]


@case
def tokens_and_back(clients: Clients) -> Any:
    made = clients.post("/tokenize", {"prompt": "hé", "return_token_strs": True})["body"]
    assert made["tokens"] == [104, 195, 169] and made["count"] == 3 and made["token_strs"][0] == "h"
    assert clients.post("/detokenize", {"tokens": made["tokens"]})["body"] == {"prompt": "hé"}
    counted = clients.post("/tokenize", {"messages": USER})["body"]["count"]
    assert counted == chat(clients).usage.prompt_tokens
    return made


@case
def a_receipt_sums_up_all_answers(clients: Clients) -> Any:
    reply = chat(clients, n=2, extra_body={"meshserve": {"receipt": True}, **GO_ON})
    receipt = reply.model_extra["meshserve"]
    assert receipt["tokens"]["completion"] == 12 and receipt["tokens"]["prompt"] == reply.usage.prompt_tokens
    return plain(reply)


@case
def generate_streams_lines(clients: Clients) -> Any:
    lines = [
        json.loads(line)
        for line in clients.http.post("/generate", json={"prompt": "hello", "request_id": "mine", "max_tokens": 2000}).text.splitlines()
    ]
    assert lines[-1]["finish_reason"] == "stop" and {line["request_id"] for line in lines} == {"mine"}
    return "".join(line.get("text", "") for line in lines)
