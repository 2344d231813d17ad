"""Chat templates: a model's own Jinja, rendered in Jinja's sandbox, as `transformers` renders it.

The sandbox keeps a template from the interpreter, not from using up time and memory: whoever renders another peer's template does so
in a process that can be ended (:mod:`~meshserve.roles.processor.text_process`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

from meshserve.errors import InvalidRequest
from meshserve.wire.structs import is_shallow

MAX_PROMPT_CHARACTERS = 16_000_000

_PROBE, _LATER_PROBE, _NAMED_PROBE = "a probe of what this template takes", "a probe that comes later", "probed_name"
_SPECIAL_TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
"""Which ones a model has comes with each request; a template that adds them to a text fails without."""
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""How templates call the reasoning of an earlier answer, the usual name first."""
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
        self.wants_one_system_text = self._loses_system_texts()
        """It takes one message of the role system, at the beginning."""
        self.arguments = self._arguments_wanted() if "tool_calls" in source else "any"
        """What it takes for the arguments of calls: `text` alone, an `object` alone, or `any`."""
        self._thought = next((name for name in _THOUGHTS if _is_member(name, source)), _THOUGHTS[0])

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, *, tells_tools: bool = False, **variables: Any
    ) -> str:
        """The prompt. With `tells_tools`, tools and calls are told in words to a model whose template does not know them.

        Raises InvalidRequest where the template refuses, fails, or writes more than MAX_PROMPT_CHARACTERS.
        """
        prepared = [self._prepared(message) for message in messages]
        if tells_tools and not self.knows_tools:
            prepared = told_in_words(prepared, tools)
        if self.wants_one_system_text:
            prepared = with_one_system_text(prepared)
        if self.wants_parts:
            prepared = [_in_parts(message) for message in prepared]
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

    def _prepared(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message as this template expects it."""
        found = _with_calls(message, self.arguments)
        if "reasoning_content" in found and self._thought != "reasoning_content":
            thought = found.pop("reasoning_content")
            if not (found["content"] and "tool_calls" in found):  # where both are there, templates of this kind refuse
                found[self._thought] = thought
        return found

    # --- probes: what templates take is told by what they show

    def _loses_system_texts(self) -> bool:
        """Whether the second of two system messages is lost or refused, right after the first or later, and one alone is not."""
        first, later = _said("system", _PROBE), _said("system", _LATER_PROBE)
        asked, answered = _said("user", "a"), _said("assistant", "b")
        chats = ([first, later, asked], [first, asked, answered, asked, later], [asked, later])
        return not all(self._shows_all(chat) for chat in chats)

    def _shows_all(self, chat: list[dict[str, Any]]) -> bool:
        wanted = [message["content"] for message in chat if message["role"] == "system"]
        rendered = self._probed([_in_parts(message) for message in chat] if self.wants_parts else chat)
        places = [rendered.find(text) for text in wanted]
        return -1 not in places and places == sorted(places)

    def _arguments_wanted(self) -> Literal["text", "object", "any"]:
        """A template may refuse an object, or write it as no JSON; or refuse a text, whose members it goes through."""
        as_object = self._with_call({_NAMED_PROBE: _PROBE})
        as_text = self._with_call(json.dumps({_NAMED_PROBE: _PROBE}))
        if f'"{_NAMED_PROBE}"' in as_text and (not as_object or f"'{_NAMED_PROBE}'" in as_object):
            return "text"
        return "object" if as_object and not as_text else "any"

    def _with_call(self, arguments: Any) -> str:
        """A prompt with a call in it; empty if the template refuses."""
        function = {"name": "probe", "arguments": arguments}
        call = {"id": "probe1234", "type": "function", "function": function}  # some templates want nine letters or digits
        answered = {**_said("assistant", ""), "tool_calls": [call]}
        result = {**_said("tool", "b"), "tool_call_id": call["id"], "name": "probe"}
        chat = [_said("user", "a"), answered, result]
        return self._probed([_in_parts(message) for message in chat] if self.wants_parts else chat)

    def _loses_text(self) -> bool:
        """Whether a content that is text is lost, and one of parts is not."""
        return not self._shows(_PROBE) and self._shows([{"type": "text", "text": _PROBE}])

    def _shows(self, content: Any) -> bool:
        rendered = self._probed([{"role": "user", "content": content}])
        return _PROBE in rendered and "'type'" not in rendered

    def _probed(self, messages: list[dict[str, Any]]) -> str:
        """The prompt; empty if the template refuses."""
        try:
            return self._render(messages=messages, tools=None, add_generation_prompt=True, **_SPECIAL_TOKENS)
        except (InvalidRequest, *self._failures):
            return ""


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, **variables: Any) -> str:
    """The prompt that a chat stands for, the assistant's turn begun unless `add_generation_prompt` is False.

    `variables` are what else the template may use: `bos_token`, `documents`, and so on. Raises InvalidRequest where it refuses them.
    """
    return _compiled(template).render(messages, tools, **variables)


@lru_cache(maxsize=8)
def _compiled(template: str) -> ChatTemplate:
    return ChatTemplate(template)


def _is_member(name: str, source: str) -> bool:
    """Whether the template asks something for its member of this name; the word may stand in texts too."""
    return re.search(rf"\.{name}\b|['\"]{name}['\"]", source) is not None


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def with_one_system_text(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same chat with its system messages as one, in their order, at the beginning."""
    texts = [message["content"] for message in messages if message["role"] == "system"]
    if not texts:
        return [*messages]
    others = [message for message in messages if message["role"] != "system"]
    return [_said("system", "\n\n".join(texts)), *others]


def _with_calls(message: Mapping[str, Any], wanted: Literal["text", "object", "any"]) -> dict[str, Any]:
    """A message as templates expect it: calls in OpenAI's form, the arguments as objects unless text is wanted."""
    if "tool_calls" not in message:
        return dict(message)
    calls = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": _arguments(call["arguments"], wanted)},
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _arguments(text: str, wanted: Literal["text", "object", "any"]) -> Any:
    """What is no JSON object, as of a call that was cut off, or too deep for what templates do with it, stays text where the
    template takes that, and is an object with that text where it takes none.
    """
    if wanted == "text":
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and is_shallow(value):
        return value
    return {"arguments": text} if wanted == "object" else text


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
