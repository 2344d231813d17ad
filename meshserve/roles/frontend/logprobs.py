"""Log probabilities as OpenAI's two older APIs show them. Pure."""

from collections.abc import Sequence
from typing import Any

from meshserve.wire.completion import WireLogprob

_LEAST = -9999.0
"""Stands for a probability of 0, whose logarithm JSON cannot write; as OpenAI does it."""


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
            shown.setdefault(_name(other), max(_LEAST, value))
        tops.append(shown)
    return {
        "tokens": [_name(data) for data, _, _ in entries],
        "token_logprobs": [_finite(logprob) for _, logprob, _ in entries],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(_LEAST, logprob)


def _name(data: bytes) -> str:
    """A token's text, or its bytes where they are not whole characters: names in an object must differ."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
