"""Anthropic's Messages API: its fields, and what these become. Pure."""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.models import kinds
from meshserve.roles.frontend.models.chat import HELLO
from meshserve.roles.frontend.models.common import Body, Fields, Parsed, ResponseOptions, either, given, invalid, not_done, unasked
from meshserve.roles.frontend.models.reading import read, read_object
from meshserve.roles.frontend.models.requests import Message, SampledBody, check_calls, json_text, sampled, text_of, tool_fields
from meshserve.wire.completion import MAX_MESSAGES, CompletionRequest
from meshserve.wire.generation import MAX_COUNT

PARAMS = {"stop": "stop_sequences", "prompt": "messages", "tool_name": "tool_choice"}
"""How this API calls what a processor may find fault with."""
_MAX_ARGUMENTS = 1_048_576


class TextBlock(Body, kw_only=True, tag_field="type", tag="text"):
    """Text."""

    text: str


class ToolResult(Body, kw_only=True, tag_field="type", tag="tool_result"):
    """What a use of a tool came to."""

    tool_use_id: kinds.NonEmpty
    content: kinds.Text | None = None
    is_error: bool = False


class ToolUse(Body, kw_only=True, tag_field="type", tag="tool_use"):
    """A use of a tool."""

    id: kinds.NonEmpty
    name: kinds.NonEmpty
    input: dict[str, Any] | None = None


class Thinking(Body, tag_field="type", tag="thinking"):
    """Of an earlier answer; no model is shown it again."""


class RedactedThinking(Body, tag_field="type", tag="redacted_thinking"):
    """Of an earlier answer; no model is shown it again."""


_BLOCKS = kinds.mistake("must be text, or a list of blocks")


class UserTurn(Body, kw_only=True, tag_field="role", tag="user"):
    """`tool_result` blocks come first, one for each `tool_use` of the message before."""

    content: Annotated[str | list[TextBlock | ToolResult], _BLOCKS]


class AssistantTurn(Body, kw_only=True, tag_field="role", tag="assistant"):
    """An earlier answer."""

    content: Annotated[str | list[TextBlock | ToolUse | Thinking | RedactedThinking], _BLOCKS]


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
    UserTurn | AssistantTurn, kinds.mistake("must be an object with the role user or assistant", ".role")
]
_LAST = "The last one is the user's."
_Turns = Annotated[
    list[_Turn], Meta(min_length=1, max_length=MAX_MESSAGES, description=_LAST)
]
_Tools = Annotated[list[AnthropicTool], kinds.TOOLS]
_NOT_DONE = not_done(
    null="container inference_geo output_format",
    empty="mcp_servers",
    context_management=({},),
    output_config=({},),
    service_tier=("auto", "standard_only"),
    speed=("standard",),
    thinking=({"type": "disabled"},),
)
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

    NOT_DONE = _NOT_DONE
    RULES = (_RULE,)
    EXAMPLE: ClassVar[Fields] = {"model": "dummy", **HELLO}


class MessageBody(SampledBody, kw_only=True):
    """`POST /v1/messages`."""

    messages: _Turns
    system: kinds.Text | None = None
    tools: _Tools | None = None
    tool_choice: AnthropicChoice | None = None
    max_tokens: kinds.TokenLimit
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=MAX_COUNT)] | None = None
    stop_sequences: kinds.Stops | None = None
    metadata: UserMetadata | None = None
    stream: kinds.Stream = False

    NOT_DONE = _NOT_DONE
    RULES = (_RULE,)
    EXAMPLE: ClassVar[Fields] = {"model": "dummy", **HELLO, "max_tokens": 16}


def parse_message(body: bytes, request_id: str, client_id: str) -> Parsed:
    """`POST /v1/messages`. Raises InvalidRequest that names the field."""
    fields = read_object(body)
    asked = read(MessageBody, fields)
    stop, metadata = asked.stop_sequences or (), asked.metadata or UserMetadata()
    request = CompletionRequest(
        request_id,
        "chat",
        messages=_messages(asked),
        max_tokens=asked.max_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        wants_start=asked.stream,
        client_id=client_id,
        **_tool_fields(asked),
        **sampled(asked, fields, asked.max_tokens, metadata.user_id),
    )
    return request, ResponseOptions(asked.stream)


def parse_count(body: bytes, request_id: str) -> CompletionRequest:
    """`POST /v1/messages/count_tokens`."""
    asked = read(CountBody, read_object(body))
    messages, tools = _messages(asked), _tool_fields(asked)
    return CompletionRequest(request_id, "chat", asked.model, messages=messages, **tools)


def _tool_fields(asked: MessageBody | CountBody) -> Fields:
    tools = [(tool, tool.input_schema) for tool in asked.tools or ()]
    choice = asked.tool_choice or AnthropicChoice(type="auto")
    if choice.type == "tool" and choice.name is None:
        raise invalid("tool_choice.name", "is missing")
    kind, name = ("required" if choice.type == "any" else choice.type), choice.name
    is_parallel = not choice.disable_parallel_tool_use
    return tool_fields(tools, "input_schema", kind, name if kind == "tool" else None, is_parallel)


def _messages(asked: MessageBody | CountBody) -> list[Message]:
    messages: list[Message] = []
    if asked.system is not None:
        messages.append({"role": "system", "content": text_of(asked.system)})
    for index, turn in enumerate(asked.messages):
        param = f"messages[{index}].content"
        if isinstance(turn, UserTurn):
            _add_user(messages, turn.content, param)
        else:
            messages.append(_answer(turn.content, param))
    check_calls(messages, "messages")
    if messages[-1]["role"] == "assistant":
        words = "the last one must be the user's; an answer that is begun already is not continued"
        raise Unsupported(f"messages: {words}", param="messages")
    return messages


def _add_user(messages: list[Message], content: str | list[TextBlock | ToolResult], param: str) -> None:
    """Results of tools are messages of their own, and come first, right after the calls that they answer."""
    blocks = [TextBlock(text=content)] if isinstance(content, str) else content
    results = [block for block in blocks if isinstance(block, ToolResult)]
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    if [*results, *texts] != blocks:
        raise InvalidRequest(f"{param}: tool_result blocks come before all others", param=param)
    for result in results:
        text = ("Error: " if result.is_error else "") + text_of(result.content or "")
        messages.append({"role": "tool", "tool_call_id": result.tool_use_id, "content": text})
    if texts or not results:
        messages.append({"role": "user", "content": text_of(texts)})


def _answer(content: str | list[Any], param: str) -> Message:
    """An earlier answer, without what its model thought: no model is shown that again."""
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    calls = [
        {
            "id": block.id,
            "name": block.name,
            "arguments": json_text(block.input or {}, f"{param}[{index}].input", _MAX_ARGUMENTS),
        }
        for index, block in enumerate(content)
        if isinstance(block, ToolUse)
    ]
    if len(calls) > kinds.MAX_CALLS:
        raise InvalidRequest(f"{param}: at most {kinds.MAX_CALLS} tool_use blocks", param=param)
    texts = [block for block in content if isinstance(block, TextBlock)]
    message: Message = {"role": "assistant", "content": text_of(texts)}
    return {**message, "tool_calls": calls} if calls else message
