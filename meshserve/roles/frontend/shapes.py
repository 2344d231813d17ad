"""OpenAI's shapes that are the same in all its APIs: errors and models. Pure."""

import json
from collections.abc import Sequence
from typing import Any

from meshserve import __version__
from meshserve.errors import InvalidRequest, MeshserveError
from meshserve.wire.card import ModelCard

FINGERPRINT = f"meshserve-{__version__}"
dump = json.JSONEncoder(separators=(",", ":")).encode

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}
ERROR_TYPES |= {503: "service_unavailable"}


def error_body(error: MeshserveError) -> bytes:
    """OpenAI's error object."""
    default = "invalid_request_error" if isinstance(error, InvalidRequest) else "server_error"
    kind = ERROR_TYPES.get(error.http_status, default)
    param = error.param if isinstance(error, InvalidRequest) else None
    return dump({"error": {"message": error.message, "type": kind, "param": param, "code": error.code}}).encode()


def error_event(error: MeshserveError) -> bytes:
    """The end of a stream that failed after its first byte: no [DONE] follows."""
    return b"data: " + error_body(error) + b"\n\n"


def models_body(cards: Sequence[ModelCard], created_s: int) -> dict[str, Any]:
    """`GET /v1/models`: one entry for each name of a model, however many workers serve it."""
    unique = {name: card for card in cards for name in card.names}
    return {"object": "list", "data": [model_entry(name, card, created_s) for name, card in unique.items()]}


def model_entry(name: str, card: ModelCard, created_s: int) -> dict[str, Any]:
    """One model under one of its names."""
    return {"id": name, "object": "model", "created": created_s, "owned_by": "meshserve", "max_model_len": card.context_length}
