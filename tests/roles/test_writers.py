"""What each API's writers make of a processor's items: shapes, the order of events, and ends that nobody can mistake."""

import json
from typing import Any

import pytest

from meshserve.errors import EngineFailed, InvalidRequest, ModelNotFound, Overloaded, ProtocolError, RequestTooLarge
from meshserve.roles.frontend import anthropic_writers, apis, shapes
from meshserve.roles.frontend.models.common import ResponseOptions
from meshserve.roles.frontend.writers import Api, Writer
from meshserve.wire.completion import CallItem, CompletionRequest, Ending, EndItem, StartItem, TextItem
from meshserve.wire.structs import plain, replace

ENDING = Ending("stop", 5, 3, 2)
ENTRY = [b"\xc3", -0.5, [[b"\xc3", -0.5], [b"a", float("-inf")]]]
Json = dict[str, Any]


def writer(api: Api, is_stream: bool = True, wants_usage: bool = False, echoed: Json | None = None, **fields: Any) -> Writer:
    kind = "completion" if api is apis.COMPLETIONS else "chat"
    given = {"prompt": "p"} if kind == "completion" else {"messages": [{"role": "user", "content": "hi"}]}
    request = CompletionRequest(request_id="abc-1", kind=kind, model="m", **{**given, **fields})
    return api.writer(7, request, ResponseOptions(is_stream, wants_usage, echoed))


def wire(*items: Any) -> list[Any]:
    return [plain(item) for item in items]


def events(data: bytes) -> list[Json]:
    """Server-sent events; the name of each, if it has one, is that in its data."""
    found = []
    for block in data.decode().split("\n\n")[:-1]:
        *names, line = block.split("\n")
        content = line.removeprefix("data: ")
        found.append({"done": True} if content == "[DONE]" else json.loads(content))
        assert names in ([], [f"event: {found[-1].get('type')}"])
    return found


def streamed(made: Writer, *items: Any, ending: Ending = ENDING) -> list[Json]:
    """The events, which do not depend on how many items came at a time."""
    return events(b"".join(made.feed([item]) for item in wire(*items)) + made.end(ending))


def whole(made: Writer, *items: Any, ending: Ending = ENDING) -> Any:
    assert made.feed(wire(*items)) == b""
    return json.loads(made.end(ending))


def test_a_plain_chat_begins_with_its_role_and_ends_with_its_reason() -> None:
    first, *rest = streamed(writer(apis.CHATS), "a", "", "b")
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]
    assert first["id"] == "chatcmpl-abc-1" and first["created"] == 7 and first["object"] == "chat.completion.chunk"
    assert [chunk["choices"][0]["delta"] for chunk in rest[:-1]] == [{"content": "a"}, {"content": "b"}, {}]
    assert rest[-2]["choices"][0]["finish_reason"] == "stop" and rest[-1] == {"done": True}
    assert all("usage" not in chunk for chunk in rest)


def test_items_that_come_together_say_the_same_as_one_by_one() -> None:
    for api in (apis.CHATS, apis.COMPLETIONS, apis.RESPONSES, apis.MESSAGES):
        one, other = writer(api), writer(api)
        assert streamed(one, "a", "", "bé") == events(other.feed(wire("a", "", "bé")) + other.end(ENDING))


@pytest.mark.parametrize("api", [apis.CHATS, apis.COMPLETIONS])
def test_usage_is_null_until_the_last_chunk_which_has_no_choices(api: Api) -> None:
    *chunks, last, done = streamed(writer(api, wants_usage=True), "a")
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks) and done == {"done": True}
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


@pytest.mark.parametrize(("wants_usage", "fields"), [(True, {}), (False, {}), (False, {"n": 2})])
def test_a_receipt_rides_on_the_last_chunk(wants_usage: bool, fields: Json) -> None:
    items = [TextItem(0, "a"), EndItem(0, "stop", None), EndItem(1, "stop", None)] if fields else ["a"]
    *chunks, last, _ = streamed(writer(apis.CHATS, wants_usage=wants_usage, **fields), *items, ending=replace(ENDING, receipt={"r": 1}))
    assert last["meshserve"] == {"r": 1} and all("meshserve" not in chunk for chunk in chunks)


def test_each_choice_has_its_own_role_and_its_own_end() -> None:
    items = [TextItem(1, "b"), TextItem(0, "a"), EndItem(1, "length", None), EndItem(0, "stop", "x")]
    chunks = [chunk["choices"][0] for chunk in streamed(writer(apis.CHATS, n=2), *items)[:-1]]
    for index, text, reason in ((0, "a", "stop"), (1, "b", "length")):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert [chunk["delta"] for chunk in own] == [{"role": "assistant", "content": ""}, {"content": text}, {}]
        assert [chunk["finish_reason"] for chunk in own] == [None, None, reason]
    made = whole(writer(apis.CHATS, is_stream=False, n=2), *items)
    assert [choice["message"]["content"] for choice in made["choices"]] == ["a", "b"]
    assert [choice["finish_reason"] for choice in made["choices"]] == ["stop", "length"]


