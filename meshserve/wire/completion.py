"""What a frontend asks of a processor: a completion, as the client meant it; and what comes back.

The items of the answer's stream are, for a request that asks for one answer in plain text, bare strings: the text as it comes. Every
other request gets lists and maps, told apart by :func:`read_item`. The stream's end is an :class:`Ending`.
"""

from array import array
from dataclasses import dataclass, fields
from itertools import accumulate
from operator import attrgetter
from typing import Any, NamedTuple

from meshserve.errors import ProtocolError
from meshserve.wire.generation import MAX_LOGIT_BIASES, pack_tokens, read_choices, unpack_tokens

KINDS = ("completion", "chat")
TOOL_CHOICES = ("none", "auto", "strict", "required", "function")
PARTS = ("text", "reasoning")
MAX_CHOICES = 128
"""Answers to one request, of all its prompts together: each is a sequence on a worker."""
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_MESSAGES = 16_384
MAX_COUNT = 10_000_000
"""Of tokens to be made, or to choose from."""


@dataclass(slots=True)  # not frozen: that makes an object of so many fields three times as dear, and each request has one
class CompletionRequest:
    """A chat, or one prompt or several, to be completed. What the client left open is None, and is filled in by the model's card."""

    request_id: str
    """The mesh's own name of the request: who took it in (its incarnation) and a counter."""
    kind: str
    """Of :data:`KINDS`."""
    model: str
    prompt: "str | array[int] | tuple[str | array[int], ...] | None" = None
    """Text or token ids, or several of them, for a completion."""
    messages: list[dict[str, Any]] | None = None
    """For a chat: role and content as text, and `name`, `tool_calls` (id, name, arguments as text) or `tool_call_id` where they belong."""
    max_tokens: int | None = None
    """None: the processor's own limit. 0: nothing, for a prompt that is only echoed."""
    min_tokens: int = 0
    """Neither an end-of-sequence token nor a stop string ends a choice before so many tokens."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """0 is all."""
    seed: int | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    n: int = 1
    """Answers to each prompt."""
    echo: bool = False
    """The text begins with the prompt."""
    logprobs: int = -1
    """As in :class:`~meshserve.wire.generation.Sampling`."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    min_p: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: str = ""
    """The text must be valid under this JSON Schema (its text)."""
    regex: str = ""
    """The whole text must match this regular expression."""
    choices: tuple[str, ...] = ()
    """The text must be one of these. Of schema, expression and choices there is one at most."""
    tools: str = ""
    """A JSON list of functions, each in OpenAI's form: `{"type": "function", "function": {"name", "description", "parameters"}}`;
    `"strict": true` there says that its calls must be valid."""
    tool_choice: str = "none"
    """Of :data:`TOOL_CHOICES`; `function` is the one that `tool_name` names; `strict` is `auto` where a tool is strict."""
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
    """Requests of one session like to go where the last one went; empty for none. A hint."""

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
        """It asks for more than text: for what not every engine can do."""
        return _features_of(self) != _NO_FEATURES

    def to_wire(self) -> dict[str, Any]:
        """Plain data for :meth:`from_wire`; defaults are left out."""
        values = {name: value for name, default in _DEFAULTS.items() if (value := getattr(self, name)) != default}
        if isinstance(self.prompt, tuple):
            values["prompt"] = list(map(_pack_prompt, self.prompt))
        elif self.prompt is not None:
            values["prompt"] = _pack_prompt(self.prompt)
        return {**values, "request_id": self.request_id, "kind": self.kind, "model": self.model}

    @classmethod
    def from_wire(cls, data: Any) -> "CompletionRequest":
        """Raises ProtocolError for missing, mistyped or outsized fields; unknown ones are ignored."""
        if not isinstance(data, dict) or data.get("kind") not in KINDS:
            raise ProtocolError("a completion request is a map with a kind")
        values = {name: data[name] for name in _TYPES if name in data}
        for name, value in values.items():
            if type(value) not in _TYPES[name]:
                raise ProtocolError(f"completion request: {name} is malformed")
        if not {"request_id", "model"} <= values.keys():
            raise ProtocolError("completion request: request_id and model are missing")
        values["prompt"] = _unpack_prompts(values.get("prompt"))
        values["stop"] = _unpack_stops(values.get("stop", []))
        values["logit_bias"] = _unpack_bias(values.get("logit_bias", []))
        values["choices"] = read_choices(values.get("choices", []))
        request = cls(**values)
        request._check()
        return request

    def _check(self) -> None:
        has_input = bool(self.messages) if self.kind == "chat" else self.prompt is not None
        if not has_input or not all(map(_is_message, self.messages or ())) or len(self.messages or ()) > MAX_MESSAGES:
            raise ProtocolError("completion request: its prompt or messages are missing or malformed")
        if self.n < 1 or not 1 <= self.num_choices <= MAX_CHOICES or not -1 <= self.logprobs <= MAX_LOGPROBS:
            raise ProtocolError("completion request: n or logprobs are out of range")
        if not 0 <= (self.max_tokens or 0) <= MAX_COUNT or not 0 <= self.min_tokens <= MAX_COUNT or not 0 <= (self.top_k or 0) <= MAX_COUNT:
            raise ProtocolError("completion request: max_tokens, min_tokens or top_k are out of range")
        if self.tool_choice not in TOOL_CHOICES or (self.tool_choice != "none" and not self.tools):
            raise ProtocolError("completion request: tool_choice is malformed")


