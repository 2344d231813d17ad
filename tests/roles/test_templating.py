"""Chat templates as `transformers` renders them."""

import json
from typing import Any

import pytest

from meshserve.errors import InvalidRequest
from meshserve.roles.processor import templating
from meshserve.roles.processor.templating import ChatTemplate, render_chat

HI = [{"role": "user", "content": "hi"}]
PARTS_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %};{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}\n  {{ m.content }}\n{% endfor %}\n.", "  hi\n."),  # blocks leave no lines
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{{ {'a': '<&\u00e9>', 'b': [1]} | tojson }}", '{"a": "<&\u00e9>", "b": [1]}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{% generation %}said {{ messages[0].content }}{% endgeneration %}", "said hi"),
        ("{{ bos_token }}{{ eos_token }}{{ pad_token }}", "<s>"),
        ("{{ add_generation_prompt }}{{ documents }}{{ tools is none }}", "TrueNoneTrue"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0]['role']) }}", "[user]"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ],
)
def test_templates_find_what_they_are_written_for(template: str, expected: str) -> None:
    assert render_chat(template, HI, bos_token="<s>") == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0]",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ none + 1 }}",
        "{% for i in range(200000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'secrets' %}",
    ],
)
def test_what_a_template_must_not_or_cannot_do_is_an_error_of_the_request(template: str) -> None:
    with pytest.raises(InvalidRequest):
        render_chat(template, HI)


def test_a_prompt_that_grows_too_long_is_ended_while_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templating, "MAX_PROMPT_CHARACTERS", 1000)
    seen = []
    template = ChatTemplate("{% for i in range(100000) %}{{ note() }}123456789{% endfor %}")
    with pytest.raises(InvalidRequest, match="too long"):
        template.render(HI, note=lambda: seen.append(1) or "")  # type: ignore[func-returns-value]
    assert len(seen) < 1000


def test_contents_are_given_as_the_template_wants_them() -> None:
    for template in (PARTS_TEMPLATE, "{% for m in messages %}{{ m.content }};{% endfor %}"):
        assert render_chat(template, [{"role": "user", "content": "ab"}, *HI]) == "ab;hi;"
    assert ChatTemplate(PARTS_TEMPLATE).wants_parts
    both = "{% if messages[0].content is string %}{{ messages[0].content }}{% else %}{{ messages[0].content[0].text }}{% endif %}"
    assert not ChatTemplate(both).wants_parts


def test_tools_are_seen_and_arguments_of_calls_are_objects() -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    call = {"id": "1", "name": "look", "arguments": '{"at": "it"}'}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    template = (
        "{{ tools[0].function.name }} {{ messages[0].tool_calls[0].function.arguments.at }} "
        "{{ messages[0].tool_calls[0].type }} {{ messages[0].content == '' }}"
    )
    assert render_chat(template, [message], tools) == "look it function True"
    assert call == {"id": "1", "name": "look", "arguments": '{"at": "it"}'}, "what the client sent stays as it is"
    deep = '{"a":' * 100 + "1" + "}" * 100
    for odd in ("{", "[1]", deep):
        messages = [{**message, "tool_calls": [{**call, "arguments": odd}]}]
        assert render_chat("{{ messages[0].tool_calls[0].function.arguments }}", messages) == odd


# --- what another model began, in templates of several kinds

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
FIRST_ONLY = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}\n{% endif %}"
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)
ALTERNATING = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}\n{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<system>a\n<system>b\n<user>hi\n<assistant>so\n<system>c\n<user>on\n"),
        (CHATML + "{{ '' + eos_token }}", "<system>a\n<system>b\n<user>hi\n<assistant>so\n<system>c\n<user>on\n"),
        (FIRST_ONLY, "<system>a\n\nb\n\nc\n<user>hi\n<assistant>so\n<user>on\n"),
        (ALTERNATING, "<system>a\n\nb\n\nc\n<user>hi\n<assistant>so\n<user>on\n"),
    ],
)
def test_several_system_messages_are_one_in_their_order_where_the_template_takes_one(template: str, expected: str) -> None:
    chat = [said("system", "a"), said("system", "b"), *HI, said("assistant", "so"), said("system", "c"), said("user", "on")]
    assert render_chat(template, chat, eos_token="") == expected
    assert render_chat(template, HI, eos_token="") == "<user>hi\n"
    with pytest.raises(InvalidRequest, match="no system"):
        render_chat(NO_SYSTEM, chat)


CALLS = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
END_OF_CALLS = "{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("inner", "arguments", "expected"),
    [
        ("{{ c.function.arguments | tojson }}", '{"a": "b"}', '{"a": "b"}'),
        ("{{ c.function.arguments | tojson }}", '{"a": "b', json.dumps('{"a": "b')),
        ("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}", '{"a": "b"}', "a=b;"),
        ("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}", '{"a": "b', 'arguments={"a": "b;'),
        ("{{ '<' + c.function.arguments + '>' }}", '{"a": "b"}', '<{"a": "b"}>'),
        ("{{ '<' + c.function.arguments + '>' }}", '{"a": "b', '<{"a": "b>'),
        ("{{ c.function.arguments }}", '{"a": "b"}', '{"a": "b"}'),
        ("{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}", "{", "{"),
    ],
)
def test_arguments_are_text_or_an_object_as_the_template_takes_them(inner: str, arguments: str, expected: str) -> None:
    call = {"id": "1", "name": "look", "arguments": arguments}
    chat: list[Any] = [*HI, {**said("assistant", ""), "tool_calls": [call]}, {**said("tool", ""), "tool_call_id": "1"}]
    assert render_chat(CALLS + inner + END_OF_CALLS, chat) == "hi" + expected


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_of_earlier_turns_reaches_a_template_under_the_name_that_it_has_there(name: str) -> None:
    template = f"{{% for m in messages %}}{{{{ m.{name} or '' }}}}{{{{ m.content }}}};{{% endfor %}}"
    chat = [*HI, {**said("assistant", "so"), "reasoning_content": "hm "}]
    assert render_chat(template, chat) == "hi;hm so;"
    assert render_chat(CHATML, chat) == "<user>hi\n<assistant>so\n", "no other template is changed"
    told = "You do your thinking aloud. " + "{% for m in messages %}{{ m.reasoning or '' }}{{ m.content }};{% endfor %}"
    assert render_chat(told, chat) == "You do your thinking aloud. hi;hm so;", "the word alone is no member"
