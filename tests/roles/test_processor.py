"""The processor against a worker played by hand: several answers, prompts repeated, and calls of tools."""

import json
from typing import Any

import pytest

from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import EngineFailed
from meshserve.roles.processor.models import sampling_of
from meshserve.roles.processor.tools import StrictCalls
from meshserve.wire.completion import CallItem, CompletionRequest, Ending, EndItem, StartItem, TextItem
from meshserve.wire.generation import Sampling, SamplingDefaults
from meshserve.wire.structs import asdict, replace
from tests.harness import run_async, until
from tests.roles.scripted import ASK, DEADLINE_S, TOOL, scene, texts, tokens


def test_a_plain_answer_crosses_the_mesh_as_bare_strings() -> None:
    async def check() -> None:
        async with scene(features=()) as found:
            client = found.ask()
            (asked,) = await found.worker.asked(1)
            assert asked.request_id == "r" and asked.tokens == tokens("ab")
            found.worker.say(0, "hé")
            ending = await client.end()
            assert client.raw == ["h", "", "é"]
            assert ending == Ending("stop", 2, 3, 2)
            assert found.processor.is_idle

    run_async(check())


def test_prompts_are_answered_n_times_each_and_counted_once() -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(prompt=("ab", tokens("cde")), n=2, seed=7, wants_receipt=True)
            first = await found.worker.asked(2)
            assert [asked.request_id for asked in first] == ["r/0", "r/2"], "the first answer to each prompt goes ahead"
            found.worker.say(0, "A")
            await found.worker.asked(3)
            found.worker.say(1, "C")
            everything = await found.worker.asked(4)
            assert [(asked.sampling.choice, asked.sampling.seed) for asked in everything] == [(0, 7), (0, 7), (1, 7), (1, 7)]
            assert bytes(everything[3].tokens) == bytes(tokens("cde"))
            found.worker.say(3, "Dd", "length")
            found.worker.say(2, "Bb")
            ending = await client.end()
            assert [texts(client, choice) for choice in range(4)] == ["A", "Bb", "C", "Dd"]
            ends = {item.choice: item.reason for item in client.items if isinstance(item, EndItem)}
            assert ends == {0: "stop", 1: "stop", 2: "stop", 3: "length"}
            assert replace(ending, receipt=None) == Ending("stop", 5, 6, 4)
            assert ending.receipt is not None
            assert ending.receipt["request_id"] == "r" and ending.receipt["tokens"] == {"prompt": 5, "cached": 4, "completion": 6}

    run_async(check())


def test_each_prompt_has_a_seed_of_its_own_where_the_client_named_none() -> None:
    async def check() -> None:
        async with scene() as found:
            found.ask(prompt=("same", "same"), temperature=1.0)
            one, other = await found.worker.asked(2)
            assert one.sampling.seed != other.sampling.seed

    run_async(check())


OWN = SamplingDefaults(0.7, 0.9, 40, 0.05, 1.1)


@pytest.mark.parametrize(
    ("asked", "sampled"),
    [
        ({}, OWN),
        ({"temperature": 0.0}, replace(OWN, temperature=0.0)),
        ({"top_p": 1.0}, replace(OWN, top_p=1.0)),
        ({"top_k": 0}, replace(OWN, top_k=0)),
        ({"min_p": 0.0}, replace(OWN, min_p=0.0)),
        ({"repetition_penalty": 1.0}, replace(OWN, repetition_penalty=1.0)),
        ({"logprobs": 0, "top_k": 3}, replace(OWN, top_k=3)),
        (asdict(SamplingDefaults()), SamplingDefaults()),
    ],
)
def test_a_model_has_its_own_sampling_wherever_a_request_names_none(asked: dict[str, Any], sampled: SamplingDefaults) -> None:
    async def check() -> None:
        async with scene(sampling_defaults=OWN) as found:
            found.ask(**asked)
            (request,) = await found.worker.asked(1)
            assert {name: getattr(request.sampling, name) for name in asdict(sampled)} == asdict(sampled)

    run_async(check())


def test_if_one_answer_fails_the_request_fails_and_the_others_are_cancelled() -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(prompt=("a", "b", "c"))
            await found.worker.asked(3)
            found.worker.say(0, "done")
            found.worker.calls[1].fail(EngineFailed("it broke"))
            assert (await client.failure()).code == "engine_failed"
            await until(lambda: found.worker.cancelled == ["r/2"], DEADLINE_S, "the last one is cancelled")
            assert found.processor.is_idle

    run_async(check())


def test_a_client_that_leaves_cancels_all_answers_and_starts_no_more() -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(prompt=("a", "b"), n=3)
            await found.worker.asked(2)
            assert client.call is not None
            client.call.cancel()
            await until(lambda: len(found.worker.cancelled) == 2, DEADLINE_S, "both are cancelled")
            assert found.processor.is_idle and len(found.worker.calls) == 2

    run_async(check())


def test_a_stop_string_ends_its_own_choice_only_and_is_named() -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(n=2, stop=("END",))
            await found.worker.asked(1)
            found.worker.say(0, "one EN", None)
            await found.worker.asked(2)
            found.worker.say(1, "two")
            found.worker.say(0, "D more", None, position=6)
            ending = await client.end()
            assert texts(client, 0) == "one " and texts(client, 1) == "two"
            assert ending.stop == "END" and ending.num_completion_tokens == 7 + 3
            assert found.worker.cancelled == ["r/0"]

    run_async(check())


