"""OpenAI's response shapes. What repeats in every chunk of a stream is encoded once per request. Pure."""

import json
from collections.abc import Sequence
from typing import Any

from meshserve import __version__
from meshserve.errors import Forbidden, InvalidRequest, MeshserveError, Unauthorized
from meshserve.wire.card import ModelCard

DONE = b"data: [DONE]\n\n"

_FINGERPRINT = f"meshserve-{__version__}"
_dump = json.JSONEncoder(separators=(",", ":")).encode
_encode_text = json.encoder.encode_basestring_ascii


def usage_of(num_prompt: int, num_completion: int, num_cached: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


class ChunkWriter:
    """Server-sent events of one streamed answer."""

    def __init__(self, response_id: str, model: str, created_s: int, *, is_chat: bool) -> None:
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        self._fields = {"id": response_id, "object": kind, "created": created_s, "model": model, "system_fingerprint": _FINGERPRINT}
        self._is_chat = is_chat
        opening = _dump(self._fields)[:-1] + ',"choices":[{"index":0,'
        self._head = "data: " + opening + ('"delta":{"content":' if is_chat else '"text":')
        self._tail = ('},"finish_reason":null}]}\n\n') if is_chat else ',"finish_reason":null}]}\n\n'

    def role(self) -> bytes:
        """The first chunk of a chat: the role only."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._event({**self._fields, "choices": [choice]})

    def texts(self, texts: Sequence[str]) -> bytes:
        """One chunk for each text, in one piece."""
        head, tail = self._head, self._tail
        return "".join([f"{head}{_encode_text(text)}{tail}" for text in texts]).encode()

    def finish(self, reason: str, usage: dict[str, Any] | None, receipt: dict[str, Any] | None) -> bytes:
        """The chunk with the finish reason, then the usage if it was asked for, then the end. A receipt rides on the last chunk."""
        text: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        chunks: list[dict[str, Any]] = [{**self._fields, "choices": [{"index": 0, **text, "finish_reason": reason}]}]
        if usage is not None:
            chunks.append({**self._fields, "choices": [], "usage": usage})
        if receipt is not None:
            chunks[-1]["meshserve"] = receipt
        return b"".join(map(self._event, chunks)) + DONE

    @staticmethod
    def _event(chunk: dict[str, Any]) -> bytes:
        return b"data: " + _dump(chunk).encode() + b"\n\n"


def error_event(error: MeshserveError) -> bytes:
    """The end of a stream that failed after its first byte: no [DONE] follows."""
    return b"data: " + error_body(error) + b"\n\n"


def whole_body(
    response_id: str,
    model: str,
    created_s: int,
    text: str,
    reason: str,
    usage: dict[str, Any],
    receipt: dict[str, Any] | None,
    *,
    is_chat: bool,
) -> bytes:
    """An answer that is not streamed."""
    if is_chat:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": reason}
    else:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    body = {
        "id": response_id,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created_s,
        "model": model,
        "system_fingerprint": _FINGERPRINT,
        "choices": [choice],
        "usage": usage,
    }
    if receipt is not None:
        body["meshserve"] = receipt
    return _dump(body).encode()


def error_body(error: MeshserveError) -> bytes:
    """OpenAI's error object."""
    kind = "server_error"
    if isinstance(error, InvalidRequest):
        kind = "invalid_request_error"
    elif isinstance(error, Unauthorized):
        kind = "authentication_error"
    elif isinstance(error, Forbidden):
        kind = "permission_error"
    elif error.http_status == 429:
        kind = "rate_limit_error"
    elif error.http_status == 503:
        kind = "service_unavailable"
    param = error.param if isinstance(error, InvalidRequest) else None
    return _dump({"error": {"message": error.message, "type": kind, "param": param, "code": error.code}}).encode()


def models_body(cards: Sequence[ModelCard], created_s: int) -> dict[str, Any]:
    """`GET /v1/models`: one entry a model, however many workers serve it."""
    unique = {card.model: card for card in cards}
    return {"object": "list", "data": [model_entry(card, created_s) for card in unique.values()]}


def model_entry(card: ModelCard, created_s: int) -> dict[str, Any]:
    """One model."""
    return {"id": card.model, "object": "model", "created": created_s, "owned_by": "meshserve", "max_model_len": card.context_length}


def line(fields: dict[str, Any]) -> bytes:
    """One line of `/generate`'s stream."""
    return _dump(fields).encode() + b"\n"
