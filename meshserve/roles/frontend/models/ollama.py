"""Ollama's `/api/chat`, `/api/generate` and what asks about models: their fields, and what these become. Pure."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from msgspec import Meta

from meshserve.errors import InvalidRequest
from meshserve.roles.frontend.models import chat, kinds
from meshserve.roles.frontend.models.common import (
    Body,
    Fields,
    Parsed,
    ResponseOptions,
    either,
    given,
    invalid,
    unasked,
)
from meshserve.roles.frontend.models.fields import others
from meshserve.roles.frontend.models.reading import check_json, read, read_object, set_aside
from meshserve.roles.frontend.models.requests import (
    ANY_OBJECT,
    MAX_SCHEMA_CHARACTERS,
    Extension,
    Message,
    extension_fields,
    json_text,
    tool_fields,
)
from meshserve.wire.completion import MAX_MESSAGES, CompletionRequest
from meshserve.wire.generation import MAX_COUNT, Penalty, Share, TopP

PARAMS = {
    "stop": "options.stop",
    "max_tokens": "options.num_predict",
    "presence_penalty": "options.presence_penalty",
    "frequency_penalty": "options.frequency_penalty",
    "repetition_penalty": "options.repeat_penalty",
    "response_format": "format",
}
"""How this API calls what a processor may find fault with."""
CHAT_PARAMS = {**PARAMS, "prompt": "messages"}
GENERATE_PARAMS = {**PARAMS, "messages": "prompt"}

_Body = TypeVar("_Body", bound="OllamaBody")
Served = Callable[[str], str]
"""The name under which the mesh serves what a client calls so."""
LATEST = ":latest"
"""The tag that a name without one has."""
_MAX_LOAD_BYTES = 4096

# --- what both have

_NUM_PREDICT = Meta(ge=-2, le=MAX_COUNT, description="Tokens of the answer. 0 and below: no limit.")
_SEED = Meta(ge=-(2**63), le=2**63 - 1, description="-1: a new one for each request.")
_TEMPERATURE = Meta(ge=0, le=2, description="0 takes the likeliest token. Default: the model's.")
_TOP_K = Meta(ge=-1, le=MAX_COUNT, description="0 and -1: all.")
_REPEAT = Meta(ge=0.01, le=10, description="Counts all tokens of prompt and answer.")
_FORMAT = Meta(description="`json`: an object; or the JSON Schema that the text is valid under.")
_WORDS = kinds.mistake("must be 'json' or a JSON Schema")
_LOGPROBS = Meta(description="The log probability of each token, with the text of the token.")
_TOP_LOGPROBS = Meta(description="Goes with `logprobs` only.")
_STREAM = Meta(description="A JSON object a line, as the text comes.")
_NO_IMAGES = kinds.mistake("are not supported: models here read text", "*")


class OllamaOptions(Body, kw_only=True):
    """Sampling. What a request leaves open is the model's own."""

    num_predict: Annotated[int, _NUM_PREDICT] = -1
    temperature: Annotated[float, _TEMPERATURE] | None = None
    top_k: Annotated[int, _TOP_K] | None = None
    top_p: TopP | None = None
    min_p: Share | None = None
    repeat_penalty: Annotated[float, _REPEAT] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, _SEED] | None = None
    stop: kinds.Stops | None = None
    ignore_eos: Annotated[bool, Meta(description="Go on until the limit of tokens.")] = False

    OTHERS = others("options")


_SAMPLED = {
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "seed", "ignore_eos")),
    **dict.fromkeys(("presence_penalty", "frequency_penalty")),
    "repeat_penalty": "repetition_penalty",
}
"""Options that are passed on, and their other names."""


class OllamaBody(Body, kw_only=True):
    """What chats and completions share."""

    model: kinds.ModelName
    stream: Annotated[bool, _STREAM] = True
    format: Annotated[Literal["", "json"] | dict[str, Any], _FORMAT, _WORDS] | None = None
    options: OllamaOptions | None = None
    logprobs: Annotated[bool, _LOGPROBS] = False
    top_logprobs: Annotated[kinds.NumLogprobs, _TOP_LOGPROBS] = 0
    meshserve: Extension | None = None

    GOES_WITH: ClassVar[dict[str, str]] = {"top_logprobs": "logprobs"}


class OllamaCalled(Body, kw_only=True):
    """The function of a call."""

    name: kinds.NonEmpty
    arguments: dict[str, Any] | None = None


