"""OpenAI's Responses API: its fields, and what these become. Pure.

What a request refers to, which a processor keeps, is found before the request is parsed: an earlier conversation
comes as :class:`Before`, and a reference to an item is replaced by the item.
"""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from meshserve.errors import InvalidRequest, PreviousResponseNotFound, ResponseNotFound
from meshserve.roles.frontend.models import kinds
from meshserve.roles.frontend.models.common import Body, Fields, Parsed, ResponseOptions, either, given, invalid, only_with
from meshserve.roles.frontend.models.fields import others
from meshserve.roles.frontend.models.reading import read, read_object, set_aside
from meshserve.roles.frontend.models.requests import (
    LabelledBody,
    Message,
    check_calls,
    finite_text,
    format_schema,
    paired,
    sampled,
    text_of,
    tool_fields,
)
from meshserve.wire.completion import MAX_MESSAGES, CompletionRequest, Keep

LOGPROBS = "message.output_text.logprobs"
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
"""Reasoning is given out as it is: nothing is encrypted."""
REFERENCE = "item_reference"
PARAMS = {
    "prompt": "input",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "logprobs": "include",
}
"""How this API calls what a processor may find fault with."""
_LABELS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


class ResponseRefusal(Body, kw_only=True, tag_field="type", tag="refusal"):
    """Text of an answer that refuses."""

    refusal: str

    @property
    def text(self) -> str:
        """What the model is shown."""
        return self.refusal


class InputText(Body, kw_only=True, tag_field="type", tag="input_text"):
    """Text that was asked."""

    text: str


class OutputText(Body, kw_only=True, tag_field="type", tag="output_text"):
    """Text that was answered."""

    text: str


class OtherText(Body, kw_only=True, tag_field="type", tag="text"):
    """Text."""

    text: str


_Part = Annotated[InputText | OutputText | OtherText | ResponseRefusal, kinds.PART]
_Content = Annotated[str | list[_Part], kinds.CONTENT]


class InputMessage(Body, kw_only=True, tag_field="type", tag="message"):
    """A message, which need not say so."""

    role: Literal["user", "assistant", "system", "developer"]
    content: _Content

    IS_UNTAGGED = True


class FunctionCall(Body, kw_only=True, tag_field="type", tag="function_call"):
    """Answered by an output that has its `call_id`."""

    call_id: kinds.NonEmpty
    name: kinds.NonEmpty
    arguments: str | None = None


class FunctionCallOutput(Body, kw_only=True, tag_field="type", tag="function_call_output"):
    """What a call came to, or what a client tells that the model has not asked for: that has a name and no `call_id`."""

    call_id: kinds.NonEmpty | None = None
    name: kinds.NonEmpty | None = None
    output: _Content

    RULES = (either(given("call_id", type="string"), given("name", type="string")),)


class CustomToolCall(Body, kw_only=True, tag_field="type", tag="custom_tool_call"):
    """A call whose arguments are text of any form; answered by an output that has its `call_id`."""

    call_id: kinds.NonEmpty
    name: kinds.NonEmpty
    input: str = ""

    @property
    def arguments(self) -> str:
        """As those of a function."""
        return json.dumps({"input": self.input}, ensure_ascii=False)


class CustomToolCallOutput(Body, kw_only=True, tag_field="type", tag="custom_tool_call_output"):
    """What such a call came to."""

    call_id: kinds.NonEmpty
    output: _Content


class ReasoningText(Body, kw_only=True):
    """Part of it."""

    text: str = ""


class Reasoning(Body, kw_only=True, tag_field="type", tag="reasoning"):
    """Of an earlier answer. The model's template decides whether it is shown again."""

    content: list[ReasoningText] | None = None
    summary: list[ReasoningText] | None = None

    @property
    def text(self) -> str:
        """All of it, or else what sums it up. What is encrypted says nothing."""
        return "".join([part.text for part in self.content or self.summary or ()])


class ItemReference(Body, kw_only=True, tag_field="type", tag=REFERENCE):
    """Stands for an item of a response that is kept."""

    id: kinds.NonEmpty


_Calls = FunctionCall | CustomToolCall
_Outputs = FunctionCallOutput | CustomToolCallOutput
Item = (
    InputMessage
    | FunctionCall
    | FunctionCallOutput
    | CustomToolCall
    | CustomToolCallOutput
    | Reasoning
    | ItemReference
    | kinds.LeftOutItem
)
_Items = Annotated[list[Item], Meta(min_length=1, max_length=MAX_MESSAGES)]


class TextSchema(kinds.NamedSchema, kw_only=True, tag_field="type", tag="json_schema"):
    """The text is a document that is valid under the schema."""


