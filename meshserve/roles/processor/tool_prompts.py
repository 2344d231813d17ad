"""Tools for models whose chat templates know nothing of them: told in words, in the form that any model can write. Pure."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

_RULE = (
    "You may call these functions. To call one, answer with nothing but a JSON object of this form: "
    '{"name": FUNCTION, "arguments": {...}}; to call several, with a list of such objects. Otherwise answer in words.'
)


def told_in_words(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> list[Json]:
    """The same chat without tools: a system text lists them, calls are what their answers said, and results are the user's."""
    told: list[Json] = []
    previous = ""
    for message in messages:
        _add(told, message, follows_result=previous == "tool")
        previous = message.get("role", "")
    if not tools:
        return told
    functions = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    text = f"{_RULE}\nThe functions:\n{functions}"
    if told and told[0].get("role") == "system":
        return [{**told[0], "content": f"{_text(told[0])}\n\n{text}"}, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def _add(told: list[Json], message: Mapping[str, Any], follows_result: bool) -> None:
    if message.get("role") == "tool":
        result = f"Result of the call: {_text(message)}"
        if follows_result:
            told[-1]["content"] += f"\n{result}"  # many templates want the two sides to take turns
        else:
            told.append({"role": "user", "content": result})
    elif calls := message.get("tool_calls"):
        functions = [call["function"] for call in calls]
        entries = [{"name": function["name"], "arguments": function["arguments"]} for function in functions]
        written = json.dumps(entries[0] if len(entries) == 1 else entries, ensure_ascii=False)
        told.append({"role": "assistant", "content": f"{_text(message)}\n{written}".strip()})
    else:
        told.append(dict(message))


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""
