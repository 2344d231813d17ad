"""`/v1/chat/completions`, and the route that counts a chat's tokens: their fields, and what these become. Pure."""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, to_builtins

from meshserve.errors import InvalidRequest
from meshserve.roles.frontend.models import kinds
from meshserve.roles.frontend.models.common import Body, Fields, Parsed, ResponseOptions, either, given, invalid
from meshserve.roles.frontend.models.completions import OpenAiBody, StreamOptions, TokenizePrompt, openai_fields
from meshserve.roles.frontend.models.fields import note_inner, others
from meshserve.roles.frontend.models.reading import read, read_object
from meshserve.roles.frontend.models.requests import Message, check_calls, tool_fields
from meshserve.wire.completion import MAX_MESSAGES, CompletionRequest

# --- messages

Name = Annotated[str, Meta(max_length=256)]


class _Said(Body, kw_only=True, tag_field="role"):
    content: kinds.Text
    name: Name | None = None


class SystemMessage(_Said, tag="system"):
    """What the model is to keep to."""


class DeveloperMessage(_Said, tag="developer"):
    """What newer models of OpenAI call `system`."""


class UserMessage(_Said, tag="user"):
    """What was asked."""


class ToolMessage(Body, kw_only=True, tag_field="role", tag="tool"):
    """The answer to a call, right after the message that has it."""

    content: kinds.Text
    tool_call_id: kinds.NonEmpty


class CalledFunction(Body, kw_only=True):
    """The function of a call."""

    name: kinds.NonEmpty
    arguments: Annotated[str | None, Meta(description="JSON.")] = None


class ToolCall(Body, kw_only=True):
    """A call that the model made."""

    id: kinds.NonEmpty
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerText(Body, kw_only=True, tag_field="type", tag="text"):
    """Text of an answer."""

    text: str


class RefusalText(Body, kw_only=True, tag_field="type", tag="refusal"):
    """Text of an answer that refuses."""

    refusal: str


_Parts = list[Annotated[AnswerText | RefusalText, kinds.PART]]
_THOUGHT = Meta(description="The model's template decides whether it is shown again.")


class AssistantMessage(Body, kw_only=True, tag_field="role", tag="assistant"):
    """Each of its calls is answered by a message of the role tool right after it."""

    content: Annotated[str | _Parts | None, kinds.CONTENT] = None
    refusal: str | None = None
    reasoning_content: Annotated[str | None, _THOUGHT] = None
    reasoning: Annotated[str | None, Meta(description="Another name of `reasoning_content`.")] = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=kinds.MAX_CALLS)] | None = None
    name: Name | None = None
    function_call: kinds.Refused = None
    audio: kinds.Refused = None

    RULES = (
        either(
            given("content", type=["string", "array"]),
            given("tool_calls", type="array", minItems=1),
            given("refusal", type="string"),
            given("reasoning_content", type="string"),
            given("reasoning", type="string"),
        ),
    )


ChatMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage
Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]

# --- tools


class Function(kinds.Described, kw_only=True):
    """A function that a model may call."""

    parameters: kinds.Parameters | None = None


class Tool(Body, kw_only=True):
    """What a model may use: a function."""

    type: Literal["function"]
    function: Function


class FunctionNamed(Body, kw_only=True):
    """Names a function."""

    name: kinds.NonEmpty


class NamedTool(Body, kw_only=True):
    """The one function that is called."""

    type: Literal["function"]
    function: FunctionNamed


Tools = Annotated[list[Tool], kinds.TOOLS]
ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool | None, kinds.CHOICE]

# --- the bodies

_OLDER = Meta(description="The older name; the other one counts where both are given.")
_TOP_LOGPROBS = Meta(description="Goes with `logprobs` only.")
HELLO: Fields = {"messages": [{"role": "user", "content": "Hello"}]}


