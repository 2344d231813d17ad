"""From the body of a request in OpenAI's older APIs, or in `/generate`'s, to what it asks for. Pure.

Fields that are known elsewhere and cannot be done here are refused by name where they would have an effect, and never silently ignored;
fields that nobody knows are ignored, as OpenAI-compatible servers do. What a model's engine cannot do is refused by the processor.
"""

import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.constraints import CONSTRAINTS, read_constraint
from meshserve.roles.frontend.fields import (
    Fields,
    boolean,
    integer,
    number,
    optional_integer,
    optional_number,
    optional_object,
    optional_string,
    read_object,
    refuse,
    string,
    strings,
)
from meshserve.roles.frontend.messages import read_messages
from meshserve.roles.frontend.tooling import read_tools
from meshserve.routing.policies import POLICIES
from meshserve.wire.completion import MAX_CHOICES, MAX_COUNT, MAX_LOGPROBS, MAX_STOPS, CompletionRequest
from meshserve.wire.generation import MAX_LOGIT_BIASES

LABELS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""For statistics and caches of the one who serves: they change no answer."""
_EXTENSIONS: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "logits_processors": ([],),
    "guided_grammar": (),
    "regex": (),
    "ebnf": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}
"""Of other servers. As everywhere, each with the values besides null that ask for nothing."""
NOT_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {**_EXTENSIONS, "suffix": ("",), "tools": ([],), "prompt_embeds": ()}
NOT_IN_CHATS: dict[str, tuple[Any, ...]] = {
    **_EXTENSIONS,
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    "echo": (False,),
    "best_of": (1,),
    "chat_template": ("",),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}

NOT_IN_TOKENIZE: dict[str, tuple[Any, ...]] = {
    name: NOT_IN_CHATS[name] for name in ("chat_template", "chat_template_kwargs", "continue_final_message", "documents")
}


NOT_IN_GENERATE: dict[str, tuple[Any, ...]] = {**NOT_IN_COMPLETIONS, "n": (1,), "logprobs": (), "echo": (False,), "best_of": (1,)}

MAX_SESSION_CHARACTERS = 256
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0
"""And the least, negative."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 10.0
MAX_BIAS = 100.0
SEEDS = (-(2**63), 2**63 - 1)
TOKEN_ID = re.compile("[0-9]{1,10}")
"""As the name of a member of `logit_bias`."""


@dataclass(slots=True)
class ResponseOptions:
    """How the client wants its answer."""

    is_stream: bool = False
    wants_usage: bool = False
    """A last chunk with the usage, in a stream."""
    echoed: dict[str, Any] | None = None
    """What the API repeats of the request in its answer."""


def parse_completion(body: bytes, request_id: str, client_id: str) -> tuple[CompletionRequest, ResponseOptions]:
    """`POST /v1/completions`. Raises InvalidRequest that names the field."""
    fields = read_object(body)
    refuse(fields, NOT_IN_COMPLETIONS)
    prompt, n = read_prompt(fields.get("prompt")), _n(fields)
    if n * (len(prompt) if isinstance(prompt, tuple) else 1) > MAX_CHOICES:
        raise InvalidRequest(f"n times the number of prompts must be at most {MAX_CHOICES}", param="n" if n > 1 else "prompt")
    if optional_integer(fields, "best_of", 1, MAX_CHOICES) not in (None, n):
        raise Unsupported(f"best_of must be {n}, as n is: no answers are made to be thrown away", param="best_of")
    echo = boolean(fields, "echo")
    given = {
        "prompt": prompt,
        "echo": echo,
        "logprobs": integer(fields, "logprobs", 0, MAX_LOGPROBS, -1),
        "max_tokens": integer(fields, "max_tokens", 0 if echo else 1, MAX_COUNT, 16),
        "n": n,
    }
    return sampled(fields, request_id, client_id, kind="completion", **given), read_options(fields)


def parse_chat(body: bytes, request_id: str, client_id: str) -> tuple[CompletionRequest, ResponseOptions]:
    """`POST /v1/chat/completions`. Raises InvalidRequest that names the field."""
    fields = read_object(body)
    refuse(fields, NOT_IN_CHATS)
    optional_object(fields, "metadata")
    tools = read_tools(fields)
    most, older = optional_integer(fields, "max_completion_tokens", 1, MAX_COUNT), optional_integer(fields, "max_tokens", 1, MAX_COUNT)
    given = {
        "messages": read_messages(fields),
        "max_tokens": most if most is not None else older,
        "n": _n(fields),
        "logprobs": _chat_logprobs(fields),
        "tools": tools.text("tools"),
        "tool_choice": tools.choice,
        "tool_name": tools.name,
        "parallel_tool_calls": tools.is_parallel,
    }
    return sampled(fields, request_id, client_id, kind="chat", **given), read_options(fields)


