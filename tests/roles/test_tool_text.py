"""OpenAI's and Anthropic's clients and a model that writes calls and reasoning as text, played by a worker whose every word is known."""

import json
from typing import Any

import openai
import pytest

from meshserve.engines.tokenizers.own import CHAT_TEMPLATE
from tests.roles.tool_clients import CLOCK, PARAMETERS, USER, WEATHER, Clients, calls_of, gathered, run

ROME = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NOW = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
ANSWER = f"<think>\nI look it up.\n</think>\n\nOne moment. {ROME}\n{NOW}"
CALLS = [("get_weather", {"city": "Rome"}), ("get_time", {})]
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ '\\n' }}{% endfor %}"
    "{# [TOOL_CALLS] #}assistant:<think>{{ '\\n' }}"
)


@pytest.mark.parametrize("steps", [(ANSWER,), tuple(ANSWER), (ANSWER[:20], ANSWER[20:60], ANSWER[60:])])
def test_a_chat_has_reasoning_text_and_both_calls_streamed_or_not(steps: tuple[str, ...]) -> None:
    async def check(made: Clients) -> None:
        choice = (await made.chat()).choices[0]
        assert choice.message.reasoning_content == "I look it up.\n" and choice.message.content == "One moment. "
        assert calls_of(choice.message) == CALLS and choice.finish_reason == "tool_calls"
        streamed = await gathered(await made.chat(stream=True))
        assert streamed["reasoning"] == "I look it up.\n" and streamed["content"] == "One moment. "
        assert [(name, json.loads(arguments)) for name, arguments in streamed["calls"].values()] == CALLS
        assert streamed["reason"] == "tool_calls" and len(streamed["ids"]) == 2 and not made.schema

    run(check, *steps)


def test_a_message_has_blocks_of_thinking_text_and_uses_streamed_or_not() -> None:
    async def check(made: Clients) -> None:
        message = await made.message()
        kinds = [block.type for block in message.content]
        assert kinds == ["thinking", "text", "tool_use", "tool_use"] and message.stop_reason == "tool_use"
        assert message.content[0].thinking == "I look it up.\n" and message.content[1].text == "One moment. "
        assert [(block.name, block.input) for block in message.content[2:]] == CALLS
        assert message.content[2].id != message.content[3].id
        tools: Any = [{"name": "get_weather", "input_schema": PARAMETERS}, {"name": "get_time", "input_schema": {"type": "object"}}]
        async with made.anthropic.messages.stream(model="dummy", messages=USER, tools=tools, max_tokens=500) as stream:
            streamed = await stream.get_final_message()
        assert [block.model_dump(exclude={"id"}) for block in streamed.content] == [
            block.model_dump(exclude={"id"}) for block in message.content
        ]
        history: Any = [
            *USER,
            {"role": "assistant", "content": [block.model_dump() for block in message.content]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "42"} for block in message.content[2:]],
            },
        ]
        made.says("It is 42.")
        assert (await made.message(messages=history)).content[0].text == "It is 42."
        assert "Result of the call: 42\nResult of the call: 42" in made.prompt and '"city": "Rome"' in made.prompt

    run(check, *ANSWER)


def test_a_response_has_items_of_reasoning_text_and_calls_streamed_or_not() -> None:
    async def check(made: Clients) -> None:
        response = await made.response()
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
        assert response.output[0].content[0].text == "I look it up.\n" and response.output_text == "One moment. "
        assert [(item.name, json.loads(item.arguments)) for item in response.output[2:]] == CALLS
        assert len({item.id for item in response.output}) == 4 and response.output[2].call_id != response.output[3].call_id
        events = [event async for event in await made.response(stream=True)]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].type == "response.completed" and [item.type for item in events[-1].response.output] == [
            item.type for item in response.output
        ]
        done = [event for event in events if event.type == "response.output_item.done"]
        assert [event.output_index for event in done] == [0, 1, 2, 3] and [event.item for event in done] == events[-1].response.output
        thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        assert "".join(thoughts) == "I look it up.\n"
        results = [{"type": "function_call_output", "call_id": item.call_id, "output": "42"} for item in response.output[2:]]
        made.says("It is 42.")
        history = [*USER, *[item.model_dump(exclude_none=True) for item in response.output], *results]
        assert (await made.response(input=history)).output_text == "It is 42."

    run(check, *ANSWER)


def test_with_auto_the_model_decides_and_with_none_nothing_is_read() -> None:
    async def check(made: Clients) -> None:
        choice = (await made.chat()).choices[0]
        assert choice.message.content == "Fine." and not choice.message.tool_calls and choice.finish_reason == "stop"
        made.says(ROME)
        choice = (await made.chat(tool_choice="none")).choices[0]
        assert choice.message.content == ROME and not choice.message.tool_calls and choice.finish_reason == "stop"
        message = await made.message(tool_choice={"type": "none"})
        assert [block.text for block in message.content] == [ROME] and message.stop_reason == "end_turn"
        choice = (await made.chat(tools=openai.omit)).choices[0]
        assert choice.message.content == ROME

    run(check, "Fine.")


