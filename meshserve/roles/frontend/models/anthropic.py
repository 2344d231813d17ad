"""Anthropic's Messages API: its fields, and what these become. Pure."""

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from msgspec import Meta

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.models import kinds
from meshserve.roles.frontend.models.chat import HELLO
from meshserve.roles.frontend.models.common import Body, Fields, Parsed, ResponseOptions, either, given, invalid, unasked
from meshserve.roles.frontend.models.fields import note_inner, others
from meshserve.roles.frontend.models.reading import read, read_object, set_aside
from meshserve.roles.frontend.models.requests import (
    Message,
    SampledBody,
    check_calls,
    json_text,
    paired,
    sampled,
    text_of,
    tool_fields,
)
from meshserve.wire.completion import MAX_MESSAGES, CompletionRequest
from meshserve.wire.generation import MAX_COUNT

PARAMS = {"stop": "stop_sequences", "prompt": "messages", "tool_name": "tool_choice"}
"""How this API calls what a processor may find fault with."""
_MAX_ARGUMENTS = 1_048_576


_BLOCKS = kinds.mistake("must be text, or a list of blocks")


class TextBlock(Body, kw_only=True, tag_field="type", tag="text"):
    """Text."""

    text: str


class TextSource(Body, kw_only=True, tag_field="type", tag="text"):
    """Plain text."""

    data: str


class ContentSource(Body, kw_only=True, tag_field="type", tag="content"):
    """Text in parts."""

    content: kinds.Text


class Document(Body, kw_only=True, tag_field="type", tag="document"):
    """A document of plain text. Files, and documents at an address, are refused by name."""

    source: TextSource | ContentSource
    title: str | None = None
    context: str | None = None

    @property
    def text(self) -> str:
        """What the model is shown."""
        source = self.source
        data = source.data if isinstance(source, TextSource) else text_of(source.content)
        return "\n".join([part for part in (self.title, self.context, data) if part]) + "\n"


class SearchResult(Body, kw_only=True, tag_field="type", tag="search_result"):
    """What a client's own search found."""

    source: str
    title: str
    content: list[TextBlock]

    @property
    def text(self) -> str:
        """What the model is shown."""
        return "\n".join([self.title, self.source, *[part.text for part in self.content]]) + "\n"


class ToolReference(Body, kw_only=True, tag_field="type", tag="tool_reference"):
    """A tool that was found: it is among the tools, or the model is not offered it."""

    text = ""


class ToolResult(Body, kw_only=True, tag_field="type", tag="tool_result"):
    """What a use of a tool came to."""

    tool_use_id: kinds.NonEmpty
    content: Annotated[str | list[TextBlock | Document | SearchResult | ToolReference], _BLOCKS] | None = None
    is_error: bool = False


class ToolUse(Body, kw_only=True, tag_field="type", tag="tool_use"):
    """A use of a tool."""

    id: kinds.NonEmpty
    name: kinds.NonEmpty
    input: dict[str, Any] | None = None


class Thinking(Body, kw_only=True, tag_field="type", tag="thinking"):
    """Of an earlier answer. The model's template decides whether it is shown again."""

    thinking: str | None = None


class Compaction(Body, kw_only=True, tag_field="type", tag="compaction"):
    """What stands for an earlier part of the conversation."""

    content: str | None = None


class UserTurn(Body, kw_only=True, tag_field="role", tag="user"):
    """One `tool_result` block for each `tool_use` of the message before, and texts, which come after them."""

    content: Annotated[str | list[TextBlock | Document | SearchResult | ToolResult], _BLOCKS]


class AssistantTurn(Body, kw_only=True, tag_field="role", tag="assistant"):
    """An earlier answer."""

    content: Annotated[str | list[TextBlock | ToolUse | Thinking | Compaction | kinds.LeftOutBlock], _BLOCKS]


class SystemTurn(Body, kw_only=True, tag_field="role", tag="system"):
    """What the model is to keep to from here on."""

    content: kinds.Text


