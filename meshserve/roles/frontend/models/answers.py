"""What comes back with status 200, as the writers make it, and errors: data from which the document's schemas are made. Pure."""

from typing import Any

from meshserve.observe.receipts import PHASES
from meshserve.roles.frontend.models.common import Schema

_KINDS: dict[Any, Schema] = {
    int: {"type": "integer", "minimum": 0},
    float: {"type": "number"},
    str: {"type": "string"},
    dict: {"type": "object"},
    dict[str, int]: {"type": "object", "additionalProperties": {"type": "integer"}},
    dict[str, float]: {"type": "object", "additionalProperties": {"type": "number"}},
    None: {"type": "null"},
}


def ref(name: str) -> Schema:
    """A schema of the document's own."""
    return {"$ref": f"#/components/schemas/{name}"}


def schema_of(shape: Any) -> Schema:
    """The schema of a shape: a type, a constant, a set of constants, `[item]`, `(either, or)` or an object.

    `[item, ...]` is never empty. All members of an object are always there, but for those whose name ends in `?`. Fields are only ever
    added.
    """
    if isinstance(shape, dict):
        if "$ref" in shape:
            return shape
        members = {name.removesuffix("?"): schema_of(member) for name, member in shape.items()}
        required = [name for name in shape if not name.endswith("?")]
        return {"type": "object", "properties": members, "required": required}
    if isinstance(shape, list):
        return {"type": "array", "items": schema_of(shape[0]), "minItems": len(shape) - 1}
    if isinstance(shape, tuple):
        return {"anyOf": [schema_of(way) for way in shape]}
    if isinstance(shape, (set, str, bool)):
        return {"enum": sorted(shape) if isinstance(shape, set) else [shape]}
    return _KINDS[shape]


_TEXT, _NUMBER = (str, None), (float, None)
_TOKEN = {"token": str, "logprob": _NUMBER, "bytes": [int]}
_CACHED, _REASONING = {"cached_tokens": int}, {"reasoning_tokens": int}
_STATUS = {"completed", "incomplete"}
_REASON = {"stop", "length", "tool_calls"}


def _completed(kind: str, choice: str) -> dict[str, Any]:
    head = {"id": str, "object": kind, "created": int, "model": str, "system_fingerprint": str}
    return {**head, "choices": [ref(choice), ...], "usage": ref("Usage"), "meshserve?": ref("Receipt")}