def test_a_step_of_several_tokens_counts_up_to_the_one_that_completes_a_stop_string() -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(stop=("b",))
            await found.worker.asked(1)
            found.worker.calls[0].send([0, *b"abcd"])
            ending = await client.end()
            assert client.raw == ["a"] and ending.num_completion_tokens == 2

    run_async(check())


def test_an_echo_repeats_the_prompt_before_each_answer() -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(prompt=("ab", tokens("cd")), echo=True)
            await found.worker.asked(2)
            found.worker.say(0, "X")
            found.worker.say(1, "")
            await client.end()
            assert texts(client, 0) == "abX" and texts(client, 1) == "cd"

    run_async(check())


def test_an_echo_of_nothing_else_asks_no_worker() -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(echo=True, max_tokens=0)
            assert await client.end() == Ending("length", 2, 0, 0)
            assert client.raw == ["ab"] and not found.worker.calls

    run_async(check())


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_an_echo_with_logprobs_rates_the_prompt_once_for_all_answers(max_tokens: int) -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(echo=True, logprobs=1, n=2, max_tokens=max_tokens)
            (first,) = await found.worker.asked(1)
            assert first.sampling.prompt_logprobs == 1 and first.sampling.max_tokens == max(1, max_tokens)
            call = found.worker.calls[0]
            call.send(["prompt_logprobs", [None, [-0.5, [[99, -0.25]]]]])
            call.send([[0, 120], [[-1.0, [[120, -1.0]]]]])
            call.end({"reason": "length"})
            _, second = await found.worker.asked(2)
            assert second.sampling.prompt_logprobs == -1
            found.worker.calls[1].send([[0, 121], [[-2.0, [[120, -1.0]]]]])
            found.worker.calls[1].end({"reason": "stop"})
            ending = await client.end()
            for choice, (token, logprob) in enumerate(((b"x", -1.0), (b"y", -2.0))):
                said = [item for item in client.items if isinstance(item, TextItem) and item.choice == choice]
                entries = [entry for item in said for entry in item.logprobs or []]
                starts = [start for item in said for start in item.offsets or []]
                prompt = [[b"a", None, []], [b"b", -0.5, [[b"c", -0.25]]]]
                output = [[token, logprob, [[b"x", -1.0]]]] if max_tokens else []
                assert [list(entry) for entry in entries] == prompt + output and starts == list(range(len(entries)))
            assert ending.num_completion_tokens == (2 if max_tokens else 0)

    run_async(check())


def test_with_tools_the_output_is_asked_for_under_a_schema_and_read_as_a_call() -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(kind="chat", prompt=None, messages=ASK, tools=json.dumps([TOOL]), tool_choice="auto", wants_start=True)
            (asked,) = await found.worker.asked(1)
            schema = json.loads(asked.sampling.json_schema)
            assert schema["properties"]["name"] == {"const": "weather"} and schema["required"] == ["name", "arguments"]
            found.worker.say(0, '{"name": "weather", "arguments": {"city": "}"}}')
            ending = await client.end()
            assert client.items[0] == StartItem(len(asked.tokens))
            assert client.items[1] == CallItem(0, "weather") and texts(client, 0) == '{"city": "}"}'
            assert client.items[-1] == EndItem(0, "tool_calls", None) and ending.reason == "tool_calls"

    run_async(check())


def test_a_tools_result_is_answered_in_words_and_a_cut_call_says_so() -> None:
    async def check() -> None:
        async with scene() as found:
            call = {"id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'}
            messages: list[dict[str, Any]] = [*ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]
            messages.append({"role": "tool", "tool_call_id": "c1", "content": "sunny"})
            asked_for = {"kind": "chat", "prompt": None, "messages": messages, "tools": json.dumps([TOOL]), "tool_choice": "auto"}
            client = found.ask(**asked_for)
            (asked,) = await found.worker.asked(1)
            assert not asked.sampling.json_schema
            found.worker.say(0, "Sunny.")
            assert (await client.end()).reason == "stop" and texts(client, 0) == "Sunny."
            client = found.ask(**{**asked_for, "tool_choice": "required"})
            await found.worker.asked(2)
            found.worker.say(1, '{"name": "weather", "arguments": {"ci', "length")
            assert (await client.end()).reason == "length" and texts(client, 0) == '{"ci'

    run_async(check())


def test_each_sampling_parameter_that_a_request_names_arrives_at_the_worker() -> None:
    """A law, so that a new parameter needs no line in between: whatever both structs name has the request's value."""
    open_ones: dict[str, Any] = {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5}
    open_ones |= {"seed": 7, "max_tokens": 9}
    others: dict[str, Any] = {"min_tokens": 2, "ignore_eos": True, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    others |= {"logit_bias": ((1, 2.0),)}
    forms: dict[str, Any] = {"logprobs": 3, "json_schema": "{}", "regex": "a", "choices": ("b",)}
    named = open_ones | others | forms
    both = set(Sampling.__struct_fields__) & set(CompletionRequest.__struct_fields__)
    assert named.keys() == both, "a parameter is missing in this test"
    request = CompletionRequest("id", "completion", "dummy", "x", **named)
    sampling = sampling_of(request, DummyEngine(EngineOptions()).card, 1, drawn_seed=5, can_be_kept=StrictCalls().can_be_kept)
    assert {name: getattr(sampling, name) for name in both} == named