def parse_generate(body: bytes, request_id: str, client_id: str, default_model: str) -> CompletionRequest:
    """`POST /generate`: the simple form, `{"prompt", "request_id"}`. Raises InvalidRequest that names the field."""
    fields = read_object(body)
    refuse(fields, NOT_IN_GENERATE)
    label = optional_string(fields, "request_id")
    prompt = read_prompt(fields.get("prompt"))
    if isinstance(prompt, tuple):
        raise InvalidRequest("prompt must be one prompt", param="prompt")
    if fields.get("model") is None:
        fields["model"] = default_model
    max_tokens = integer(fields, "max_tokens", 1, MAX_COUNT, 64)
    label = client_id if label is None else label[:256]
    return sampled(fields, request_id, label, kind="completion", prompt=prompt, max_tokens=max_tokens)


def sampled(fields: Fields, request_id: str, client_id: str, **given: Any) -> CompletionRequest:
    """The request, with all that these APIs have in common. Raises InvalidRequest that names the field."""
    for name in fields:
        if name in COMMON:
            attribute, read = COMMON[name]
            given[attribute] = read(fields)
        elif name in LABELS:
            optional_string(fields, name)
    if not CONSTRAINTS.isdisjoint(fields):
        given |= read_constraint(fields)
    if "min_tokens" in given:
        _check_least(given["min_tokens"], given["max_tokens"])
    if "meshserve" in fields:
        given["wants_receipt"], given["policy"] = read_extension(fields)
    session = read_session(fields)
    return CompletionRequest(request_id=request_id, model=string(fields, "model"), client_id=client_id, session=session, **given)


def read_options(fields: Fields) -> ResponseOptions:
    """`stream` and `stream_options`."""
    is_stream = boolean(fields, "stream")
    options = optional_object(fields, "stream_options")
    if options is None:
        return ResponseOptions(is_stream)
    if not is_stream:
        raise InvalidRequest("stream_options goes with stream only", param="stream_options")
    return ResponseOptions(is_stream, boolean(options, "include_usage", "stream_options.include_usage"))


def read_extension(fields: Fields) -> tuple[bool, str | None]:
    """Of `meshserve`: whether a receipt is wanted, and the routing policy."""
    value = optional_object(fields, "meshserve") or {}
    policy = optional_string(value, "policy", "meshserve.policy")
    if policy is not None and policy not in POLICIES:
        raise InvalidRequest(f"unknown policy {policy[:64]!r}; there are: {', '.join(POLICIES)}", param="meshserve.policy")
    return boolean(value, "receipt", "meshserve.receipt"), policy


def read_session(fields: Fields) -> str:
    """Who asks, as far as these fields tell: requests of one session like to go to one worker."""
    return (optional_string(fields, "prompt_cache_key") or optional_string(fields, "user") or "")[:MAX_SESSION_CHARACTERS]


def read_top_p(fields: Fields) -> float | None:
    """Above 0 and at most 1. As for the others, null leaves it to the model."""
    value = optional_number(fields, "top_p", 0.0, 1.0)
    if value == 0:
        raise InvalidRequest("top_p must be above 0 and at most 1", param="top_p")
    return value


def read_top_k(fields: Fields) -> int | None:
    """0 and -1 are all."""
    value = optional_integer(fields, "top_k", -1, MAX_COUNT)
    return None if value is None else max(0, value)


def read_min_p(fields: Fields) -> float | None:
    """From 0, which is none, to 1."""
    return optional_number(fields, "min_p", 0.0, 1.0)