CALL = [CallItem(0, "f"), TextItem(0, '{"a":'), TextItem(0, "1}"), EndItem(0, "tool_calls", None)]
TOOLS: Json = {"tools": "[]", "tool_choice": "auto"}


def test_a_call_is_streamed_name_first_then_its_arguments_as_they_come() -> None:
    role, name, *rest = [chunk["choices"][0] for chunk in streamed(writer(apis.CHATS, **TOOLS), *CALL)[:-1]]
    assert role["delta"] == {"role": "assistant", "content": None}
    (call,) = name["delta"]["tool_calls"]
    assert call.pop("id").startswith("call_") and call == {"index": 0, "type": "function", "function": {"name": "f", "arguments": ""}}
    pieces = [chunk["delta"]["tool_calls"][0] for chunk in rest[:-1]]
    assert pieces == [{"index": 0, "function": {"arguments": text}} for text in ('{"a":', "1}")]
    assert rest[-1]["delta"] == {} and rest[-1]["finish_reason"] == "tool_calls"


def test_a_call_that_is_not_streamed_is_the_same_in_each_api() -> None:
    choice = whole(writer(apis.CHATS, is_stream=False, **TOOLS), *CALL)["choices"][0]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    (item,) = whole(writer(apis.RESPONSES, is_stream=False, **TOOLS), *CALL)["output"]
    assert (item["type"], item["name"], item["arguments"], item["status"]) == ("function_call", "f", '{"a":1}', "completed")
    message = whole(writer(apis.MESSAGES, is_stream=False, **TOOLS), *CALL)
    (block,) = message["content"]
    assert block.pop("id").startswith("toolu_") and block == {"type": "tool_use", "name": "f", "input": {"a": 1}}
    assert message["stop_reason"] == "tool_use"


def test_log_probabilities_have_the_shape_of_each_api_and_are_always_numbers() -> None:
    item = TextItem(0, "é", [ENTRY, [b"\xa9", -0.25, []]], [0, 0])
    shown = {"token": "\ufffd", "logprob": -0.5, "bytes": [195]}
    choice = whole(writer(apis.CHATS, is_stream=False, logprobs=2), item)["choices"][0]
    top = [shown, {"token": "a", "logprob": -9999.0, "bytes": [97]}]
    assert choice["logprobs"]["content"][0] == {**shown, "top_logprobs": top}
    delta = streamed(writer(apis.CHATS, logprobs=2), item)[1]["choices"][0]
    assert delta["delta"] == {"content": "é"} and delta["logprobs"]["content"] == choice["logprobs"]["content"]
    legacy = whole(writer(apis.COMPLETIONS, is_stream=False, logprobs=2), TextItem(0, "p", [[b"p", None, []]], [0]), item)
    assert legacy["choices"][0]["logprobs"] == {
        "tokens": ["p", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [None, -0.5, -0.25],
        "top_logprobs": [None, {"bytes:\\xc3": -0.5, "a": -9999.0}, {"bytes:\\xa9": -0.25}],
        "text_offset": [0, 0, 0],
    }


def test_a_response_has_its_events_in_the_official_order() -> None:
    found = streamed(writer(apis.RESPONSES), "a", "b")
    assert [event["type"].removeprefix("response.") for event in found] == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event["sequence_number"] for event in found] == list(range(10))
    done = found[-1]["response"]
    assert done["status"] == "completed" and done["output"] == [found[-2]["item"]] and done["usage"]["total_tokens"] == 8
    assert done["output"][0]["content"][0]["text"] == "ab" and done["id"] == "resp_abc1"
    assert len({event["item_id"] for event in found if "item_id" in event}) == 1
    called = streamed(writer(apis.RESPONSES, **TOOLS), *CALL)
    assert [event["type"].removeprefix("response.") for event in called[2:-1]] == [
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta", "function_call_arguments.done"),
        "output_item.done",
    ]


