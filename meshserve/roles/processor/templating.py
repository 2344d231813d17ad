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
        if tells_tools and not self.knows_tools:
            messages = told_in_words(messages, tools)
        prepared = [_prepare(message, self.wants_parts) for message in messages]
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


def _prepare(message: Mapping[str, Any], wants_parts: bool) -> dict[str, Any]:
    """As templates expect a message: text or parts, and the arguments of tool calls as objects, where clients send JSON as text."""
    prepared = dict(message)
    content = prepared.get("content")
    if isinstance(content, str) and wants_parts:
        prepared["content"] = [{"type": "text", "text": content}]
    elif isinstance(content, list) and not wants_parts:
        prepared["content"] = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    if isinstance(prepared.get("tool_calls"), list):
        prepared["tool_calls"] = [_with_arguments(call) for call in prepared["tool_calls"]]
    return prepared


def _with_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def told_in_words(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> list[dict[str, Any]]:
    """The same chat without tools: a system text lists them, calls are what their answers said, and results are the user's."""
    told: list[dict[str, Any]] = []
    previous = ""
    for message in messages:
        _tell(told, message, follows_result=previous == "tool")
        previous = message.get("role", "")
    if not tools:
        return told
    functions = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    text = f"{_RULE}\nThe functions:\n{functions}"
    if told and told[0].get("role") == "system":
        return [{**told[0], "content": f"{_text(told[0])}\n\n{text}"}, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def _tell(told: list[dict[str, Any]], message: Mapping[str, Any], follows_result: bool) -> None:
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