def read_repetition_penalty(fields: Fields) -> float | None:
    """1 is none."""
    return optional_number(fields, "repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)


def read_prompt(value: Any) -> "str | array[int] | tuple[str | array[int], ...]":
    """Text, token ids, or a list of either."""
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        if len(value) > MAX_CHOICES:
            raise InvalidRequest(f"prompt must be at most {MAX_CHOICES} prompts, not {len(value)}", param="prompt")
        prompts = tuple(_one_prompt(part) for part in value)
        return prompts if len(prompts) > 1 else prompts[0]
    return _one_prompt(value)


def _one_prompt(value: Any) -> "str | array[int]":
    if isinstance(value, str):
        return value
    if value is None:
        raise InvalidRequest("prompt is missing", param="prompt")
    tokens = token_ids(value, "prompt", "a string, a list of token ids, or a list of one of these")
    if not tokens:
        raise InvalidRequest("the prompt is empty", param="prompt")
    return tokens


def token_ids(value: Any, param: str, form: str) -> "array[int]":
    """A list of them, checked at 30 ns each: a prompt may have 100,000. Raises InvalidRequest that names the field, and its form."""
    try:
        kinds = set(map(type, value)) if isinstance(value, list) else {None}
        if kinds <= {int}:
            return array("I", value)
        if kinds <= {int, float} and all(map(float.is_integer, map(float, value))):
            return array("I", map(int, value))
    except OverflowError:
        pass
    raise InvalidRequest(f"{param} must be {form}", param=param)


def _n(fields: Fields) -> int:
    return integer(fields, "n", 1, MAX_CHOICES, 1)


def _check_least(min_tokens: int, max_tokens: int | None) -> None:
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens must be at most max_tokens, which is {max_tokens}", param="min_tokens")


def _chat_logprobs(fields: Fields) -> int:
    most = optional_integer(fields, "top_logprobs", 0, MAX_LOGPROBS)
    if boolean(fields, "logprobs"):
        return most or 0
    if most:
        raise InvalidRequest("top_logprobs goes with logprobs only", param="top_logprobs")
    return -1


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    given = optional_object(fields, "logit_bias") or {}
    if len(given) > MAX_LOGIT_BIASES:
        raise InvalidRequest(f"logit_bias must name at most {MAX_LOGIT_BIASES} tokens", param="logit_bias")
    if not all(map(TOKEN_ID.fullmatch, given)):
        raise InvalidRequest("logit_bias must be an object from token ids to numbers", param="logit_bias")
    return tuple((int(name), optional_number(given, name, -MAX_BIAS, MAX_BIAS, "logit_bias") or 0.0) for name in given)


COMMON: dict[str, tuple[str, Callable[[Fields], Any]]] = {
    "min_tokens": ("min_tokens", lambda fields: integer(fields, "min_tokens", 0, MAX_COUNT, 0)),
    "temperature": ("temperature", lambda fields: optional_number(fields, "temperature", 0.0, MAX_TEMPERATURE)),
    "top_p": ("top_p", read_top_p),
    "top_k": ("top_k", read_top_k),
    "seed": ("seed", lambda fields: optional_integer(fields, "seed", *SEEDS)),
    "ignore_eos": ("ignore_eos", lambda fields: boolean(fields, "ignore_eos")),
    "stop": ("stop", lambda fields: strings(fields, "stop", MAX_STOPS)),
    "presence_penalty": ("presence_penalty", lambda fields: number(fields, "presence_penalty", -MAX_PENALTY, MAX_PENALTY, 0.0)),
    "frequency_penalty": ("frequency_penalty", lambda fields: number(fields, "frequency_penalty", -MAX_PENALTY, MAX_PENALTY, 0.0)),
    "logit_bias": ("logit_bias", _logit_bias),
    "min_p": ("min_p", read_min_p),
    "repetition_penalty": ("repetition_penalty", read_repetition_penalty),
}
"""By field: where its value goes, and what reads it. A request has few of them, and those that it has not cost it nothing."""


def read_prompt_or_messages(fields: Fields) -> dict[str, Any]:
    """What `/tokenize` takes: a prompt of text, or the messages and tools of a chat."""
    is_chat = fields.get("messages") is not None
    refuse(fields, {**NOT_IN_TOKENIZE, "add_special_tokens": (not is_chat,)})
    if not is_chat:
        return {"kind": "completion", "prompt": string(fields, "prompt")}
    if fields.get("prompt") is not None:
        raise InvalidRequest("either prompt or messages, not both", param="prompt")
    given = {"kind": "chat", "messages": read_messages(fields), "tools": read_tools(fields).text("tools")}
    return {**given, "add_generation_prompt": boolean(fields, "add_generation_prompt", default=True)}


def read_tokens(fields: Fields) -> "array[int]":
    """What `/detokenize` takes."""
    return token_ids(fields.get("tokens"), "tokens", "a list of token ids")