class ChatBody(OpenAiBody, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: kinds.TokenLimit | None = None
    max_tokens: Annotated[kinds.TokenLimit | None, _OLDER] = None
    n: kinds.NumChoices = 1
    logprobs: bool = False
    top_logprobs: Annotated[kinds.NumLogprobs, _TOP_LOGPROBS] = 0
    tools: Tools | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: kinds.Parallel = True
    metadata: dict[str, Any] | None = None
    stream: kinds.Stream = False
    stream_options: Annotated[StreamOptions | None, kinds.STREAM_ONLY] = None

    OTHERS = others("chat")
    LEAVES_OUT: ClassVar[dict[str, tuple[str, ...]]] = {"tools": ("function",)}
    GOES_WITH: ClassVar[dict[str, str]] = {"stream_options": "stream", "top_logprobs": "logprobs"}
    RULES = (kinds.TOOLS_RULE,)
    EXAMPLE: ClassVar[Fields] = {"model": "dummy", **HELLO, "max_tokens": 16}


class TokenizeChat(Body, kw_only=True):
    """`POST /tokenize` of a chat."""

    messages: Messages
    model: kinds.AnyModel = None
    prompt: None = None
    return_token_strs: Annotated[bool, Meta(description="The tokens' texts too.")] = False
    tools: Tools | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True

    OTHERS = others("tokenize", "tokenize_chat")
    LEAVES_OUT = ChatBody.LEAVES_OUT
    RULES = (kinds.TOOLS_RULE,)


def parse_chat(body: bytes, request_id: str, client_id: str) -> Parsed:
    """`POST /v1/chat/completions`. Raises InvalidRequest that names the field."""
    fields, ignored = read_object(body), list[str]()
    asked = read(ChatBody, fields, ignored)
    if b"cache_control" in body:
        note_inner(body, ignored)
    newer = asked.max_completion_tokens
    max_tokens = asked.max_tokens if newer is None else newer
    request = CompletionRequest(
        request_id,
        "chat",
        messages=_messages(asked.messages),
        max_tokens=max_tokens,
        n=asked.n,
        logprobs=asked.top_logprobs if asked.logprobs else -1,
        client_id=client_id,
        **_tools(asked),
        **openai_fields(asked, fields, max_tokens, ignored),
    )
    options = asked.stream_options or StreamOptions()
    return request, ResponseOptions(asked.stream, options.include_usage, ignored=ignored)


def parse_tokenize(body: bytes, request_id: str) -> tuple[CompletionRequest, bool]:
    """`POST /tokenize`: a prompt of text, or the messages and tools of a chat; and whether texts are wanted.

    The model is empty if the client named none. Raises InvalidRequest that names the field.
    """
    fields = read_object(body)
    if fields.get("messages") is None:
        asked = read(TokenizePrompt, fields, [])
        model, prompt = asked.model or "", asked.prompt
        return CompletionRequest(request_id, "completion", model, prompt), asked.return_token_strs
    if fields.get("prompt") is not None:
        raise InvalidRequest("either prompt or messages, not both", param="prompt")
    chat = read(TokenizeChat, fields, [])
    request = CompletionRequest(
        request_id,
        "chat",
        chat.model or "",
        messages=_messages(chat.messages),
        tools=_tools(chat).get("tools", ""),
        add_generation_prompt=chat.add_generation_prompt,
    )
    return request, chat.return_token_strs


def _messages(given: list[ChatMessage]) -> list[Message]:
    messages: list[Message] = to_builtins(given)  # a message of nothing but text is complete with this
    has_calls = False
    for index, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if role == "developer":
            message["role"] = "system"
        elif role == "assistant":
            content = _settle_answer(message, f"messages[{index}]")
        has_calls |= role == "tool" or "tool_calls" in message
        if not isinstance(content, str):
            texts = [part["refusal" if part["type"] == "refusal" else "text"] for part in content or ()]
            message["content"] = "".join(texts)
    if has_calls:
        check_calls(messages, "messages")
    return messages


def _settle_answer(message: Message, param: str) -> Any:
    """A refusal is its content, and its calls go without `type` and `function`. The content is returned."""
    refusal, calls = message.pop("refusal", None), message.pop("tool_calls", None)
    if (thought := message.pop("reasoning", None)) is not None:
        message.setdefault("reasoning_content", thought)
    if "content" not in message:
        if not calls and refusal is None and "reasoning_content" not in message:
            raise invalid(f"{param}.content", "is missing")
        message["content"] = refusal or ""
    if calls:
        message["tool_calls"] = [
            {"id": call["id"], "name": called["name"], "arguments": called.get("arguments") or "{}"}
            for call in calls
            for called in [call["function"]]
        ]
    return message["content"]


def _tools(asked: ChatBody | TokenizeChat) -> Fields:
    if asked.tools is None and asked.tool_choice is None:
        return {}
    tools = [(tool.function, tool.function.parameters) for tool in asked.tools or ()]
    choice = asked.tool_choice
    name = choice.function.name if isinstance(choice, NamedTool) else None
    return tool_fields(tools, "function.parameters", choice, name, asked.parallel_tool_calls)
