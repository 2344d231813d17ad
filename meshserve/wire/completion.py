"""What a frontend asks of a processor, and what comes back.

The items of the stream are bare strings for a request that asks for one answer in plain text. Every other
request gets structs, which :func:`read_item` tells apart. The stream's end is an :class:`Ending`.
"""

import re
from array import array
from itertools import accumulate
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

from meshserve.errors import ProtocolError
from meshserve.wire.generation import AskedSampling
from meshserve.wire.structs import Count, Meta, NonEmpty, Row, Tokens, read, unpack_tokens

MAX_CHOICES = 128
"""Answers to one request, of all its prompts together: each is a sequence on a worker."""
MAX_STOPS = 16
MAX_MESSAGES = 16_384

if TYPE_CHECKING:
    Prompts = str | array[int] | tuple[str | array[int], ...] | None
else:
    Prompts = Any  # read by `_read_prompts`, since msgspec knows no union with a type of our own
"""Text or token ids, or several of them, for a completion."""


Owner = Annotated[bytes, Meta(max_length=32)]
"""Of what is kept for a client: made of the client's API key, which it does not tell. Empty where a frontend has no keys."""


class Keep(Row):
    """The answer is to be kept with its conversation, for later requests that refer to it."""

    name: str
    """The request's name as its client's answer has it: a request that is started over gets another one."""
    created_s: Count
    """When the client asked, in seconds since 1970."""
    echoed: str
    """JSON: what the API repeats of the request in its answer."""
    has_instructions: bool = False
    """The first message is for this answer only."""
    owner: Owner = b""


class CompletionRequest(AskedSampling):
    """A chat, or one prompt or several, to be completed, with the sampling parameters that the client named."""

    request_id: str
    """The mesh's own name of the request: the frontend's incarnation and a counter."""
    kind: Annotated[str, Meta(pattern=r"^(completion|chat)\Z")]
    model: str
    prompt: Prompts = None
    messages: Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES)] | None = None
    """For a chat: role and content as text, and `name`, `tool_calls` (id, name, arguments as text) or `tool_call_id` where they belong."""
    stop: Annotated[tuple[NonEmpty, ...], Meta(max_length=MAX_STOPS)] = ()
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    """Answers to each prompt."""
    echo: bool = False
    """The text begins with the prompt."""
    tools: str = ""
    """A JSON list of functions in OpenAI's form, `{"type": "function", "function": {"name", "description",
    "parameters"}}`, with `"strict": true` where calls must be valid."""
    tool_choice: Annotated[str, Meta(pattern=r"^(none|auto|strict|required|function)\Z")] = "none"
    """`function`: the one that `tool_name` names; `strict`: `auto` where a tool is strict."""
    tool_name: str = ""
    parallel_tool_calls: bool = True
    """An answer may have several calls."""
    add_generation_prompt: bool = True
    """The prompt of a chat ends where the assistant's turn begins."""
    wants_start: bool = False
    """Say how long the prompt is before the first token."""
    client_id: str = ""
    """The client's own name for the request: a label."""
    wants_receipt: bool = False
    policy: str | None = None
    traceparent: str = ""
    """The client's trace, or the frontend's own (W3C Trace Context, level 1, section 3.2); empty for none."""
    session: str = ""
    """Requests of one session prefer the worker of the last one; empty for none. A hint."""
    origin: str = ""
    """The name that the request had at a processor that was lost; empty: it was at none. Seeds are drawn from that name, so
    that the answer is the same again."""
    keep: Keep | None = None
    """None: nothing is kept of this request but its receipt."""

    @property
    def prompts(self) -> "tuple[str | array[int], ...]":
        """All prompts of a completion."""
        return self.prompt if isinstance(self.prompt, tuple) else (self.prompt if self.prompt is not None else "",)

    @property
    def num_choices(self) -> int:
        """Answers, of all prompts together; they are numbered prompt by prompt."""
        return self.n * (len(self.prompt) if isinstance(self.prompt, tuple) else 1)

    @property
    def is_plain(self) -> bool:
        """One answer of nothing but text: its items are bare strings."""
        is_one_prompt = not isinstance(self.prompt, tuple) or len(self.prompt) == 1
        return is_one_prompt and self.n == 1 and self.logprobs < 0 and self.tool_choice == "none"

    @property
    def is_constrained(self) -> bool:
        """The text must keep to a schema, an expression or choices, from its first character on."""
        return bool(self.json_schema or self.regex or self.choices)

    @property
    def needs_features(self) -> bool:
        """The request asks for features that not every engine has."""
        return _features_of(self) != _NO_FEATURES

    def _check(self) -> None:
        self.prompt = _read_prompts(self.prompt)
        has_input = bool(self.messages) if self.kind == "chat" else self.prompt is not None
        if not has_input or not all(map(_is_message, self.messages or ())):
            raise ProtocolError("malformed CompletionRequest: its prompt or messages are missing or malformed")
        if not 1 <= self.num_choices <= MAX_CHOICES:
            raise ProtocolError("malformed CompletionRequest: too many choices")
        if self.tool_choice != "none" and not self.tools:
            raise ProtocolError("malformed CompletionRequest: a choice of tools without tools")


