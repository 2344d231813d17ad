"""Ollama's API over plain HTTP, and what its bodies become."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from meshserve.errors import EngineFailed, InvalidRequest
from meshserve.roles.frontend import apis
from meshserve.roles.frontend.models.ollama import (
    OllamaChatBody,
    OllamaGenerateBody,
    parse_chat,
    parse_generate,
    read_load,
)
from meshserve.wire.completion import CallItem, CompletionRequest, Ending, EndItem, PartItem, TextItem
from meshserve.wire.structs import plain
from tests.roles.frontends import Frontend, started

Json = dict[str, Any]
USER = {"role": "user", "content": "hi"}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


@pytest.fixture(scope="module")
def frontend() -> Iterator[Frontend]:
    yield from started("--mesh", "ollama-api")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Frontend]:
    yield from started("--mesh", "ollama-keys", "--api-key", "secret", headers={"authorization": "Bearer secret"})


def ask(frontend: Frontend, path: str, **fields: Any) -> list[Json]:
    """The lines of an answer of six tokens."""
    options = {"num_predict": 6, "ignore_eos": True, **fields.pop("options", {})}
    reply = frontend.client.post(path, json={"model": "dummy", "options": options, **fields})
    assert reply.status_code == 200, reply.text
    return [json.loads(line) for line in reply.text.splitlines()]


# --- over HTTP


@pytest.mark.parametrize(
    ("path", "asked", "text_of"),
    [
        ("/api/chat", {"messages": [USER]}, lambda line: line["message"]["content"]),
        ("/api/generate", {"prompt": "hi"}, lambda line: line["response"]),
    ],
)
def test_an_answer_is_streamed_unless_it_is_wanted_whole_and_says_the_same(
    frontend: Frontend, path: str, asked: Json, text_of: Any
) -> None:
    *lines, last = ask(frontend, path, **asked)
    (whole,) = ask(frontend, path, stream=False, **asked)
    assert "".join(map(text_of, lines)) == text_of(whole) != ""
    assert [line["done"] for line in (*lines, last)] == [False] * len(lines) + [True]
    for end in (last, whole):
        assert end["done_reason"] == "length" and end["eval_count"] == 6 and end["prompt_eval_count"] > 0
        assert all(type(end[name]) is int and end[name] > 0 for name in DURATIONS)
        assert end["total_duration"] >= sum(end[name] for name in DURATIONS[1:])
        assert "meshserve" not in end
    assert ask(frontend, path, meshserve={"receipt": True}, **asked)[-1]["meshserve"]["peers"]


def test_names_of_models_have_a_tag_that_may_be_left_out(frontend: Frontend) -> None:
    for name in ("dummy", "dummy:latest"):
        assert {line["model"] for line in ask(frontend, "/api/chat", model=name, messages=[USER])} == {name}
        shown = frontend.client.post("/api/show", json={"model": name}).json()
        architecture = shown["model_info"]["general.architecture"]
        assert shown["model_info"][f"{architecture}.context_length"] > 0 and shown["capabilities"] == ["completion", "tools"]
    assert [model["name"] for model in frontend.client.get("/api/tags").json()["models"]] == ["dummy:latest"]
    assert [model["model"] for model in frontend.client.get("/api/ps").json()["models"]] == ["dummy:latest"]
    assert frontend.client.get("/api/version").json()["version"]


def test_a_model_is_loaded_and_unloaded_without_an_answer(frontend: Frontend) -> None:
    (chat,) = ask(frontend, "/api/chat", messages=[])
    (prompt,) = ask(frontend, "/api/generate", keep_alive=0)
    assert chat["message"]["content"] == prompt["response"] == "" and chat["done"] and chat["done_reason"] == "load"
    assert frontend.client.post("/api/generate", json={"model": "nobody"}).status_code == 404
    named = frontend.client.post("/api/generate", json={"model": "dummy"}, headers={"x-request-id": "mine"})
    assert named.headers["x-request-id"] == "mine"
    assert frontend.client.post("/api/generate", json={"model": "dummy"}, headers={"x-request-timeout": "x"}).status_code == 400


def test_a_tool_is_called_with_an_object_and_its_result_is_read(frontend: Frontend) -> None:
    asked = {"messages": [USER], "tools": TOOLS, "options": {"num_predict": 300, "ignore_eos": False}}
    *lines, last = ask(frontend, "/api/chat", **asked)
    (whole,) = ask(frontend, "/api/chat", stream=False, **asked)
    (call,) = [call for line in lines for call in line["message"].get("tool_calls", ())]
    assert call["function"]["name"] == "f" and type(call["function"]["arguments"]) is dict
    assert [found["function"] for found in whole["message"]["tool_calls"]] == [call["function"]]
    assert last["done_reason"] == whole["done_reason"] == "stop"
    result = {"role": "tool", "tool_name": "f", "content": "sunny"}
    (after,) = ask(frontend, "/api/chat", messages=[USER, whole["message"], result], tools=TOOLS, stream=False)
    assert after["message"]["content"] and "tool_calls" not in after["message"]


@pytest.mark.parametrize("wanted", ["json", SCHEMA])
def test_a_format_is_kept_to(frontend: Frontend, wanted: Any) -> None:
    options = {"num_predict": 300, "ignore_eos": False}
    (whole,) = ask(frontend, "/api/chat", messages=[USER], format=wanted, stream=False, options=options)
    found = json.loads(whole["message"]["content"])
    assert type(found) is dict and (wanted == "json" or type(found["a"]) is int)


@pytest.mark.parametrize(
    ("path", "asked", "status", "code", "param"),
    [
        ("/api/chat", {"messages": [{**USER, "images": ["eA=="]}]}, 400, "invalid_request", "messages[0].images"),
        ("/api/generate", {"prompt": "hi", "images": ["eA=="]}, 400, "unsupported", "images"),
        ("/api/generate", {"prompt": "hi", "options": {"mirostat": 2}}, 400, "unsupported", "options.mirostat"),
        ("/api/generate", {"prompt": "hi", "format": 5}, 400, "invalid_request", "format"),
        ("/api/chat", {"messages": [USER], "model": "nobody"}, 404, "model_not_found", "model"),
        ("/api/show", {"model": "nobody"}, 404, "model_not_found", "model"),
        ("/api/embed", {"input": "hi"}, 400, "unsupported", "model"),
        ("/api/embeddings", {"prompt": "hi"}, 400, "unsupported", "model"),
        ("/api/pull", {}, 404, "invalid_request", None),
    ],
)
def test_errors_have_ollamas_shape(frontend: Frontend, path: str, asked: Json, status: int, code: str, param: str | None) -> None:
    reply = frontend.client.post(path, json={"model": "dummy", **asked})
    told = reply.json()
    assert reply.status_code == status and (told["code"], told["param"]) == (code, param)
    assert type(told["error"]) is str and told.keys() == {"error", "code", "param"}


def test_a_key_is_wanted(guarded: Frontend) -> None:
    assert guarded.client.get("/api/tags").status_code == 200
    refused = guarded.client.get("/api/tags", headers={"authorization": "Bearer wrong"})
    assert refused.status_code == 401 and refused.json()["code"] == "invalid_api_key"


def test_what_is_ignored_is_named(frontend: Frontend) -> None:
    asked = {"model": "dummy", "messages": [USER], "think": True, "keep_alive": "5m", "options": {"num_ctx": 2048, "num_predict": 1}}
    reply = frontend.client.post("/api/chat", json=asked)
    assert reply.headers["x-meshserve-ignored"] == "think, keep_alive, options.num_ctx"


# --- what bodies become


def chat(**fields: Any) -> CompletionRequest:
    return parse_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode(), "r", "c", str)[0]


def prompt(**fields: Any) -> CompletionRequest:
    return parse_generate(json.dumps({"model": "m", "prompt": "p", **fields}).encode(), "r", "c", str)[0]


def test_options_have_other_names_here() -> None:
    options = {
        "num_predict": 5.0, "temperature": 0.5, "top_k": -1, "top_p": 0.9, "min_p": 0.1, "repeat_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": None, "seed": -1, "stop": "x", "ignore_eos": True,
    }  # fmt: skip
    found = chat(options=options)
    assert (found.max_tokens, found.temperature, found.top_k, found.top_p, found.min_p) == (5, 0.5, 0, 0.9, 0.1)
    assert (found.repetition_penalty, found.presence_penalty, found.frequency_penalty) == (1.1, 0.5, 0.0)
    assert (found.seed, found.stop, found.ignore_eos) == (None, ("x",), True)
    plain_chat = chat()
    assert (plain_chat.max_tokens, plain_chat.temperature, plain_chat.seed, plain_chat.stop) == (None, None, None, ())
    assert chat(options={"num_predict": -2}).max_tokens is None and chat(options={"seed": 7}).seed == 7


def test_a_prompt_is_a_chat_unless_it_is_raw() -> None:
    assert prompt(system="s").messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    raw = prompt(raw=True)
    assert (raw.kind, raw.prompt, raw.messages) == ("completion", "p", None)
    with pytest.raises(InvalidRequest, match="template"):
        prompt(raw=True, system="s")


def called(*names: str, **more: Any) -> Json:
    calls = [{"function": {"name": name, "arguments": {"a": 1}}} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": calls, **more}


def result(name: str | None = None, **more: Any) -> Json:
    return {"role": "tool", "content": "r", **({"tool_name": name} if name else {}), **more}


@pytest.mark.parametrize(
    ("messages", "answered"),
    [
        ([called("f", "g"), result("g"), result("f")], [1, 0]),
        ([called("f", "f"), result("f"), result("f")], [0, 1]),
        ([called("f", "g"), result(), result()], [0, 1]),
        ([called("f"), result(), called("f"), result()], [0, 1]),
        ([called("f", "g"), result("g")], [1]),
    ],
)
def test_results_are_told_apart_by_names_and_order(messages: list[Json], answered: list[int]) -> None:
    found = chat(messages=[USER, *messages]).messages or []
    ids = [call["id"] for message in found for call in message.get("tool_calls", ())]
    assert [message["tool_call_id"] for message in found if message["role"] == "tool"] == [ids[index] for index in answered]
    assert all(len(name) == 9 and name.isalnum() for name in ids) and len(set(ids)) == len(ids)


def test_a_result_without_a_call_and_names_of_calls_are_kept() -> None:
    found = chat(messages=[USER, result("f"), {**called("f"), "thinking": "hm"}, result(tool_call_id="x")]).messages or []
    assert found[1]["name"] == "f" and found[1]["tool_call_id"]
    assert found[2]["reasoning_content"] == "hm" and found[2]["tool_calls"][0]["arguments"] == '{"a":1}'
    assert found[3]["tool_call_id"] == "x"


def test_a_body_that_is_no_question_asks_for_the_model_only() -> None:
    assert read_load(OllamaChatBody, b'{"model": "m", "messages": []}') is not None
    assert read_load(OllamaGenerateBody, b'{"model": "m", "keep_alive": 0}') is not None
    for body in (b'{"model": "m", "prompt": "p"}', b'{"model": ""}', b"{", b'{"model": "m", "system": 5}'):
        assert read_load(OllamaGenerateBody, body) is None


# --- what items become

RECEIPT = {
    "total_ms": 10.5,
    "phases_ms": {"process": 1.0, "route": 0.5, "queue": 1.5, "prefill": 2.0, "kv_transfer": 0.25, "decode": 3.0},
}
ENDING = Ending("stop", 5, 3, 2, RECEIPT)


def written(*items: Any, is_stream: bool, ending: Ending = ENDING) -> list[Json]:
    body = {"model": "m:latest", "messages": [USER], "stream": is_stream, "tools": TOOLS}
    request, options = parse_chat(json.dumps(body).encode(), "abc-1", "c", str)
    made = apis.ollama_chats(str).writer(7, request, options)
    data = b"".join(made.feed([plain(item)]) for item in items) + made.end(ending)
    return [json.loads(line) for line in data.splitlines()]


def test_thoughts_calls_and_durations_each_have_their_place() -> None:
    items = (
        PartItem(0, "reasoning"), TextItem(0, "hm"), PartItem(0, "text"), TextItem(0, "so"),
        CallItem(0, "f"), TextItem(0, '{"a":'), TextItem(0, '"b"}'), CallItem(0, "f"), TextItem(0, '{"a"'), EndItem(0, "tool_calls"),
    )  # fmt: skip
    *lines, last = written(*items, is_stream=True)
    (whole,) = written(*items, is_stream=False)
    messages = [line["message"] for line in lines]
    assert messages[0] == {"role": "assistant", "content": "", "thinking": "hm"} and messages[1]["content"] == "so"
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    assert [call["function"] for call in calls] == [
        {"index": 0, "name": "f", "arguments": {"a": "b"}},
        {"index": 1, "name": "f", "arguments": {}},
    ]
    assert whole["message"] == {"role": "assistant", "content": "so", "thinking": "hm", "tool_calls": calls}
    for end in (last, whole):
        assert [end[name] for name in DURATIONS] == [10_500_000, 3_000_000, 2_250_000, 3_000_000]
        assert (end["done_reason"], end["prompt_eval_count"], end["eval_count"]) == ("stop", 5, 3)
        assert end["created_at"] == "1970-01-01T00:00:07Z" and end["model"] == "m:latest"


def test_a_stream_that_fails_ends_in_a_line_with_the_error() -> None:
    request, options = parse_chat(json.dumps({"model": "m", "messages": [USER]}).encode(), "r", "c", str)
    made = apis.ollama_chats(str).writer(7, request, options)
    assert json.loads(made.fail(EngineFailed("it broke"))) == {"error": "it broke", "code": "engine_failed", "param": None}
