"""The dummy model's script: what is said at which turn, and what ends in an error."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from meshserve.engines.dummy.constrained import constrained_output
from meshserve.engines.dummy.options import parse_options
from meshserve.engines.dummy.script import TEMPLATE, Script, read_script
from meshserve.engines.dummy.vocabulary import OWN_VOCABULARY
from meshserve.engines.protocol import EngineOptions
from meshserve.engines.tokenizers import EOS_TOKEN, ByteTokenizer
from meshserve.errors import InvalidRequest, UsageError
from meshserve.roles.processor.templating import render_chat
from meshserve.wire.generation import Sampling

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "so"}
PARAMETERS = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "size": {"type": "integer"}, "names": {"type": "object", "propertyNames": {"pattern": "a"}}},
    "required": ["path"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "Write", "parameters": PARAMETERS}}]


def script(tmp_path: Path, *turns: Any) -> Script:
    path = tmp_path / "script.json"
    path.write_text(json.dumps(turns))
    return read_script(path)


def said(found: Script, messages: Sequence[Any], tools: Any = None, constrained: Any = None) -> str | None:
    """What the model says, byte by byte; None if the script does not say."""
    prompt = ByteTokenizer().encode(render_chat(TEMPLATE, messages, tools))
    output = found.output(prompt, constrained)
    if output is None:
        return None
    tokens: list[int] = []
    while (token := output.candidates(7, can_end=True)[0]) != EOS_TOKEN:
        output.take(token)
        tokens.append(token)
    return bytes(tokens).decode()


def test_the_turn_is_the_number_of_answers_in_the_prompt(tmp_path: Path) -> None:
    found = script(tmp_path, {"text": "one ✓"}, {"reasoning": "hm", "text": "two"})
    assert said(found, [USER]) == "one ✓"
    assert said(found, [USER, ANSWER, USER]) == "<think>hm</think>two"
    assert said(found, [USER, ANSWER, USER, ANSWER, USER]) is None


def test_a_call_is_written_as_models_write_calls_and_in_the_order_of_its_schema(tmp_path: Path) -> None:
    call = {"name": "Write", "arguments": {"size": 3, "path": "a"}}
    found = script(tmp_path, {"text": "so", "calls": [call, call]})
    written = '{"name": "Write", "arguments": {"path": "a", "size": 3}}'
    assert said(found, [USER], TOOLS) == f"so<tool_call>{written}</tool_call><tool_call>{written}</tool_call>"
    assert said(found, [USER]) is None, "a prompt without tools is answered as without a script"
    schema = {"type": "object", "properties": {"name": {"const": "Write"}, "arguments": {"type": "object"}}}
    forced = constrained_output(Sampling(json_schema=json.dumps(schema)), OWN_VOCABULARY)
    assert said(found, [USER], TOOLS, forced) == written, "under a schema the call alone"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("Read", {"path": "a"}, "not among the tools Write"),
        ("Write", {"size": 3}, "does not allow"),
        ("Write", {"path": 7}, "does not allow"),
        ("Write", {"path": "a", "more": 1}, "does not allow"),
    ],
)
def test_a_call_that_the_prompts_tools_do_not_allow_ends_in_an_error(
    tmp_path: Path, name: str, arguments: dict[str, Any], words: str
) -> None:
    found = script(tmp_path, {"calls": [{"name": name, "arguments": arguments}]})
    with pytest.raises(InvalidRequest, match=words):
        said(found, [USER], TOOLS)


def test_text_that_a_constraint_does_not_allow_ends_in_an_error(tmp_path: Path) -> None:
    found = script(tmp_path, {"text": "no"})
    longer = constrained_output(Sampling(choices=("yes", "nothing")), OWN_VOCABULARY)
    assert said(found, [USER], constrained=longer) == "nothing", "what begins alike is gone on with"
    forced = constrained_output(Sampling(choices=("yes",)), OWN_VOCABULARY)
    with pytest.raises(InvalidRequest, match="grammar"):
        said(found, [USER], constrained=forced)


@pytest.mark.parametrize("text", ["{", "{}", '[{"word": "x"}]', '[{"text": 7}]', '[{"calls": [{"name": "f"}]}]'])
def test_what_is_no_script_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "script.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="option script"):
        parse_options(EngineOptions(options={"script": str(path)}))
    with pytest.raises(UsageError, match="cannot be read"):
        parse_options(EngineOptions(options={"script": str(tmp_path / "none.json")}))


def test_a_model_with_a_script_is_another_model_that_writes_calls_as_text(tmp_path: Path) -> None:
    cards = []
    for text in ("one", "two"):
        script(tmp_path, {"text": text})
        cards.append(parse_options(EngineOptions(options={"script": str(tmp_path / "script.json")})).card("dummy"))
    plain = parse_options(EngineOptions()).card("dummy")
    assert len({card.model_hash for card in (*cards, plain)}) == 3
    assert all("tool_text" in card.features for card in cards) and "tool_text" not in plain.features
