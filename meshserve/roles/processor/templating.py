"""Chat templates: a model's own Jinja, rendered in Jinja's sandbox, as `transformers` renders it.

The sandbox keeps a template from the interpreter, not from using up time and memory: whoever renders another peer's template does so
in a process that can be ended (:mod:`~meshserve.roles.processor.text_process`).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from meshserve.errors import InvalidRequest
from meshserve.wire.structs import is_shallow

MAX_PROMPT_CHARACTERS = 16_000_000

_PROBE = "a probe of what this template takes"
_RULE = (
    "You may call these functions. To call one, answer with nothing but a JSON object of this form: "
    '{"name": FUNCTION, "arguments": {...}}; to call several, with a list of such objects. Otherwise answer in words.'
)


def _raise_exception(message: str) -> None:
    raise InvalidRequest(message, param="messages")


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """A template, compiled. Raises InvalidRequest if it is not Jinja."""

    def __init__(self, source: str) -> None:
        from jinja2 import TemplateError, meta  # a slow import that completions need not wait for

        self._failures = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError)
        try:
            parsed = _environment().parse(source)
            self.knows_tools = "tools" in meta.find_undeclared_variables(parsed)
            """It is written for tools."""
            self._template = _environment().from_string(parsed)
        except self._failures as error:
            raise InvalidRequest(f"the model's chat template cannot be read: {error}", param="messages") from error
        self.wants_parts = self._loses_text()
        """It takes a message's content as a list of parts only."""

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, *, tells_tools: bool = False, **variables: Any
    ) -> str:
        """The prompt. With `tells_tools`, tools and calls are told in words to a model whose template does not know them.

        Raises InvalidRequest where the template refuses, fails, or writes more than MAX_PROMPT_CHARACTERS.
        """
        prepared = [_with_calls(message) for message in messages]
        if tells_tools and not self.knows_tools:
            prepared = told_in_words(prepared, tools)
        if self.wants_parts:
            prepared = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in prepared]
        given = {"add_generation_prompt": True, "documents": None, **variables}
        try:
            return self._render(messages=prepared, tools=list(tools) if tools else None, **given)
        except self._failures as error:
            raise InvalidRequest(f"the model's chat template does not take these messages: {error}", param="messages") from error

    def _render(self, **variables: Any) -> str:
        pieces, length = [], 0
        for piece in self._template.generate(**variables):
            length += len(piece)
            if length > MAX_PROMPT_CHARACTERS:
                raise InvalidRequest("the messages are too long", param="messages")
            pieces.append(piece)
        return "".join(pieces)

    def _loses_text(self) -> bool:
        """Whether a content that is text is lost, and one of parts is not."""
        return not self._shows(_PROBE) and self._shows([{"type": "text", "text": _PROBE}])

    def _shows(self, content: Any) -> bool:
        try:
            rendered = self._render(messages=[{"role": "user", "content": content}], tools=None, add_generation_prompt=True)
        except (InvalidRequest, *self._failures):
            return False
        return _PROBE in rendered and "'type'" not in rendered


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, **variables: Any) -> str:
    """The prompt that a chat stands for, the assistant's turn begun unless `add_generation_prompt` is False.

    `variables` are what else the template may use: `bos_token`, `documents`, and so on. Raises InvalidRequest where it refuses them.
    """
    return _compiled(template).render(messages, tools, **variables)


@lru_cache(maxsize=8)
def _compiled(template: str) -> ChatTemplate:
    return ChatTemplate(template)


def _with_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: calls in OpenAI's form, but with the arguments as objects."""
    if "tool_calls" not in message:
        return dict(message)
    calls = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": _arguments(call["arguments"])},
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _arguments(text: str) -> Any:
    """What is not JSON, or too deep for what templates do with it, stays text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) and is_shallow(value) else text


def told_in_words(messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None) -> list[dict[str, Any]]:
    """The same chat without tools: a system text lists them, calls are what their answers said, and results are the user's."""
    told: list[dict[str, Any]] = []
    previous = ""
    for message in messages:
        _tell(told, message, follows_result=previous == "tool")
        previous = message["role"]
    if not tools:
        return told
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = f"{_RULE}\nThe functions:\n{functions}"
    if told and told[0]["role"] == "system":
        return [{**told[0], "content": f"{told[0]['content']}\n\n{text}"}, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def _tell(told: list[dict[str, Any]], message: dict[str, Any], follows_result: bool) -> None:
    if message["role"] == "tool":
        result = f"Result of the call: {message['content']}"
        if follows_result:
            told[-1]["content"] += f"\n{result}"  # many templates want the two sides to take turns
        else:
            told.append({"role": "user", "content": result})
    elif calls := message.get("tool_calls"):
        entries = [call["function"] for call in calls]
        written = json.dumps(entries[0] if len(entries) == 1 else entries, ensure_ascii=False)
        told.append({"role": "assistant", "content": f"{message['content']}\n{written}".strip()})
    else:
        told.append(message)


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks what the assistant said, for training; here only what is in it counts."""

        tags = {"generation"}  # noqa: RUF012  # Jinja's way

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _to_json
    return environment