class OllamaCall(Body, kw_only=True):
    """A call that the model made."""

    id: str | None = None
    function: OllamaCalled


_TOOL_NAME = Meta(description="Of the function whose result this is.")
_CALL_ID = Meta(description="By default the first call of this name that has no result yet.")


class OllamaMessage(Body, kw_only=True):
    """One message of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: Annotated[str | None, Meta(description="Of an assistant's message.")] = None
    images: Annotated[list[Any], Meta(max_length=0), _NO_IMAGES] | None = None
    tool_calls: Annotated[list[OllamaCall], Meta(max_length=kinds.MAX_CALLS)] | None = None
    tool_name: Annotated[str | None, _TOOL_NAME] = None
    tool_call_id: Annotated[str | None, _CALL_ID] = None


_MESSAGES = Meta(max_length=MAX_MESSAGES, description="None: the model is only to be loaded.")
_PROMPT = Meta(description="Empty: the model is only to be loaded.")
_RAW = Meta(description="The prompt is taken as it is, without the model's chat template.")


class OllamaChatBody(OllamaBody, kw_only=True):
    """`POST /api/chat`."""

    messages: Annotated[list[OllamaMessage], _MESSAGES] | None = None
    tools: chat.Tools | None = None

    OTHERS = others("ollama", "ollama_chat")
    LEAVES_OUT: ClassVar[dict[str, tuple[str, ...]]] = {"tools": ("function",)}
    EXAMPLE: ClassVar[Fields] = {"model": "dummy", **chat.HELLO, "stream": False}


class OllamaGenerateBody(OllamaBody, kw_only=True):
    """`POST /api/generate`."""

    prompt: Annotated[str, _PROMPT] = ""
    system: str = ""
    raw: Annotated[bool, _RAW] = False

    OTHERS = others("ollama", "ollama_generate")
    RULES = (either(unasked("raw", False), unasked("system", "")),)
    EXAMPLE: ClassVar[Fields] = {"model": "dummy", "prompt": "Hello", "stream": False}


_OLDER = Meta(description="The older name of `model`.")


class OllamaShowBody(Body, kw_only=True):
    """`POST /api/show`."""

    model: kinds.AnyModel = None
    name: Annotated[kinds.NonEmpty | None, _OLDER] = None

    RULES = (either(given("model", type="string"), given("name", type="string")),)
    EXAMPLE: ClassVar[Fields] = {"model": "dummy"}


class OllamaEmbedBody(Body, kw_only=True):
    """`POST /api/embed`: refused, as no engine here makes embeddings."""

    model: kinds.ModelName
    input: Annotated[Any, Meta(description="Texts.")] = None

    EXAMPLE: ClassVar[Fields] = {"model": "dummy", "input": "Hello"}


# --- what they become


def parse_chat(body: bytes, request_id: str, client_id: str, served: Served) -> Parsed:
    """`POST /api/chat`. Raises InvalidRequest that names the field."""
    fields, ignored = read_object(body), list[str]()
    asked = read(OllamaChatBody, fields, ignored)
    if not asked.messages:
        raise InvalidRequest("the prompt is empty", param="messages")
    shared = _shared_fields(asked, fields, ignored, served)
    request = CompletionRequest(
        request_id,
        "chat",
        messages=_messages(asked.messages),
        client_id=client_id,
        **_tools(asked.tools),
        **shared,
    )
    return request, _response_options(asked, ignored)


def parse_generate(body: bytes, request_id: str, client_id: str, served: Served) -> Parsed:
    """`POST /api/generate`: a chat of one message, unless it is raw. Raises InvalidRequest that names the field."""
    fields, ignored = read_object(body), list[str]()
    asked = read(OllamaGenerateBody, fields, ignored)
    if asked.raw and asked.system:
        raise invalid("system", "goes with the model's template, and raw leaves the template out")
    if not asked.prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    shared = _shared_fields(asked, fields, ignored, served)
    if asked.raw:
        shared["prompt"] = asked.prompt
    else:
        system = [{"role": "system", "content": asked.system}] if asked.system else []
        shared["messages"] = [*system, {"role": "user", "content": asked.prompt}]
    kind = "completion" if asked.raw else "chat"
    request = CompletionRequest(request_id, kind, client_id=client_id, **shared)
    return request, _response_options(asked, ignored)


def read_load(kind: type[_Body], body: bytes) -> _Body | None:
    """What asks for no answer, but for a model to be loaded or unloaded. None for all other bodies, malformed ones too."""
    if len(body) > _MAX_LOAD_BYTES:
        return None
    try:
        check_json(body)
        fields = read_object(body)
        if fields.get("messages") or fields.get("prompt"):
            return None
        return read(kind, fields, [])
    except InvalidRequest:
        return None  # the parser says so


def parse_show(body: bytes) -> str:
    """`POST /api/show`: the name of the model. Raises InvalidRequest that names the field."""
    asked = read(OllamaShowBody, read_object(body), [])
    name = asked.model or asked.name
    if name is None:
        raise invalid("model", "is missing")
    return name


def parse_embed(body: bytes) -> str:
    """`POST /api/embed`: the name of the model. Raises InvalidRequest that names the field."""
    return read(OllamaEmbedBody, read_object(body), []).model


def _response_options(asked: OllamaBody, ignored: list[str]) -> ResponseOptions:
    shows_receipt = asked.meshserve is not None and asked.meshserve.receipt
    echoed = {"model": asked.model}
    return ResponseOptions(asked.stream, echoed=echoed, ignored=ignored, shows_receipt=shows_receipt)


def _shared_fields(asked: OllamaBody, fields: Fields, ignored: list[str], served: Served) -> Fields:
    """What both have in a CompletionRequest. The receipt is always wanted: durations are made of it."""
    options = asked.options or OllamaOptions()
    set_aside(OllamaOptions, fields.get("options") or {}, ignored, "options.")
    named = ((name, getattr(options, name), other) for name, other in _SAMPLED.items())
    found = {other or name: value for name, value, other in named if value is not None}
    if options.top_k == -1:
        found["top_k"] = 0
    if options.seed == -1:
        del found["seed"]
    if options.stop:
        found["stop"] = (options.stop,) if isinstance(options.stop, str) else tuple(options.stop)
    found |= extension_fields(asked.meshserve) | {"wants_receipt": True}
    found["model"] = served(asked.model)
    found["max_tokens"] = options.num_predict if options.num_predict > 0 else None
    found["logprobs"] = asked.top_logprobs if asked.logprobs else -1
    found["json_schema"] = _schema(asked.format)
    return found


def _schema(wanted: str | Fields | None) -> str:
    """Of the text; empty for free text."""
    if isinstance(wanted, dict):
        return json_text(wanted, "format", MAX_SCHEMA_CHARACTERS)
    return ANY_OBJECT if wanted else ""


def _tools(tools: list[chat.Tool] | None) -> Fields:
    found = [(tool.function, tool.function.parameters) for tool in tools or ()]
    return tool_fields(found, "function.parameters", None, None, True) if found else {}


def _messages(given: list[OllamaMessage]) -> list[Message]:
    """Calls need no names in this API: results are told apart by the names of functions, and by their order."""
    found: list[Message] = []
    unanswered: list[Fields] = []
    for index, message in enumerate(given):
        told: Message = {"role": message.role, "content": message.content}
        if message.role == "assistant":
            if message.thinking:
                told["reasoning_content"] = message.thinking
            if message.tool_calls:
                calls = [_call(call, _id(index, number)) for number, call in enumerate(message.tool_calls)]
                told["tool_calls"] = calls
                unanswered += calls
        elif message.role == "tool":
            told["tool_call_id"] = _answered(message, unanswered, _id(index, 0))
            if message.tool_name:
                told["name"] = message.tool_name
        found.append(told)
    return found


def _id(index: int, number: int) -> str:
    """Nine letters and digits: some templates take no other names of calls."""
    return f"{index:05x}{number:04x}"


def _call(call: OllamaCall, default_id: str) -> Fields:
    arguments = json_text(call.function.arguments or {}, "messages", MAX_SCHEMA_CHARACTERS)
    return {"id": call.id or default_id, "name": call.function.name, "arguments": arguments}


def _answered(message: OllamaMessage, unanswered: list[Fields], default_id: str) -> str:
    """The id of the call whose result this is. A result without a call is shown to the model all the same."""
    for name, value in (("id", message.tool_call_id), ("name", message.tool_name)):
        for call in unanswered:
            if value and call[name] == value:
                unanswered.remove(call)
                return str(call["id"])
    if message.tool_call_id:
        return message.tool_call_id
    return str(unanswered.pop(0)["id"]) if unanswered and not message.tool_name else default_id
