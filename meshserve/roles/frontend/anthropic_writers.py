"""Anthropic's Messages API: the answer as one object or as events, and its errors. Pure."""

from typing import Any

from meshserve.errors import ContextLengthExceeded, InvalidRequest, MeshserveError, Unsupported
from meshserve.roles.frontend.shapes import dump
from meshserve.roles.frontend.writers import EventWriter, Part, Reply, WholeWriter, arguments_of
from meshserve.wire.completion import CallItem, Ending, EndItem, PartItem, StartItem, TextItem

Json = dict[str, Any]

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_DELTAS = {"text": ("text_delta", "text"), "reasoning": ("thinking_delta", "thinking"), "call": ("input_json_delta", "partial_json")}
"""By kind of block: a delta's type, and what its text is called."""
PING = 'event: ping\ndata: {"type":"ping"}\n\n'


def error_body(error: MeshserveError) -> bytes:
    """Anthropic's error object; `code` and `param` are those of the other APIs."""
    default = "invalid_request_error" if isinstance(error, InvalidRequest) else "api_error"
    param = error.param if isinstance(error, InvalidRequest) else None
    message = _too_long(error) if isinstance(error, ContextLengthExceeded) and error.context_length else error.message
    told: Json = {"type": ERROR_TYPES.get(error.http_status, default), "message": message, "code": error.code, "param": param}
    if isinstance(error, Unsupported) and error.beta is not None:  # the official client goes on without this field
        told["details"] = {"error_code": f"{error.beta}_unsupported_request", "unsupported": [error.beta]}
    return dump({"type": "error", "error": told}).encode()


def _too_long(error: ContextLengthExceeded) -> str:
    """In Anthropic's words: programs take the figures out of them, and ask for less or sum the conversation up."""
    num_prompt, num_output, limit = error.num_prompt_tokens, error.num_output_tokens, error.context_length
    if not num_output:
        return f"prompt is too long: {num_prompt} tokens > {limit} maximum"
    told = f"{num_prompt} + {num_output} > {limit}"
    return f"input length and `max_tokens` exceed context limit: {told}, decrease input length or `max_tokens` and try again"


def usage_of(ending: Ending) -> Json:
    """This API's usage object: what was read from the cache is no part of `input_tokens`."""
    return {
        "input_tokens": max(0, ending.num_prompt_tokens - ending.num_cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": ending.num_cached_tokens,
        "output_tokens": ending.num_completion_tokens,
    }


def stop_of(reason: str, stop: str | None) -> Json:
    """`stop_reason` and `stop_sequence`."""
    if stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": _STOP_REASONS.get(reason, "end_turn"), "stop_sequence": None}


def _message(reply: Reply, content: list[Json], stop: Json, usage: Json) -> Json:
    named = {"id": reply.response_id, "type": "message", "role": "assistant", "model": reply.request.model}
    return {**named, "content": content, **stop, "usage": usage}


def _use(reply: Reply, number: int, name: str, arguments: Json) -> Json:
    return {"type": "tool_use", "id": reply.call_id(0, "toolu_", number), "name": name, "input": arguments}


def _thinking(text: str) -> Json:
    """Reasoning. Nobody signs it: it is not read again where a client sends it back."""
    return {"type": "thinking", "thinking": text, "signature": ""}


class WholeMessage(WholeWriter):
    """A message that is not streamed."""

    def _body(self, ending: Ending) -> bytes:
        choice = self._choices[0]
        content = [self._block(number, part) for number, part in enumerate(choice.shown)]
        message = _message(self._reply, content, stop_of(choice.reason, choice.stop), usage_of(ending))
        if ending.receipt is not None:
            message["meshserve"] = ending.receipt
        return dump(message).encode()

    def _block(self, number: int, part: Part) -> Json:
        if part.kind == "call":
            return _use(self._reply, number, part.name, arguments_of(part.text))
        return _thinking(part.text) if part.kind == "reasoning" else {"type": "text", "text": part.text}


class MessageEvents(EventWriter):
    """A streamed message: content blocks, each of text, thinking or a use of a tool, one after the other."""

    ping = PING.encode()

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self._num_prompt_tokens = 0
        self._has_begun = self._is_open = False
        self._kind = "text"
        """Of the block that is open, or that the next text opens."""
        self._index = 0
        """Of that block."""
        self._end = EndItem(0, "", None)

    def _event(self, kind: str, fields: Json) -> str:
        return f"event: {kind}\ndata: {dump({'type': kind, **fields})}\n\n"

    def _start(self, item: StartItem) -> str:
        self._num_prompt_tokens = item.num_prompt_tokens
        return ""

    def _open(self, block: Json) -> str:
        """The message's beginning and a block's. How much of the prompt was cached is known, and told, at the end."""
        self._is_open = True
        return self._begin() + self._event("content_block_start", {"index": self._index, "content_block": block})

    def _turn_to(self, kind: str) -> str:
        """The end of the block that is open."""
        self._kind = kind
        if not self._is_open:
            return ""
        self._is_open = False
        self._index += 1
        return self._event("content_block_stop", {"index": self._index - 1})

    def _begin(self) -> str:
        if self._has_begun:
            return ""
        self._has_begun = True
        usage = {**usage_of(Ending("", self._num_prompt_tokens, 0, 0)), "output_tokens": 0}
        message = _message(self._reply, [], {"stop_reason": None, "stop_sequence": None}, usage)
        return self._event("message_start", {"message": message}) + PING

    def _text(self, item: TextItem) -> str:
        if not item.text:
            return self._begin()
        kind, name = _DELTAS[self._kind]
        opening = ""
        if not self._is_open:
            opening = self._open(_thinking("") if self._kind == "reasoning" else {"type": "text", "text": ""})
        return opening + self._event("content_block_delta", {"index": self._index, "delta": {"type": kind, name: item.text}})

    def _call(self, item: CallItem) -> str:
        closing = self._turn_to("call")
        return closing + self._open(_use(self._reply, self._index, item.name, {}))

    def _part(self, item: PartItem) -> str:
        return self._turn_to(item.kind)

    def _finish(self, item: EndItem) -> str:
        self._end = item
        return ""

    def end(self, ending: Ending) -> bytes:
        stop = stop_of(self._end.reason or ending.reason, self._end.stop or ending.stop)
        delta: Json = {"delta": stop, "usage": usage_of(ending)}
        if ending.receipt is not None:
            delta["meshserve"] = ending.receipt
        is_empty = not self._is_open and not self._index
        closing = (self._open({"type": "text", "text": ""}) if is_empty else "") + self._turn_to("text")
        return (closing + self._event("message_delta", delta) + self._event("message_stop", {})).encode()

    def fail(self, error: MeshserveError) -> bytes:
        return b"event: error\ndata: " + error_body(error) + b"\n\n"