_FEATURES = (
    *("logprobs", "tool_choice", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("json_schema", "regex", "choices"),
)
_features_of = attrgetter(*_FEATURES)
_NO_FEATURES = _features_of(CompletionRequest("", "chat", ""))


def _read_prompts(data: Any) -> Prompts:
    """From plain data. Raises ProtocolError for what is no prompt."""
    if isinstance(data, (list, tuple)):
        if not 1 <= len(data) <= MAX_CHOICES:
            raise ProtocolError("malformed CompletionRequest: no prompts, or too many")
        return tuple([prompt if isinstance(prompt, str) else unpack_tokens(prompt) for prompt in data])
    return data if data is None or isinstance(data, str) else unpack_tokens(data)


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
        return False
    if message["role"] == "tool" and not isinstance(message.get("tool_call_id"), str):
        return False
    calls = message.get("tool_calls", [])
    return isinstance(calls, list) and all(map(_is_call, calls))


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and all(isinstance(call.get(name), str) for name in ("id", "name", "arguments"))


# --- what comes back

WireLogprob = tuple[bytes, float | None, list[Any]]
"""A token's bytes, its log probability (none for a prompt's first), and pairs of both for the likeliest tokens at its place."""


class TextItem(Row, tag="text"):
    """More text of one choice: of its content or its reasoning, or the arguments of the call that it makes."""

    choice: int
    text: str
    logprobs: list[Any] | None = None
    """Of the tokens that the text is made of, :data:`WireLogprob` each; None if not asked for."""
    offsets: list[int] | None = None
    """Where each of these tokens begins in all the text of this choice, in characters."""


class CallItem(Row, tag="call"):
    """From here on, the text of this choice is the arguments of a call of this function; the same name again is another call."""

    choice: int
    name: str


class PartItem(Row, tag="part"):
    """From here on, the text of this choice is of this kind. At first it is `text`."""

    choice: int
    kind: Annotated[str, Meta(pattern=r"^(text|reasoning)\Z")]


class EndItem(Row, tag="end"):
    """This choice is complete: `stop`, `length` or `tool_calls`, and the stop string if one ended it."""

    choice: int
    reason: str
    stop: str | None = None


class StartItem(Row, tag="start"):
    """The prompts' length in tokens, before anything else, if `wants_start`."""

    num_prompt_tokens: int


Item = TextItem | CallItem | PartItem | EndItem | StartItem


class _Box(Row):
    """Holds an item: msgspec prepares the types of a struct once, those of a bare union for each item (25 us, not 2)."""

    item: Item


def read_item(data: Any) -> Item:
    """One item of the stream; a bare string is text of the only choice. Raises ProtocolError for anything else."""
    if type(data) is str:
        return TextItem(0, data)
    if isinstance(data, Row):  # from this very peer
        return cast(Item, data)
    return cast(_Box, read(_Box, [data])).item


class Ending(Row):
    """The value at the end of the stream. Reason and stop string are those of the first choice."""

    reason: str
    num_prompt_tokens: Count
    """Each prompt once, however many answers it got."""
    num_completion_tokens: Count
    num_cached_tokens: Count
    receipt: dict[str, Any] | None = None
    stop: str | None = None


class TokenizeRequest(Row):
    """The prompt of this request is to be tokenized, with each token's text if that is wanted."""

    request: CompletionRequest
    wants_texts: bool = False

    def _check(self) -> None:
        self.request._check()


class Tokenized(Row):
    """What a processor answers to a :class:`TokenizeRequest`."""

    tokens: Tokens
    context_length: Count
    """The model's."""
    data: bytes = b""
    """The bytes of all tokens, if texts were asked for, and below how many of them each token has."""
    lengths: Tokens = array("I")

    def texts(self) -> list[str]:
        """Each token's text; partial characters are shown as replacement characters."""
        ends = list(accumulate(self.lengths))
        return [self.data[end - length : end].decode("utf-8", "replace") for end, length in zip(ends, self.lengths, strict=True)]


class DetokenizeRequest(Row):
    """These tokens of this model are to be made text."""

    model: str
    tokens: Tokens


# --- which trace a request belongs to

_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceContext(NamedTuple):
    """A trace, and the span of it that caused this one. Ids are lower-case hexadecimal."""

    trace_id: str
    span_id: str
    is_sampled: bool = True
    """Whether the trace is to be recorded, as the one that began it wants."""

    def __str__(self) -> str:
        """As the header has it."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"


def read_traceparent(text: str) -> TraceContext | None:
    """None for a malformed header, which is ignored (section 3.2.2). Later versions may append to theirs."""
    found = _FORM.fullmatch(text)
    if found is None or (found[4] and text.startswith("00")) or not int(found[1], 16) or not int(found[2], 16):
        return None
    return TraceContext(found[1], found[2], bool(int(found[3], 16) & 1))
