"""From the body of an HTTP request to what it asks for, or a clear word about what is wrong with it. Pure.

Fields of OpenAI's API that this version cannot do are refused by name where they would have an effect, and never silently ignored;
fields that nobody knows are ignored, as OpenAI-compatible servers do.
"""

import json
import math
from array import array
from dataclasses import dataclass
from typing import Any

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.wire.completion import CompletionRequest

MAX_STOPS = 16
_MAX_COUNT = 10_000_000

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
}
"""Fields that cannot be done yet, with the values that ask for nothing."""


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """How the client wants its answer."""

    is_stream: bool = False
    wants_usage: bool = False
    """A last chunk with the usage, in a stream."""


def parse_completion(body: bytes, request_id: str, client_id: str) -> tuple[CompletionRequest, ResponseOptions]:
    """`POST /v1/completions`. Raises InvalidRequest that names the field."""
    fields = _object(body)
    prompt = _prompt(fields.get("prompt"))
    max_tokens = _integer(fields, "max_tokens", 1, _MAX_COUNT, 16)
    return _request(fields, request_id, client_id, kind="completion", prompt=prompt, max_tokens=max_tokens), _options(fields)


def parse_chat(body: bytes, request_id: str, client_id: str) -> tuple[CompletionRequest, ResponseOptions]:
    """`POST /v1/chat/completions`. Raises InvalidRequest that names the field."""
    fields = _object(body)
    messages = _messages(fields.get("messages"))
    max_tokens = _integer(fields, "max_completion_tokens", 1, _MAX_COUNT, None) or _integer(fields, "max_tokens", 1, _MAX_COUNT, None)
    return _request(fields, request_id, client_id, kind="chat", messages=messages, max_tokens=max_tokens), _options(fields)


def parse_generate(body: bytes, request_id: str, client_id: str, default_model: str) -> CompletionRequest:
    """`POST /generate`: the simple form, `{"prompt", "request_id"}`. Raises InvalidRequest that names the field."""
    fields = _object(body)
    label = fields.get("request_id", client_id)
    if not isinstance(label, str):
        raise InvalidRequest("request_id must be a string", param="request_id")
    fields.setdefault("model", default_model)
    max_tokens = _integer(fields, "max_tokens", 1, _MAX_COUNT, 64)
    return _request(fields, request_id, label[:256], kind="completion", prompt=_prompt(fields.get("prompt")), max_tokens=max_tokens)


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest("the body is not UTF-8") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object")
    return fields


def _request(fields: dict[str, Any], request_id: str, client_id: str, **given: Any) -> CompletionRequest:
    _refuse_unsupported(fields)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model is missing" if model is None else "model must be a string", param="model")
    wants_receipt, policy = _extension(fields.get("meshserve"))
    return CompletionRequest(
        request_id=request_id,
        model=model,
        min_tokens=_integer(fields, "min_tokens", 0, _MAX_COUNT, 0) or 0,
        temperature=_number(fields, "temperature", 0.0, 2.0, None),
        top_p=_top_p(fields),
        top_k=max(0, _integer(fields, "top_k", -1, _MAX_COUNT, 0) or 0),
        seed=_integer(fields, "seed", -(2**63), 2**63 - 1, None),
        ignore_eos=_boolean(fields, "ignore_eos"),
        stop=_stops(fields.get("stop")),
        client_id=client_id,
        wants_receipt=wants_receipt,
        policy=policy,
        **given,
    )


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    for name in fields.keys() & _NEUTRAL.keys():
        value = fields[name]
        is_neutral = any(value == neutral and (isinstance(value, bool) is isinstance(neutral, bool)) for neutral in _NEUTRAL[name])
        if not is_neutral:
            raise Unsupported(f"{name} is not supported", param=name)


def _options(fields: dict[str, Any]) -> ResponseOptions:
    is_stream = _boolean(fields, "stream")
    options = fields.get("stream_options")
    if options is None:
        return ResponseOptions(is_stream)
    if not isinstance(options, dict):
        raise InvalidRequest("stream_options must be an object", param="stream_options")
    if not is_stream:
        raise InvalidRequest("stream_options goes with stream only", param="stream_options")
    return ResponseOptions(is_stream, _boolean(options, "include_usage", "stream_options.include_usage"))


def _extension(value: Any) -> tuple[bool, str | None]:
    if value is None:
        return False, None
    if not isinstance(value, dict):
        raise InvalidRequest("meshserve must be an object", param="meshserve")
    policy = value.get("policy")
    if policy is not None and not isinstance(policy, str):
        raise InvalidRequest("meshserve.policy must be a string", param="meshserve.policy")
    return _boolean(value, "receipt", "meshserve.receipt"), policy


def _boolean(fields: dict[str, Any], name: str, param: str | None = None) -> bool:
    value = fields.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InvalidRequest(f"{param or name} must be true or false", param=param or name)
    return value


def _integer(fields: dict[str, Any], name: str, least: int, most: int, default: int | None) -> int | None:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int:
        raise InvalidRequest(f"{name} must be an integer", param=name)
    if not least <= value <= most:
        raise InvalidRequest(f"{name} must be between {least} and {most}, not {value}", param=name)
    return value


def _number(fields: dict[str, Any], name: str, least: float, most: float, default: float | None) -> float | None:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidRequest(f"{name} must be a number", param=name)
    if not least <= value <= most:
        raise InvalidRequest(f"{name} must be between {least:g} and {most:g}", param=name)
    return float(value)


def _top_p(fields: dict[str, Any]) -> float:
    value = _number(fields, "top_p", 0.0, 1.0, 1.0)
    if not value:
        raise InvalidRequest("top_p must be above 0 and at most 1", param="top_p")
    return value


def _text(value: str, param: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{param} contains half a character (a lone surrogate)", param=param) from error
    return value


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise InvalidRequest(f"stop must be a string or up to {MAX_STOPS} strings, none of them empty", param="stop")
    return tuple(_text(stop, "stop") for stop in stops)


def _prompt(value: Any) -> "str | array[int]":
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        return _text(value, "prompt")
    if value is None:
        raise InvalidRequest("prompt is missing", param="prompt")
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        raise Unsupported("one prompt in a request: several are not supported", param="prompt")
    return token_ids(value, "prompt")


def token_ids(value: Any, param: str) -> "array[int]":
    """A list of them, checked at 30 ns each: a prompt may have 100,000. Raises InvalidRequest that names the field."""
    try:
        if isinstance(value, list) and set(map(type, value)) <= {int}:
            return array("I", value)
    except OverflowError:
        pass
    raise InvalidRequest(f"{param} must be a string or a list of token ids", param=param)


def _messages(value: Any) -> list[dict[str, Any]]:
    if value is None:
        raise InvalidRequest("messages is missing", param="messages")
    if not isinstance(value, list) or not value:
        raise InvalidRequest("messages must be a list of at least one message", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str) or not value["role"]:
        raise InvalidRequest(f"{param} must be an object with a role", param=param)
    message = {"role": _text(value["role"], param), "content": _content(value.get("content"), f"{param}.content")}
    if isinstance(value.get("name"), str):
        message["name"] = _text(value["name"], param)
    return message


def _content(value: Any, param: str) -> str:
    if isinstance(value, str):
        return _text(value, param)
    if not isinstance(value, list):
        raise InvalidRequest(f"{param} must be text, or a list of parts", param=param)
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Unsupported(f"{param}: parts of type {kind!r} are not supported, only text", param=param)
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{param}: a text part has a text", param=param)
        texts.append(_text(part["text"], param))
    return "".join(texts)