class TextOptions(Body):
    """The form of the text."""

    format: kinds.FreeText | kinds.JsonObject | TextSchema | None = None

    OTHERS = others("text")


class FlatTool(kinds.Described, kw_only=True):
    """What a model may use: a function."""

    type: Literal["function"]
    parameters: kinds.Parameters | None = None


class FlatChoice(Body, kw_only=True):
    """The one function that is called."""

    type: Literal["function"]
    name: kinds.NonEmpty


_INCLUDE = Meta(max_length=16, description=f"Others than {' and '.join(INCLUDED)} are ignored.")
_TOP_LOGPROBS = Meta(description=f"Goes with `include` of `{LOGPROBS}` only.")


_PREVIOUS = Meta(description="The response, one that is kept, which this one goes on from.")
_STORE = Meta(description="Keep the response for requests that refer to it. It is lost when its processor ends.")


class ResponseBody(LabelledBody, kw_only=True):
    """`POST /v1/responses`."""

    input: Annotated[str | _Items, kinds.mistake(f"must be text or a list of 1 to {MAX_MESSAGES} items")]
    instructions: str | None = None
    previous_response_id: Annotated[kinds.NonEmpty, _PREVIOUS] | None = None
    store: Annotated[bool, _STORE] = True
    max_output_tokens: kinds.TokenLimit | None = None
    max_tool_calls: kinds.TokenLimit | None = None
    metadata: dict[str, Any] | None = None
    include: Annotated[list[str], _INCLUDE] | None = None
    top_logprobs: Annotated[kinds.NumLogprobs, _TOP_LOGPROBS] = 0
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], kinds.TOOLS] | None = None
    tool_choice: Annotated[Literal["none", "auto", "required"] | FlatChoice | None, kinds.CHOICE] = None
    parallel_tool_calls: kinds.Parallel = True
    stream: kinds.Stream = False
    stream_options: Annotated[dict[str, Any] | None, kinds.STREAM_ONLY] = None

    OTHERS = others("responses")
    LEAVES_OUT: ClassVar[dict[str, tuple[str, ...]]] = {"tools": ("function",)}
    GOES_WITH: ClassVar[dict[str, str]] = {"stream_options": "stream"}
    RULES = (
        kinds.TOOLS_RULE,
        only_with(given("include", type="array", contains={"const": LOGPROBS}), "top_logprobs", 0),
    )
    EXAMPLE: ClassVar[Fields] = {"model": "dummy", "input": "Hello", "max_output_tokens": 16}


@dataclass(frozen=True, slots=True)
class Before:
    """What a request goes on from or refers to."""

    messages: list[Message] | None = None
    """The conversation to which `output` was the answer; None: it was not found."""
    output: list[Fields] = field(default_factory=list)
    items: dict[str, Fields] = field(default_factory=dict)
    """Those that the input refers to, by id."""


NOTHING = Before()


def parse_response(
    body: bytes, request_id: str, client_id: str, before: Before = NOTHING, created_s: int = 0
) -> Parsed:
    """`POST /v1/responses`. Raises InvalidRequest that names the field. `created_s` is when the client asked, in
    seconds since 1970, if the answer may be kept."""
    fields, ignored = read_object(body), list[str]()
    if isinstance(items := fields.get("input"), list):  # only messages may leave out what they are
        fields["input"] = [_whole(item, before) if isinstance(item, dict) else item for item in items]
    asked = read(ResponseBody, fields, ignored)
    set_aside(TextOptions, fields.get("text") or {}, ignored, "text.")
    tools, choice = [(tool, tool.parameters) for tool in asked.tools or ()], asked.tool_choice
    name = choice.name if isinstance(choice, FlatChoice) else None
    echoed = _echoed(asked, fields)
    has_instructions = asked.instructions is not None
    echo = _text_of(echoed)
    keep = Keep(request_id, created_s, echo, has_instructions) if asked.store else None
    request = CompletionRequest(
        request_id,
        "chat",
        messages=_messages(asked, before, ignored),
        keep=keep,
        max_tokens=asked.max_output_tokens,
        logprobs=_logprobs(asked, ignored),
        json_schema=format_schema(asked.text and asked.text.format, "text.format"),
        client_id=client_id,
        **tool_fields(tools, "parameters", choice, name, asked.parallel_tool_calls),
        **sampled(asked, fields, None, asked.prompt_cache_key or asked.user),
    )
    return request, ResponseOptions(asked.stream, echoed=echoed, ignored=ignored, created_s=created_s)


