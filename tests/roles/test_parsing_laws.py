"""Laws for bodies of requests: any JSON is a request or a clear refusal, and a text in parts is the text."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.models.anthropic import parse_message
from meshserve.roles.frontend.models.chat import parse_chat
from meshserve.roles.frontend.models.completions import parse_completion
from meshserve.roles.frontend.models.responses import parse_response
from meshserve.wire.completion import CompletionRequest
from tests.roles.test_parsing import USER, chat, message, response

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    *("model", "messages", "prompt", "input", "max_tokens", "n", "tools", "tool_choice", "response_format", "stop", "logit_bias"),
    *("logprobs", "stream", "stream_options", "text", "system", "content", "role", "type", "function", "name", "include"),
    *("reasoning", "meshserve", "metadata", "thinking", "echo", "best_of"),
]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5), st.sampled_from(FIELDS), JSON)
def test_any_json_is_a_request_or_a_clear_refusal(fields: dict[str, Any], name: str, value: Any) -> None:
    valid = {"model": "m", "messages": [USER], "prompt": "p", "input": "i", "max_tokens": 5}
    for body in (fields, {**valid, name: value}):
        data = json.dumps(body).encode()
        for parse in (parse_completion, parse_chat, parse_response, parse_message):
            try:
                request, _ = parse(data, "r", "c")
            except InvalidRequest as error:
                assert error.http_status == 400 and error.message
            else:
                assert CompletionRequest.from_wire(request.to_wire()) == request


PARTS = st.lists(st.text(max_size=10).map(lambda text: {"type": "text", "text": text}), max_size=5)


@given(PARTS, st.lists(st.text(max_size=3), max_size=3))
def test_text_in_parts_is_the_text_joined_and_any_other_part_is_named(parts: list[dict[str, str]], others: list[str]) -> None:
    text = "".join(part["text"] for part in parts)
    assert chat(messages=[{"role": "user", "content": parts}]).messages == [{"role": "user", "content": text}]
    for kind in others:
        if kind != "text":
            with pytest.raises(Unsupported) as caught:
                chat(messages=[{"role": "user", "content": [*parts, {"type": kind}]}])
            assert caught.value.param == f"messages[0].content[{len(parts)}]"


KINDS = st.sampled_from(["input_text", "output_text", "text"])
ROLES = st.sampled_from(["user", "system", "developer"])


@given(st.lists(st.tuples(st.text(max_size=10), KINDS), max_size=5), ROLES)
def test_a_text_in_any_parts_is_the_same_message_in_every_api(given_parts: list[tuple[str, str]], role: str) -> None:
    text = "".join(part for part, _ in given_parts)
    plain = [{"type": "text", "text": part} for part, _ in given_parts]
    typed = [{"type": kind, "text": part} for part, kind in given_parts]
    expected = {"role": "system" if role == "developer" else role, "content": text}
    assert chat(messages=[{"role": role, "content": plain}, USER]).messages == [expected, USER]
    assert response(input=[{"role": role, "content": typed}, USER]).messages == [expected, USER]
    assert message(system=plain).messages == [{"role": "system", "content": text}, USER]
    assert message(messages=[{"role": "user", "content": plain}]).messages == [{"role": "user", "content": text}]