_DEFAULTS: dict[str, Any] = {
    found.name: found.default for found in fields(CompletionRequest) if found.name not in ("request_id", "kind", "model", "prompt")
}
_FEATURES = (
    *("logprobs", "tool_choice", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "logit_bias"),
    *("json_schema", "regex", "choices"),
)
_features_of = attrgetter(*_FEATURES)
_NO_FEATURES = tuple(_DEFAULTS[name] for name in _FEATURES)
_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "request_id": (str,),
    "kind": (str,),
    "model": (str,),
    "prompt": (str, bytes, list, type(None)),
    "messages": (list, type(None)),
    "max_tokens": (int, type(None)),
    "min_tokens": (int,),
    "temperature": (*_NUMBER, type(None)),
    "top_p": (*_NUMBER, type(None)),
    "top_k": (int, type(None)),
    "seed": (int, type(None)),
    "ignore_eos": (bool,),
    "stop": (list, tuple),
    "n": (int,),
    "echo": (bool,),
    "logprobs": (int,),
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "repetition_penalty": (*_NUMBER, type(None)),
    "min_p": (*_NUMBER, type(None)),
    "logit_bias": (list, tuple),
    "json_schema": (str,),
    "regex": (str,),
    "choices": (list, tuple),
    "tools": (str,),
    "tool_choice": (str,),
    "tool_name": (str,),
    "parallel_tool_calls": (bool,),
    "add_generation_prompt": (bool,),
    "wants_start": (bool,),
    "client_id": (str,),
    "wants_receipt": (bool,),
    "policy": (str, type(None)),
    "traceparent": (str,),
    "session": (str,),
}


def _pack_prompt(prompt: "str | array[int]") -> str | bytes:
    return prompt if isinstance(prompt, str) else pack_tokens(prompt)


def _unpack_prompt(data: Any) -> "str | array[int]":
    return data if isinstance(data, str) else unpack_tokens(data)


def _unpack_prompts(data: Any) -> "str | array[int] | tuple[str | array[int], ...] | None":
    if isinstance(data, list):
        if not 1 <= len(data) <= MAX_CHOICES:
            raise ProtocolError("completion request: no prompts, or too many")
        return tuple(map(_unpack_prompt, data))
    return None if data is None else _unpack_prompt(data)


def _unpack_stops(data: Any) -> tuple[str, ...]:
    if len(data) > MAX_STOPS or not all(isinstance(text, str) and text for text in data):
        raise ProtocolError("completion request: stop is malformed")
    return tuple(data)


def _unpack_bias(data: Any) -> tuple[tuple[int, float], ...]:
    if len(data) > MAX_LOGIT_BIASES or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in data):
        raise ProtocolError("completion request: logit_bias is malformed")
    if not all(type(token) is int and type(bias) in _NUMBER for token, bias in data):
        raise ProtocolError("completion request: logit_bias is malformed")
    return tuple((token, float(bias)) for token, bias in data)


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


class TextItem(NamedTuple):
    """More text of one choice: of its content or its reasoning, or the arguments of the call that it makes."""

    choice: int
    text: str
    logprobs: list[Any] | None = None
    """Of the tokens that the text is made of, :data:`WireLogprob` each; None if nobody asked."""
    offsets: list[int] | None = None
    """Where each of these tokens begins in all the text of this choice, in characters."""


class CallItem(NamedTuple):
    """From here on, the text of this choice is the arguments of a call of this function; the same name again is another call."""

    choice: int
    name: str


class PartItem(NamedTuple):
    """From here on, the text of this choice is of this kind, of :data:`PARTS`. At first it is `text`."""

    choice: int
    kind: str