_RECEIPT = {
    "request_id": str,
    "client_id?": str,
    "model": str,
    "policy?": str,
    "peers": dict.fromkeys(("frontend", "processor", "router", "decode", "prefill"), _TEXT),
    "candidates?": [dict],
    "prefill_candidates?": [dict],
    "tokens": {"prompt": int, "cached": int, "completion": int},
    "kv?": {"blocks": int, "bytes": int},
    "attempts?": [dict],
    "handoff?": (dict, None),
    "migrations?": int,
    "total_ms": float,
    "phases_ms": dict.fromkeys(PHASES, float),
}
_OPENAI = {
    "Usage": {
        "prompt_tokens": int, "completion_tokens": int, "total_tokens": int,
        "prompt_tokens_details": _CACHED,
        "completion_tokens_details": _REASONING,
    },
    "TokenLogprob": {**_TOKEN, "top_logprobs": [_TOKEN]},
    "CompletionLogprobs": {
        "tokens": [str],
        "token_logprobs": [_NUMBER],
        "top_logprobs": [(dict[str, float], None)],
        "text_offset": [int],
    },
    "CalledTool": {
        "id": str,
        "type": "function",
        "function": {"name": str, "arguments": str},
    },
    "Answer": {
        "role": "assistant",
        "content": _TEXT,
        "refusal": None,
        "reasoning_content?": str,
        "tool_calls?": [ref("CalledTool"), ...],
    },
    "CompletionChoice": {
        "index": int, "text": str, "finish_reason": _REASON,
        "logprobs": (ref("CompletionLogprobs"), None),
    },
    "ChatChoice": {
        "index": int, "message": ref("Answer"), "finish_reason": _REASON,
        "logprobs": ({"content": [ref("TokenLogprob")], "refusal": None}, None),
    },
    "Completion": _completed("text_completion", "CompletionChoice"),
    "Chat": _completed("chat.completion", "ChatChoice"),
}
_OUTPUT_TEXT = {
    "type": "output_text", "text": str, "annotations": [dict],
    "logprobs": [ref("TokenLogprob")],
}
_ITEM = {"id": str, "status": _STATUS}
_RESPONSES = {
    "OutputMessage": {**_ITEM, "type": "message", "role": "assistant", "content": [_OUTPUT_TEXT, ...]},
    "OutputCall": {
        **_ITEM, "type": "function_call", "call_id": str, "name": str, "arguments": str
    },
    "OutputReasoning": {
        **_ITEM, "type": "reasoning", "summary": [dict],
        "content": [{"type": "reasoning_text", "text": str}, ...],
    },
    "Response": {
        "id": str, "object": "response", "created_at": int, "status": _STATUS, "error": None,
        "incomplete_details": ({"reason": "max_output_tokens"}, None),
        "model": str,
        "output": [(ref("OutputMessage"), ref("OutputCall"), ref("OutputReasoning")), ...],
        "previous_response_id": None, "store": False,
        "text": {"format": dict, "verbosity": "medium"},
        "tool_choice": (str, dict), "tools": [dict],
        "usage": {
            "input_tokens": int,
            "input_tokens_details": _CACHED,
            "output_tokens": int,
            "output_tokens_details": _REASONING,
            "total_tokens": int,
        },
        "meshserve?": ref("Receipt"),
    },
}
_ANTHROPIC = {
    "Block": (
        {"type": "text", "text": str},
        {"type": "tool_use", "id": str, "name": str, "input": dict},
        {"type": "thinking", "thinking": str, "signature": str},
    ),
    "AnthropicAnswer": {
        "id": str, "type": "message", "role": "assistant", "model": str,
        "content": [ref("Block"), ...],
        "stop_reason": {"end_turn", "max_tokens", "stop_sequence", "tool_use"},
        "stop_sequence": _TEXT,
        "usage": {
            "input_tokens": int,
            "cache_creation_input_tokens": int,
            "cache_read_input_tokens": int,
            "output_tokens": int,
        },
        "meshserve?": ref("Receipt"),
    },
}
_PEER = {
    "name": str,
    "incarnation": str,
    "roles": [str],
    "model": _TEXT,
    "address": str,
    "state": {"alive", "suspect", "draining"},
    "mesh": str,
    "load": (dict[str, int], None),
    **dict.fromkeys(("since_s", "rtt_ms", "up_s"), _NUMBER),
    "version": str,
    "http": _TEXT,
    "addresses": [str],
    **dict.fromkeys(("counters", "histograms", "histograms_by_worker", "cannot_join"), dict),
    "latencies": (dict, None),
    "refused": [dict],
    "gone": [dict],
}
ANSWERS: dict[str, Any] = {
    **_OPENAI,
    **_RESPONSES,
    **_ANTHROPIC,
    "Count": {"input_tokens": int},
    "Tokenized": {"count": int, "max_model_len": int, "tokens": [int], "token_strs": ([str], None)},
    "Detokenized": {"prompt": str},
    "ModelEntry": {
        "id": str, "object": "model", "created": int, "owned_by": str, "max_model_len": int
    },
    "Models": {"object": "list", "data": [ref("ModelEntry")]},
    "Health": {"status": "alive", "name": str},
    "Ready": {"status": "ready"},
    "NotReady": {"status": {"waiting", "draining"}, "missing": [{"processor", "decode"}]},
    "Peer": _PEER,
    "Peers": [ref("Peer")],
    "Cancelled": {"cancelled": str},
    "Receipt": _RECEIPT,
}
"""By name: `schema_of` reads them."""
DESCRIPTIONS = {
    "Receipt": "Who served a request, why, and where its time went: `phases_ms` add up to `total_ms`.",
    "Response": "Besides, it repeats its request's instructions, metadata, temperature, ...",
}
