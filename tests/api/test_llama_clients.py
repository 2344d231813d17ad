"""The official clients against a real model, and in short against a tiny one."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")

from tests.api.cases import CLOCK, WEATHER
from tests.api.clients import Clients, gather, plain, refusal
from tests.api.llama_mesh import MODEL, llama_clients, real_model
from tests.api.structured import invalid_outputs
from tests.engines.gguf_harness import LlamaVocabulary

TIMEOUT_S = 120.0
COLOURS: Any = [{"role": "user", "content": "Name three colours, and say what each makes you think of."}]
ROME: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
EMOJI: Any = [{"role": "user", "content": "Répète: 🙂🚀 naïve 日本語 👩‍👩‍👧"}]
TEXTS = ["", " ", "Hello  world\n\n\tx", "naïve 日本語 🙂👩‍👩‍👧", "<|im_start|>user", "1234567890 ''s don't", "\u200bé́"]

full = pytest.mark.full


@pytest.fixture(scope="module")
def model_file() -> Path:
    return real_model()


@pytest.fixture(scope="module")
def clients(model_file: Path) -> Iterator[Clients]:
    with llama_clients(model_file, mesh="llama-clients", timeout_s=TIMEOUT_S) as made:
        yield made


def chat(clients: Clients, **fields: Any) -> Any:
    return clients.openai.chat.completions.create(**{"model": MODEL, "messages": COLOURS, "max_tokens": 24, "temperature": 0, **fields})


def content(reply: Any) -> str:
    return str(reply.choices[0].message.content)


def told_tokens(choice: Any) -> list[bytes]:
    return [bytes(entry.bytes) for entry in choice.logprobs.content]


# --- texts


@full
@pytest.mark.parametrize("messages", [COLOURS, EMOJI], ids=["words", "emoji"])
@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "drawn"])
def test_a_streamed_chat_says_the_same_as_a_whole_one(clients: Clients, messages: Any, sampled: Any) -> None:
    whole = chat(clients, messages=messages, logprobs=True, **sampled)
    made = gather(chat(clients, messages=messages, stream=True, stream_options={"include_usage": True}, **sampled))
    assert made.texts[0] == content(whole) and made.reasons[0] == whole.choices[0].finish_reason
    assert made.usage == plain(whole.usage)
    assert content(whole) == b"".join(told_tokens(whole.choices[0])).decode("utf-8", "replace")


@full
@pytest.mark.parametrize("text", ["🙂🚀", "naïve – 日本語", "👩‍👩‍👧"])
def test_characters_of_several_tokens_come_whole_in_a_stream(clients: Clients, text: str) -> None:
    asked: Any = {"messages": EMOJI, "extra_body": {"structured_outputs": {"choice": [text]}}}
    chunks = [chunk.choices[0].delta.content or "" for chunk in chat(clients, stream=True, **asked)]
    assert "".join(chunks) == text == content(chat(clients, **asked)) and "\ufffd" not in "".join(chunks)


@full
def test_a_prompt_of_tokens_is_completed_as_its_text_is(clients: Clients) -> None:
    prompt = "The capital of France is"
    tokens = clients.post("/tokenize", {"prompt": prompt})["body"]["tokens"]
    complete = clients.openai.completions.create
    one, other = (complete(model=MODEL, prompt=given, max_tokens=12, temperature=0) for given in (prompt, tokens))
    assert one.choices[0].text == other.choices[0].text and plain(one.usage)["prompt_tokens"] == len(tokens)
    both = complete(model=MODEL, prompt=[tokens, tokens[:3]], max_tokens=12, temperature=0)
    assert both.choices[0].text == one.choices[0].text and len(both.choices) == 2
    made = gather(complete(model=MODEL, prompt=[tokens], max_tokens=12, temperature=0, stream=True))
    assert made.texts[0] == one.choices[0].text


@full
def test_a_stop_string_across_tokens_ends_the_text_before_it(clients: Clients) -> None:
    whole = chat(clients, logprobs=True).choices[0]
    text, pieces = whole.message.content, [piece.decode("utf-8", "replace") for piece in told_tokens(whole)]
    for place in (4, 9):
        border = len("".join(pieces[: place + 1]))
        stop = text[border - 2 : border + 2]
        expected = text[: text.index(stop)]
        reply = chat(clients, stop=[stop, "never said"])
        assert content(reply) == expected and reply.choices[0].finish_reason == "stop"
        made = gather(chat(clients, stop=stop, stream=True))
        assert made.texts[0] == expected and made.reasons[0] == "stop"


@full
def test_logprobs_are_those_of_one_distribution_likeliest_first(clients: Clients) -> None:
    reply = chat(clients, logprobs=True, top_logprobs=20, max_tokens=10)
    made = gather(chat(clients, logprobs=True, top_logprobs=20, max_tokens=10, stream=True))
    entries = reply.choices[0].logprobs.content
    assert made.logprobs[0] == plain(entries) and len(entries) == 10
    for entry in entries:
        likely = [found.logprob for found in entry.top_logprobs]
        assert likely == sorted(likely, reverse=True) and len(likely) == 20
        assert 0.2 < sum(2.718281828459045**found for found in likely) <= 1 + 1e-6
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, likely[0]), "a greedy token is the likeliest"
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
    drawn = chat(clients, logprobs=True, max_tokens=10, temperature=1.5, seed=2).choices[0].logprobs.content
    assert all(entry.logprob <= 0 for entry in drawn) and drawn != entries


@full
def test_three_answers_differ_and_come_again_with_their_seed(clients: Clients) -> None:
    asked: Any = {"n": 3, "seed": 11, "temperature": 1.0}
    one, same = ([choice.message.content for choice in chat(clients, **asked).choices] for _ in range(2))
    made = gather(chat(clients, **asked, stream=True))
    assert one == same == [made.texts[index] for index in range(3)] and len(set(one)) == 3
    assert content(chat(clients, seed=11, temperature=1.0)) == one[0]
    assert content(chat(clients, seed=12, temperature=1.0)) not in one


# --- tools and forms


@full
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_must_be_made_is_made_and_valid(clients: Clients, choice: Any) -> None:
    asked: Any = {"messages": ROME, "tools": [CLOCK, WEATHER], "tool_choice": choice, "max_tokens": 200}
    reply = chat(clients, **asked).choices[0]
    (call,) = reply.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert reply.finish_reason == "tool_calls" and call.function.name in ("get_time", "get_weather")
    if choice != "required":
        assert call.function.name == "get_weather" and isinstance(arguments.pop("city"), str) and not arguments
    made = gather(chat(clients, **asked, stream=True))
    assert (made.calls[0]["name"], made.calls[0]["arguments"]) == (call.function.name, call.function.arguments)


@full
@pytest.mark.parametrize("strict", [False, True])
def test_a_model_that_may_call_answers_in_words_or_with_a_call(clients: Clients, strict: bool) -> None:
    tools: Any = [{**tool, "function": {**tool["function"], "strict": strict}} for tool in (WEATHER, CLOCK)]
    asked: Any = {"messages": ROME, "tools": tools, "tool_choice": "auto", "max_tokens": 40}
    choice = chat(clients, **asked).choices[0]
    calls = choice.message.tool_calls or []
    assert bool(calls) is (choice.finish_reason == "tool_calls") and (calls or choice.message.content)
    made = gather(chat(clients, **asked, stream=True))
    assert made.texts[0] == (choice.message.content or "") and bool(made.calls) is bool(calls)


@full
def test_a_tools_result_is_answered(clients: Clients) -> None:
    forced = chat(clients, messages=ROME, tools=[WEATHER], tool_choice="required", max_tokens=200).choices[0].message
    result: Any = {"role": "tool", "tool_call_id": forced.tool_calls[0].id, "content": "Sunny, 25 degrees"}
    reply = chat(clients, messages=[*ROME, forced.model_dump(exclude_none=True), result], tools=[WEATHER], tool_choice="none")
    assert content(reply) and not reply.choices[0].message.tool_calls


@full
@pytest.mark.timeout(1800)
def test_two_hundred_outputs_of_ten_schemas_are_all_valid(clients: Clients) -> None:
    assert not invalid_outputs(clients, MODEL, num_each=20, num_at_once=8)


@full
def test_an_expression_and_a_list_of_choices_are_kept_to(clients: Clients) -> None:
    for seed in range(3):
        drawn: Any = {"temperature": 1.0, "seed": seed}
        number = content(chat(clients, **drawn, extra_body={"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2,4}"}}))
        assert number[:3].isdigit() and number[3] == "-" and set(number[4:]) <= set("abcdef") and 2 <= len(number[4:]) <= 4
        assert content(chat(clients, **drawn, extra_body={"structured_outputs": {"choice": ["yes", "no", "maybe"]}})) in (
            "yes",
            "no",
            "maybe",
        )


# --- Anthropic's client


@full
def test_anthropics_client_gets_the_same_text_whole_and_streamed(clients: Clients) -> None:
    asked: Any = {"model": MODEL, "messages": COLOURS, "max_tokens": 24, "extra_body": {"temperature": 0}}
    whole = clients.anthropic.messages.create(**asked)
    (block,) = whole.content
    assert block.type == "text" and block.text == content(chat(clients)) and whole.stop_reason == "max_tokens"
    with clients.anthropic.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        assert text == block.text and stream.get_final_message().usage.output_tokens == whole.usage.output_tokens == 24
    counted = clients.anthropic.messages.count_tokens(model=MODEL, messages=COLOURS).input_tokens
    assert counted == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert counted == chat(clients).usage.prompt_tokens


@full
def test_anthropics_client_gets_a_call_whole_and_streamed(clients: Clients) -> None:
    function = WEATHER["function"]
    tool: Any = {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}
    forced: Any = {"tools": [tool], "tool_choice": {"type": "any"}, "extra_body": {"temperature": 0}}
    asked: Any = {"model": MODEL, "messages": ROME, "max_tokens": 200, **forced}
    whole = clients.anthropic.messages.create(**asked)
    (block,) = whole.content
    assert block.type == "tool_use" and whole.stop_reason == "tool_use" and isinstance(block.input["city"], str)
    with clients.anthropic.messages.stream(**asked) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use" and (streamed.name, streamed.input) == (block.name, block.input)


# --- tokens, and what is refused


@full
def test_texts_become_llama_cpps_own_tokens_and_come_back(clients: Clients, model_file: Path) -> None:
    with closing(LlamaVocabulary(model_file)) as vocabulary:
        for text in filter(None, TEXTS):
            tokens = clients.post("/tokenize", {"prompt": text})["body"]["tokens"]
            assert tokens == vocabulary.encode(text, add_special=True), text
            if "<|" not in text:  # special tokens are no text
                assert clients.post("/detokenize", {"tokens": tokens})["body"]["prompt"] == text


@full
def test_what_does_not_fit_the_context_is_refused_in_openais_form(clients: Clients) -> None:
    most = clients.post("/tokenize", {"prompt": "a"})["body"]["max_model_len"]
    long = "word " * most
    for ask in (
        lambda: chat(clients, messages=[{"role": "user", "content": long}]),
        lambda: chat(clients, max_tokens=most),
        lambda: clients.openai.completions.create(model=MODEL, prompt=long, max_tokens=1),
    ):
        found = refusal(ask)
        assert (found["status"], found["code"]) == (400, "context_length_exceeded")
        assert f"context length is {most} tokens" in found["message"]
    assert content(chat(clients)), "the mesh is unharmed"


# --- in short, with a model of random weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    pytest.importorskip("gguf")
    from tests.engines.tiny_models import make_model

    path = make_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    with llama_clients(path, mesh="tiny-clients", timeout_s=60.0) as made:
        yield made


def test_even_a_model_of_random_weights_keeps_to_schemas(tiny: Clients) -> None:
    assert not invalid_outputs(tiny, MODEL, num_each=1, num_at_once=8)


def test_even_a_model_of_random_weights_calls_a_tool_where_it_must(tiny: Clients) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 9}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    choice = chat(tiny, messages=ROME, tools=[tool], tool_choice="required", max_tokens=100, temperature=1.0, seed=1).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert len(json.loads(call.function.arguments)["city"]) <= 9


def test_a_text_of_random_weights_is_the_same_streamed(tiny: Clients) -> None:
    asked: Any = {"messages": EMOJI, "temperature": 1.0, "seed": 3, "logprobs": True}
    whole = chat(tiny, **asked).choices[0]
    made = gather(chat(tiny, **asked, stream=True))
    assert made.texts[0] == whole.message.content == b"".join(told_tokens(whole)).decode("utf-8", "replace")
    assert made.logprobs[0] == plain(whole.logprobs.content)