class EndItem(NamedTuple):
    """This choice is complete: `stop`, `length` or `tool_calls`, and the stop string if one ended it."""

    choice: int
    reason: str
    stop: str | None


class StartItem(NamedTuple):
    """The prompts' length in tokens, before anything else, for those who asked."""

    num_prompt_tokens: int


Item = TextItem | CallItem | PartItem | EndItem | StartItem


def item_to_wire(item: Item) -> Any:
    """Plain data for :func:`read_item`."""
    if isinstance(item, TextItem):
        return list(item) if item.logprobs is not None else [item.choice, item.text]
    if isinstance(item, CallItem):
        return {"choice": item.choice, "call": item.name}
    if isinstance(item, PartItem):
        return {"choice": item.choice, "part": item.kind}
    if isinstance(item, EndItem):
        return {"choice": item.choice, "reason": item.reason, "stop": item.stop}
    return {"prompt_tokens": item.num_prompt_tokens}


def read_item(data: Any) -> Item:
    """The inverse of :func:`item_to_wire`; a bare string is text of the only choice. Raises ProtocolError for anything else."""
    if type(data) is str:
        return TextItem(0, data)
    if isinstance(data, list) and len(data) in (2, 4) and type(data[0]) is int and type(data[1]) is str:
        return TextItem(*data)
    if isinstance(data, dict) and type(data.get("prompt_tokens")) is int:
        return StartItem(data["prompt_tokens"])
    if isinstance(data, dict) and type(data.get("choice")) is int:
        if isinstance(data.get("call"), str):
            return CallItem(data["choice"], data["call"])
        if data.get("part") in PARTS:
            return PartItem(data["choice"], data["part"])
        if isinstance(data.get("reason"), str) and isinstance(data.get("stop"), (str, type(None))):
            return EndItem(data["choice"], data["reason"], data["stop"])
    raise ProtocolError("an item of a completion that cannot be read")


class Ending(NamedTuple):
    """The value at the end of the stream. Reason and stop string are those of the first choice."""

    reason: str
    num_prompt_tokens: int
    """Each prompt once, however many answers it got."""
    num_completion_tokens: int
    num_cached_tokens: int
    receipt: dict[str, Any] | None = None
    stop: str | None = None

    def to_wire(self) -> list[Any]:
        """Plain data for :meth:`from_wire`."""
        return [self.reason, [self.num_prompt_tokens, self.num_completion_tokens, self.num_cached_tokens], self.receipt, self.stop]

    @classmethod
    def from_wire(cls, data: Any) -> "Ending":
        """Raises ProtocolError for anything else; earlier versions say no stop string, and what later ones append is ignored.

        From this very peer it comes as it is.
        """
        if type(data) is cls:
            return data
        if not isinstance(data, list) or len(data) < 3 or not isinstance(data[0], str) or not isinstance(data[1], list):
            raise ProtocolError("the end of a completion that cannot be read")
        reason, usage, receipt = data[:3]
        stop = data[3] if len(data) > 3 and isinstance(data[3], str) else None
        if len(usage) < 3 or not all(type(count) is int for count in usage) or not isinstance(receipt, (dict, type(None))):
            raise ProtocolError("the end of a completion that cannot be read")
        num_prompt, num_completion, num_cached = usage[:3]
        return cls(reason, num_prompt, num_completion, num_cached, receipt, stop)


class Tokenized(NamedTuple):
    """What a processor answers to `tokenize`."""

    tokens: "array[int]"
    context_length: int
    """The model's."""
    data: bytes = b""
    """What all tokens stand for, if that was asked for, and how many bytes of it are each one's."""
    lengths: "array[int]" = array("I")

    def texts(self) -> list[str]:
        """Each token's text; what is not whole characters is shown with replacement characters."""
        ends = list(accumulate(self.lengths))
        return [self.data[end - length : end].decode("utf-8", "replace") for end, length in zip(ends, self.lengths, strict=True)]

    def to_wire(self) -> list[Any]:
        """Plain data for :meth:`from_wire`."""
        return [pack_tokens(self.tokens), self.context_length, self.data, pack_tokens(self.lengths)]

    @classmethod
    def from_wire(cls, data: Any) -> "Tokenized":
        """Raises ProtocolError for anything else."""
        if not isinstance(data, list) or len(data) < 4 or type(data[1]) is not int or type(data[2]) is not bytes:
            raise ProtocolError("a processor's tokens cannot be read")
        return cls(unpack_tokens(data[0]), data[1], data[2], unpack_tokens(data[3]))