def _whole(item: Fields, before: Before) -> Fields:
    """Only messages may leave out what they are, and what refers to an item stands for the item."""
    is_reference = item.get("type") == REFERENCE
    return before.items.get(str(item.get("id")), item) if is_reference else {"type": "message", **item}


def references(fields: Fields) -> tuple[str | None, list[str]]:
    """What a request refers to, if that can be said of it: a response, and items."""
    previous, items = fields.get("previous_response_id"), fields.get("input")
    found = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    ids = [item["id"] for item in found if item.get("type") == REFERENCE and isinstance(item.get("id"), str)]
    return previous if isinstance(previous, str) and previous else None, ids


def _echoed(asked: ResponseBody, fields: Fields) -> Fields:
    """What a response repeats of its request."""
    same = "instructions max_output_tokens max_tool_calls parallel_tool_calls previous_response_id store temperature"
    text = fields.get("text") or {}
    return {
        **{name: getattr(asked, name) for name in (*same.split(), "top_logprobs", "top_p", *_LABELS)},
        "metadata": asked.metadata or {},
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": fields.get("tools") or [],
        "text": {"format": text.get("format") or {"type": "text"}, "verbosity": "medium"},
    }


def _text_of(echoed: Fields) -> str:
    """As JSON, which any client can read. Raises InvalidRequest that names the field."""
    try:
        return finite_text(echoed, "the body")
    except InvalidRequest:
        for name, value in echoed.items():
            finite_text(value, name)
        raise


def _logprobs(asked: ResponseBody, ignored: list[str]) -> int:
    included = asked.include or []
    ignored += [f"include.{name}" for name in included if name not in INCLUDED]
    if LOGPROBS in included:
        return asked.top_logprobs
    if asked.top_logprobs:
        raise invalid("top_logprobs", f"goes with include of {LOGPROBS} only")
    return -1


def _messages(asked: ResponseBody, before: Before, ignored: list[str]) -> list[Message]:
    messages: list[Message] = []
    if asked.instructions is not None:
        messages.append({"role": "system", "content": asked.instructions})
    if asked.previous_response_id is not None:
        messages += _conversation(asked, before)
    if isinstance(asked.input, str):
        messages.append({"role": "user", "content": asked.input})
    else:
        _add_items(messages, asked.input, ignored)
    if not messages:
        raise invalid("input", "has no message")
    if len(messages) > MAX_MESSAGES:
        raise invalid("input", f"has more than {MAX_MESSAGES} messages with those before")
    messages = paired(messages)
    check_calls(messages, "input")
    return messages


def _conversation(asked: ResponseBody, before: Before) -> list[Message]:
    """All before this request, the answer included."""
    if before.messages is None:
        shown, param = asked.previous_response_id, "previous_response_id"
        raise PreviousResponseNotFound(f"Previous response with id {shown!r:.80} not found.", param=param)
    messages = list(before.messages)
    answer = read(ResponseBody, {"model": asked.model, "input": before.output or ""}, []).input
    _add_items(messages, answer if isinstance(answer, list) else [], [])
    return messages


def _add_items(messages: list[Message], items: list[Item], ignored: list[str]) -> None:
    thought = ""
    for index, item in enumerate(items):
        if isinstance(item, Reasoning):
            thought += item.text
        elif isinstance(item, ItemReference):
            raise ResponseNotFound(f"Item with id {item.id!r:.80} not found.", param=f"input[{index}]")
        elif isinstance(item, kinds.LeftOut):
            ignored.append(f"input.{item.type}")
        else:
            _add_item(messages, item, thought, f"input[{index}]")
            thought = ""


def _add_item(messages: list[Message], item: InputMessage | _Calls | _Outputs, thought: str, param: str) -> None:
    """Calls that follow each other, or a text of the assistant, belong to one message, with the thought before them."""
    if isinstance(item, InputMessage):
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": text_of(item.content)})
    elif isinstance(item, _Outputs):
        output = text_of(item.output)
        if item.call_id is not None:
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        elif isinstance(item, FunctionCallOutput) and item.name is not None:
            messages.append({"role": "user", "content": f"{item.name}: {output}"})
        else:
            raise invalid(f"{param}.call_id", "is missing")
    else:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        calls = messages[-1].setdefault("tool_calls", [])
        calls.append({"id": item.call_id, "name": item.name, "arguments": item.arguments or "{}"})
        if len(calls) > kinds.MAX_CALLS:
            words = f"at most {kinds.MAX_CALLS} calls may follow each other"
            raise InvalidRequest(f"{param}: {words}", param=param)
    if thought and messages[-1]["role"] == "assistant":
        messages[-1]["reasoning_content"] = messages[-1].get("reasoning_content", "") + thought