class AnthropicTool(kinds.Described, kw_only=True):
    """What a model may use: a function."""

    type: Literal["custom"] = "custom"
    input_schema: kinds.Parameters


class AnthropicChoice(Body, kw_only=True):
    """Whether a tool is used, and which. Without tools, none can be required."""

    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[kinds.NonEmpty | None, Meta(description="Of the `tool`.")] = None
    disable_parallel_tool_use: bool = False

    RULES = (
        either(given("type", enum=["auto", "any", "none"]), given("name", type="string")),
    )


class UserMetadata(Body):
    """Whose request it is."""

    user_id: str | None = None


_Turn = Annotated[
    UserTurn | AssistantTurn | SystemTurn,
    kinds.mistake("must be an object with the role user, assistant or system", ".role"),
]
_LAST = "The last one is the user's."
_Turns = Annotated[
    list[_Turn], Meta(min_length=1, max_length=MAX_MESSAGES, description=_LAST)
]
_Tools = Annotated[list[AnthropicTool], kinds.TOOLS]
_LEAVES_OUT: dict[str, tuple[str, ...]] = {"tools": ("custom",)}


class ClearThinking(Body, kw_only=True):
    """An edit that takes earlier reasoning out of the conversation."""

    type: Annotated[str, Meta(pattern="^clear_thinking_"), kinds.mistake("must be one that clears thinking")]


class ContextManagement(Body):
    """How the conversation is kept: only what clears thinking asks for nothing."""

    edits: list[ClearThinking] | None = None


class OutputConfig(Body):
    """How the answer is made."""

    OTHERS = others("output_config")


_RULE = either(
    kinds.HAS_TOOLS, unasked("tool_choice"), {"properties": {"tool_choice": given("type", enum=["auto", "none"])}}
)


class CountBody(Body, kw_only=True):
    """`POST /v1/messages/count_tokens`: what counts as input."""

    model: kinds.ModelName
    messages: _Turns
    system: kinds.Text | None = None
    tools: _Tools | None = None
    tool_choice: AnthropicChoice | None = None
    context_management: ContextManagement | None = None
    output_config: OutputConfig | None = None

    OTHERS = others("count_tokens")
    LEAVES_OUT = _LEAVES_OUT
    RULES = (_RULE,)
    EXAMPLE: ClassVar[Fields] = {"model": "dummy", **HELLO}


class MessageBody(SampledBody, kw_only=True):
    """`POST /v1/messages`."""

    messages: _Turns
    system: kinds.Text | None = None
    tools: _Tools | None = None
    tool_choice: AnthropicChoice | None = None
    context_management: ContextManagement | None = None
    output_config: OutputConfig | None = None
    max_tokens: kinds.TokenLimit
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=MAX_COUNT)] | None = None
    stop_sequences: kinds.Stops | None = None
    metadata: UserMetadata | None = None
    stream: kinds.Stream = False

    OTHERS = others("messages")
    LEAVES_OUT = _LEAVES_OUT
    RULES = (_RULE,)
    EXAMPLE: ClassVar[Fields] = {"model": "dummy", **HELLO, "max_tokens": 16}


def parse_message(body: bytes, request_id: str, client_id: str) -> Parsed:
    """`POST /v1/messages`. Raises InvalidRequest that names the field."""
    fields, ignored = read_object(body), list[str]()
    asked = _read(MessageBody, fields, body, ignored)
    stop, metadata = asked.stop_sequences or (), asked.metadata or UserMetadata()
    request = CompletionRequest(
        request_id,
        "chat",
        messages=_messages(asked, ignored),
        max_tokens=asked.max_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        wants_start=asked.stream,
        client_id=client_id,
        **_tool_fields(asked),
        **sampled(asked, fields, asked.max_tokens, metadata.user_id),
    )
    return request, ResponseOptions(asked.stream, ignored=ignored)