def test_reasoning_is_told_apart_where_nobody_offers_tools() -> None:
    async def check(made: Clients) -> None:
        message = (await made.chat(tools=openai.omit)).choices[0].message
        assert (message.reasoning_content, message.content) == ("Well, well.", "Fine.")
        streamed = await gathered(await made.chat(tools=openai.omit, stream=True))
        assert (streamed["reasoning"], streamed["content"], streamed["reason"]) == ("Well, well.", "Fine.", "stop")
        async with made.anthropic.messages.stream(model="dummy", messages=USER, max_tokens=500) as stream:
            blocks = (await stream.get_final_message()).content
        assert [block.to_dict() for block in blocks] == [
            {"type": "thinking", "thinking": "Well, well.", "signature": ""},
            {"type": "text", "text": "Fine."},
        ]
        events = [event async for event in await made.response(tools=openai.omit, stream=True)]
        assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]
        assert events[-1].response.output_text == "Fine."

    run(check, "<thi", "nk>Well,", " well.</think>\n", "\nFine.")


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    ],
)
def test_what_must_be_a_call_is_made_one_by_a_schema(fields: dict[str, Any]) -> None:
    async def check(made: Clients) -> None:
        choice = (await made.chat(**fields)).choices[0]
        assert calls_of(choice.message) == CALLS[:1] and choice.finish_reason == "tool_calls"
        assert "get_weather" in made.schema and "strict" not in made.prompt
        streamed = await gathered(await made.chat(**fields, stream=True))
        assert streamed["calls"] == {0: ("get_weather", '{"city": "Rome"}')}

    run(check, '{"name": "get_weather", ', '"arguments": {"city": ', '"Rome"}}')


STRICT: Any = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}


@pytest.mark.parametrize(
    ("written", "calls"),
    [
        (ROME, CALLS[:1]),
        (ROME.replace("city", "town"), []),
        (ROME.replace('"Rome"', "7"), []),
        (ROME + NOW.replace("{}", '{"hour": 12}'), [*CALLS[:1], ("get_time", {"hour": 12})]),
        ("It is sunny.", []),
    ],
)
def test_a_strict_tool_may_be_called_and_only_a_valid_call_counts(written: str, calls: list[Any]) -> None:
    async def check(made: Clients) -> None:
        choice = (await made.chat(tools=[STRICT, CLOCK])).choices[0]
        assert calls_of(choice.message) == calls and choice.finish_reason == ("tool_calls" if calls else "stop")
        assert calls or choice.message.content == written
        assert not made.schema and "strict" not in made.prompt

    run(check, written)


def test_a_strict_tool_whose_schema_cannot_be_kept_to_is_refused_at_once() -> None:
    async def check(made: Clients) -> None:
        parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
            await made.chat(tools=[tool])
        assert caught.value.param == "tools" and caught.value.code == "unsupported"

    run(check, "no")


def test_a_model_that_no_schema_binds_cannot_be_made_to_call_but_may() -> None:
    async def check(made: Clients) -> None:
        assert calls_of((await made.chat()).choices[0].message) == CALLS[:1]
        with pytest.raises(openai.BadRequestError) as caught:
            await made.chat(tool_choice="required")
        assert caught.value.param == "tool_choice" and caught.value.code == "unsupported"
        for fields in ({"extra_body": {"guided_regex": "a+"}}, {"extra_body": {"structured_outputs": {"choice": ["a"]}}}):
            with pytest.raises(openai.BadRequestError) as caught:
                await made.chat(**fields)
            assert caught.value.param == "structured_outputs"

    run(check, ROME, features=("tool_text",))


def test_what_only_looks_like_a_call_is_shown() -> None:
    cut = ROME[:40]

    async def check(made: Clients) -> None:
        choice = (await made.chat()).choices[0]
        assert choice.message.content == cut and not choice.message.tool_calls and choice.finish_reason == "stop"
        streamed = await gathered(await made.chat(stream=True))
        assert streamed["content"] == cut and not streamed["calls"]

    run(check, *cut)


CUTS = [len(ANSWER) - 1, len(ANSWER) - 20, ANSWER.index(NOW) + 5, ANSWER.index("Rome"), ANSWER.index(ROME) + 3]


@pytest.mark.parametrize("num_characters", CUTS)
def test_a_call_that_the_limit_of_tokens_cuts_off_is_no_text_in_any_api(num_characters: int) -> None:
    cut = ANSWER[:num_characters]
    is_first_whole = len(cut) > ANSWER.index(NOW)
    is_second_whole = cut.endswith("</tool_call")  # its arguments are complete
    expected = CALLS[: is_first_whole + is_second_whole]

    async def check(made: Clients) -> None:
        made.scene.worker.reason = "length"
        choice = (await made.chat(max_tokens=len(cut))).choices[0]
        assert choice.message.content == "One moment. " and choice.finish_reason == "length"
        assert calls_of(choice.message) == expected
        streamed = await gathered(await made.chat(max_tokens=len(cut), stream=True))
        assert (streamed["content"], streamed["reason"]) == ("One moment. ", "length")
        message = await made.message(max_tokens=len(cut))
        assert [block.text for block in message.content if block.type == "text"] == ["One moment. "]
        assert message.stop_reason == "max_tokens" and sum(block.type == "tool_use" for block in message.content) == len(expected)
        response = await made.response(max_output_tokens=len(cut))
        assert response.output_text == "One moment. " and response.status == "incomplete"
        assert sum(item.type == "function_call" for item in response.output) == len(expected)

    run(check, *cut)


