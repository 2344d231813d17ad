"""OpenAI's shapes that several of its APIs have: errors, models, log probabilities. Pure."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from meshserve import __version__
from meshserve.errors import InvalidRequest, MeshserveError
from meshserve.wire.card import exact_name
from meshserve.wire.completion import WireLogprob
from meshserve.wire.hello import PeerInfo

FINGERPRINT = f"meshserve-{__version__}"
dump = json.JSONEncoder(separators=(",", ":")).encode

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}
ERROR_TYPES |= {503: "service_unavailable"}
_LEAST_LOGPROB = -9999.0
"""Stands for a probability of 0, whose logarithm JSON cannot write; as OpenAI does it."""


def error_body(error: MeshserveError) -> bytes:
    """OpenAI's error object."""
    default = "invalid_request_error" if isinstance(error, InvalidRequest) else "server_error"
    kind = ERROR_TYPES.get(error.http_status, default)
    param = error.param if isinstance(error, InvalidRequest) else None
    return dump({"error": {"message": error.message, "type": kind, "param": param, "code": error.code}}).encode()


def models_body(workers: Sequence[PeerInfo], created_s: int) -> dict[str, Any]:
    """`GET /v1/models`: one entry for each name of a model, however many workers serve it; where several models have a name, one for
    each by its exact name too."""
    cards = [info.card for info in workers if info.card is not None]
    hashes: defaultdict[str, set[str]] = defaultdict(set)
    for card in cards:
        for name in card.names:
            hashes[name].add(card.model_hash)
    names = [*hashes, *sorted(exact_name(name, found) for name, several in hashes.items() if len(several) > 1 for found in several)]
    return {"object": "list", "data": [model_entry(name, workers, created_s) for name in names]}


def model_entry(name: str, workers: Sequence[PeerInfo], created_s: int) -> dict[str, Any]:
    """One model under one of its names, with what differs among the workers of this name: weights, and how they keep KV."""
    serving = [(info.card, info.layout) for info in workers if info.card is not None and info.card.is_called(name)]
    counts = Counter(
        (
            exact_name(name, card.model_hash) if name in card.names else name,
            card.model_hash,
            layout.fingerprint if layout is not None else "",
        )
        for card, layout in serving
    )
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "meshserve",
        "max_model_len": max(card.context_length for card, _ in serving),
        "variants": [
            {"id": exact, "model_hash": model, "kv_layout": layout, "workers": count}
            for (exact, model, layout), count in counts.items()
        ],
    }


# --- log probabilities, as the two older APIs show them


def chat_logprobs(entries: Sequence[WireLogprob]) -> dict[str, Any]:
    """A chat choice's `logprobs`."""
    return {"content": token_entries(entries), "refusal": None}


def token_entries(entries: Sequence[WireLogprob]) -> list[dict[str, Any]]:
    """Tokens with their bytes; text that is not whole characters is shown with replacement characters."""
    return [{**_token(data, logprob), "top_logprobs": [_token(*other) for other in top]} for data, logprob, top in entries]


def _token(data: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


def completion_logprobs(entries: Sequence[WireLogprob], offsets: Sequence[int]) -> dict[str, Any]:
    """A completion choice's `logprobs`. Where two of the likeliest tokens have the same text, the likelier one is shown."""
    tops: list[dict[str, float] | None] = []
    for data, logprob, top in entries:
        if logprob is None:
            tops.append(None)
            continue
        shown: dict[str, float] = {}
        for other, value in (*top, (data, logprob)):
            shown.setdefault(_name(other), max(_LEAST_LOGPROB, value))
        tops.append(shown)
    return {
        "tokens": [_name(data) for data, _, _ in entries],
        "token_logprobs": [_finite(logprob) for _, logprob, _ in entries],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(_LEAST_LOGPROB, logprob)


def _name(data: bytes) -> str:
    """A token's text, or its bytes where they are not whole characters: names in an object must differ."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