def parse_count(body: bytes, request_id: str) -> Parsed:
    """`POST /v1/messages/count_tokens`. Raises InvalidRequest that names the field."""
    ignored = list[str]()
    asked = _read(CountBody, read_object(body), body, ignored)
    messages, tools = _messages(asked, ignored), _tool_fields(asked)
    request = CompletionRequest(request_id, "chat", asked.model, messages=messages, **tools)
    return request, ResponseOptions(ignored=ignored)


_Asked = TypeVar("_Asked", MessageBody, CountBody)


def _read(kind: type[_Asked], fields: Fields, body: bytes, ignored: list[str]) -> _Asked:
    asked = read(kind, fields, ignored)
    if asked.output_config is not None:
        set_aside(OutputConfig, fields["output_config"], ignored, "output_config.")
    if b"cache_control" in body:
        note_inner(body, ignored)
    return asked


def _tool_fields(asked: MessageBody | CountBody) -> Fields:
    tools = [(tool, tool.input_schema) for tool in asked.tools or ()]
    choice = asked.tool_choice or AnthropicChoice(type="auto")
    if choice.type == "tool" and choice.name is None:
        raise invalid("tool_choice.name", "is missing")
    kind, name = ("required" if choice.type == "any" else choice.type), choice.name
    is_parallel = not choice.disable_parallel_tool_use
    return tool_fields(tools, "input_schema", kind, name if kind == "tool" else None, is_parallel)


def _messages(asked: MessageBody | CountBody, ignored: list[str]) -> list[Message]:
    messages: list[Message] = []
    if asked.system is not None:
        messages.append({"role": "system", "content": text_of(asked.system)})
    for index, turn in enumerate(asked.messages):
        if isinstance(turn, UserTurn):
            _add_user(messages, turn.content)
        elif isinstance(turn, SystemTurn):
            messages.append({"role": "system", "content": text_of(turn.content)})
        else:
            messages.append(_answer(turn.content, f"messages[{index}].content", ignored))
    messages = paired(messages)
    check_calls(messages, "messages")
    if messages[-1]["role"] == "assistant":
        words = "the last one must be the user's; an answer that is begun already is not continued"
        raise Unsupported(f"messages: {words}", param="messages")
    return messages


def _add_user(messages: list[Message], content: str | list[Any]) -> None:
    """Results of tools are messages of their own, and come first, right after the calls that they answer."""
    blocks = [TextBlock(text=content)] if isinstance(content, str) else content
    results = [block for block in blocks if isinstance(block, ToolResult)]
    texts = [block for block in blocks if not isinstance(block, ToolResult)]
    for result in results:
        text = ("Error: " if result.is_error else "") + text_of(result.content or "")
        messages.append({"role": "tool", "tool_call_id": result.tool_use_id, "content": text})
    if texts or not results:
        messages.append({"role": "user", "content": text_of(texts)})


def _answer(content: str | list[Any], param: str, ignored: list[str]) -> Message:
    """An earlier answer, without what only a server's own tools did."""
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    calls, texts, thoughts = [], [], []
    for index, block in enumerate(content):
        if isinstance(block, ToolUse):
            arguments = json_text(block.input or {}, f"{param}[{index}].input", _MAX_ARGUMENTS)
            calls.append({"id": block.id, "name": block.name, "arguments": arguments})
        elif isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, Compaction):
            texts.append(block.content or "")
        elif isinstance(block, Thinking):
            thoughts.append(block.thinking or "")
        else:
            ignored.append(f"messages.{block.type}")
    if len(calls) > kinds.MAX_CALLS:
        raise InvalidRequest(f"{param}: at most {kinds.MAX_CALLS} tool_use blocks", param=param)
    message: Message = {"role": "assistant", "content": "".join(texts)}
    if thought := "".join(thoughts):
        message["reasoning_content"] = thought
    return {**message, "tool_calls": calls} if calls else message