def test_a_forced_call_that_is_cut_off_before_its_name_is_no_text_in_any_api() -> None:
    cut = '{"name": "get_wea'

    async def check(made: Clients) -> None:
        made.scene.worker.reason = "length"
        choice = (await made.chat(max_tokens=len(cut), tool_choice="required")).choices[0]
        assert not choice.message.content and not choice.message.tool_calls and choice.finish_reason == "length"
        message = await made.message(max_tokens=len(cut), tool_choice={"type": "any"})
        assert "".join(block.text for block in message.content) == "" and message.stop_reason == "max_tokens"
        response = await made.response(max_output_tokens=len(cut), tool_choice="required")
        assert response.output_text == "" and response.status == "incomplete"

    run(check, cut)


def test_stop_strings_act_on_no_call_in_any_api_that_has_them() -> None:
    async def check(made: Clients) -> None:
        for stop in ("Rome", "}", "<tool_call>", '"arguments"', "\n</tool_call>\n<"):
            choice = (await made.chat(stop=[stop])).choices[0]
            assert calls_of(choice.message) == CALLS and choice.finish_reason == "tool_calls", stop
            message = await made.message(stop_sequences=[stop])
            assert message.stop_reason == "tool_use" and message.stop_sequence is None
        choice = (await made.chat(stop="look it")).choices[0]
        assert choice.message.reasoning_content == "I " and choice.finish_reason == "stop"

    run(check, *ANSWER)


def test_stop_strings_act_on_no_forced_call() -> None:
    async def check(made: Clients) -> None:
        choice = (await made.chat(tool_choice="required", stop=["Rome"])).choices[0]
        assert calls_of(choice.message) == CALLS[:1]

    run(check, *'{"name": "get_weather", "arguments": {"city": "Rome"}}')


def test_an_answer_may_be_held_to_one_call() -> None:
    async def check(made: Clients) -> None:
        choice = (await made.chat(parallel_tool_calls=False)).choices[0]
        assert calls_of(choice.message) == CALLS[:1] and choice.finish_reason == "tool_calls"
        streamed = await gathered(await made.chat(parallel_tool_calls=False, stream=True))
        assert len(streamed["calls"]) == 1 and streamed["reason"] == "tool_calls"
        message = await made.message(tool_choice={"type": "auto", "disable_parallel_tool_use": True})
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]

    run(check, *ANSWER)


def test_a_text_that_must_keep_to_a_schema_has_no_reasoning_and_no_calls() -> None:
    text = '{"name": "get_time", "arguments": {}}'
    schema: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}

    async def check(made: Clients) -> None:
        choice = (await made.chat(response_format=schema)).choices[0]
        assert choice.message.content == text and not choice.message.tool_calls and made.schema == '{"type":"object"}'

    run(check, *text, chat_template=TEMPLATE)


def test_several_answers_are_read_each_for_itself_and_stop_strings_count() -> None:
    async def check(made: Clients) -> None:
        reply = await made.chat(n=2)
        assert [calls_of(choice.message) for choice in reply.choices] == [CALLS, CALLS]
        assert len({call.id for choice in reply.choices for call in choice.message.tool_calls}) == 4
        choice = (await made.chat(stop="moment")).choices[0]
        assert choice.message.content == "One " and not choice.message.tool_calls and choice.finish_reason == "stop"

    run(check, *ANSWER)


def test_a_template_that_does_not_know_tools_is_told_of_them_in_words() -> None:
    async def check(made: Clients) -> None:
        await made.chat()
        assert made.prompt.startswith("system: You may call these functions.") and '"name": "get_weather"' in made.prompt
        assert made.prompt.endswith("user: How is it in Rome?\nassistant:")
        await made.chat(messages=[{"role": "system", "content": "Be brief."}, *USER])
        assert made.prompt.startswith("system: Be brief.\n\nYou may call")
        await made.chat(tools=openai.omit)
        assert made.prompt == "user: How is it in Rome?\nassistant:"

    run(check, "Fine.", chat_template=CHAT_TEMPLATE)


def test_a_template_shows_its_tools_begins_the_reasoning_and_says_how_calls_are_written() -> None:
    async def check(made: Clients) -> None:
        choice = (await made.chat()).choices[0]
        assert made.prompt.startswith("[get_weather][get_time]user:") and made.prompt.endswith("<think>\n")
        assert choice.message.reasoning_content == "Well." and calls_of(choice.message) == CALLS[:1]
        said: Any = {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}
        await made.chat(messages=[*USER, said, *USER])
        assert "assistant: So.(Hm.)\n" in made.prompt
        made.says(f"Well.</think>{ROME}")
        assert (await made.chat()).choices[0].message.content == ROME, "another model's form"

    run(check, "Well.</think>", '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}', chat_template=TEMPLATE)