def test_a_response_that_max_tokens_cut_is_incomplete() -> None:
    cut = replace(ENDING, reason="length")
    assert whole(writer(apis.RESPONSES, is_stream=False), "a", ending=cut)["incomplete_details"] == {"reason": "max_output_tokens"}
    last = streamed(writer(apis.RESPONSES), "a", ending=cut)[-1]
    assert last["type"] == "response.incomplete" and last["response"]["status"] == "incomplete"
    assert streamed(writer(apis.RESPONSES))[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_a_message_has_its_events_in_the_official_order() -> None:
    found = streamed(writer(apis.MESSAGES), StartItem(5), "a", "b", ending=replace(ENDING, stop="x"))
    assert [event["type"] for event in found] == [
        *("message_start", "ping", "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    assert found[0]["message"]["usage"]["input_tokens"] == 5 and found[0]["message"]["content"] == []
    assert found[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "x"}
    usage = {"input_tokens": 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2, "output_tokens": 3}
    assert found[-2]["usage"] == usage
    called = streamed(writer(apis.MESSAGES, **TOOLS), *CALL)
    assert called[2]["content_block"]["type"] == "tool_use" and called[2]["content_block"]["input"] == {}
    assert [event["delta"]["partial_json"] for event in called if event["type"] == "content_block_delta"] == ['{"a":', "1}"]


@pytest.mark.parametrize(
    ("reason", "stop", "expected"), [("stop", None, "end_turn"), ("length", None, "max_tokens"), ("stop", "x", "stop_sequence")]
)
def test_a_message_says_why_it_ended(reason: str, stop: str | None, expected: str) -> None:
    message = whole(writer(apis.MESSAGES, is_stream=False), "a", ending=replace(ENDING, reason=reason, stop=stop))
    assert message["stop_reason"] == expected and message["stop_sequence"] == stop
    assert message["content"] == [{"type": "text", "text": "a"}]


def test_arguments_that_max_tokens_cut_are_no_input() -> None:
    cut = [CallItem(0, "f"), TextItem(0, '{"a'), EndItem(0, "length", None)]
    message = whole(writer(apis.MESSAGES, is_stream=False, **TOOLS), *cut)
    assert message["content"][0]["input"] == {} and message["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("api", [apis.CHATS, apis.COMPLETIONS, apis.RESPONSES, apis.MESSAGES])
def test_a_stream_that_fails_names_the_error_and_does_not_look_complete(api: Api) -> None:
    made = writer(api)
    data = made.feed(["half a sen"]) + made.fail(EngineFailed("it broke"))
    assert b"[DONE]" not in data and b"engine_failed" in data and b"it broke" in data
    names = {event.get("type") for event in events(data)}
    assert not names & {"message_stop", "response.completed", "response.incomplete"}
    assert api is not apis.RESPONSES or "response.failed" in names


def test_an_item_of_no_choice_is_refused() -> None:
    for made in (writer(apis.CHATS), writer(apis.CHATS, is_stream=False)):
        for item in ([1, "x"], {"choice": -1, "call": "f"}, 7):
            with pytest.raises(ProtocolError):
                made.feed([item])


def test_errors_have_the_shape_and_the_type_of_their_api() -> None:
    cases = [
        (InvalidRequest("no", param="n"), "invalid_request_error", "invalid_request_error"),
        (ModelNotFound("no", param="model"), "invalid_request_error", "not_found_error"),
        (RequestTooLarge("no"), "invalid_request_error", "request_too_large"),
        (Overloaded("no"), "service_unavailable", "overloaded_error"),
        (EngineFailed("no"), "server_error", "api_error"),
    ]
    for error, openai_type, anthropic_type in cases:
        body = json.loads(shapes.error_body(error))["error"]
        assert body == {"message": "no", "type": openai_type, "param": getattr(error, "param", None), "code": error.code}
        other = json.loads(anthropic_writers.error_body(error))
        assert other["type"] == "error" and other["error"]["type"] == anthropic_type
    assert b'"type":"error"' in apis.error_body_for("/v1/messages/count_tokens", EngineFailed())


def test_an_api_calls_a_field_by_its_own_name() -> None:
    named = apis.RESPONSES.named(InvalidRequest("no", param="max_tokens"))
    assert isinstance(named, InvalidRequest) and named.param == "max_output_tokens"
    assert apis.CHATS.named(EngineFailed("no")).code == "engine_failed"


def not_here(*_: Any) -> Any:
    """Stands for what only parsers need."""
    pytest.fail("nothing is parsed here")


LINES = apis.lines(not_here)
OLLAMA = (apis.ollama_chats(not_here), apis.ollama_prompts(not_here))


@pytest.mark.parametrize("api", (*apis.APIS, LINES, *OLLAMA), ids=lambda api: api.path)
def test_each_stream_says_in_its_own_form_that_it_lives(api: Api) -> None:
    made = writer(api, echoed={"model": "m"} if api in OLLAMA else None)
    if b"text/event-stream" in made.headers:
        assert made.ping.endswith(b"\n\n") and made.ping.count(b"\n\n") == 1
        assert made.ping.startswith(b":") or made.ping.startswith(b"event: ping\ndata: {")
    else:
        assert isinstance(json.loads(made.ping), dict) and made.ping.count(b"\n") == 1
    assert b"x-accel-buffering: no" in made.headers, "a proxy that buffers would keep it to itself"
    assert api in (LINES, *OLLAMA) or writer(api, is_stream=False).ping == b""
