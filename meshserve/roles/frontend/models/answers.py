"""What comes back with status 200, as the writers make it, and errors: data from which the document's schemas are made. Pure."""

from typing import Any

from meshserve.observe.receipts import PHASES
from meshserve.roles.frontend.models.common import Schema

_KINDS: dict[Any, Schema] = {
    int: {"type": "integer", "minimum": 0},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
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

    `[item, ...]` is never empty. All members of an object are always there, but for those whose name ends in `?`;
    a member without a name is its description. Fields are only ever added.
    """
    if isinstance(shape, dict):
        if "$ref" in shape:
            return shape
        words = {"description": shape[""]} if "" in shape else {}
        names = [name for name in shape if name]
        members = {name.removesuffix("?"): schema_of(shape[name]) for name in names}
        required = [name for name in names if not name.endswith("?")]
        return {**words, "type": "object", "properties": members, "required": required}
    if isinstance(shape, list):
        return {"type": "array", "items": schema_of(shape[0]), "minItems": len(shape) - 1}
    if isinstance(shape, tuple):
        return {"anyOf": [schema_of(way) for way in shape]}
    if isinstance(shape, (set, str, bool)):
        return {"enum": sorted(shape) if isinstance(shape, set) else [shape]}
    return _KINDS[shape]


def each(kind: Any, names: str) -> dict[str, Any]:
    """Members of one kind."""
    return dict.fromkeys(names.split(), kind)


_VARIANT = {**each(str, "id model_hash kv_layout"), "workers": int}
_TEXT, _NUMBER = (str, None), (float, None)
_TOKEN = {"token": str, "logprob": _NUMBER, "bytes": [int]}
_LOGPROBS = [ref("TokenLogprob")]
_CACHED, _REASONING = {"cached_tokens": int}, {"reasoning_tokens": int}
_STATUS = {"completed", "incomplete"}
_REASON = {"stop", "length", "tool_calls"}
_COMPLETION = {
    **each(str, "id model system_fingerprint"),
    "created": int,
    "usage": ref("Usage"),
    "meshserve?": ref("Receipt"),
}

_OPENAI: dict[str, Any] = {
    "Usage": {
        **each(int, "prompt_tokens completion_tokens total_tokens"),
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
    "CalledTool": {"id": str, "type": "function", "function": each(str, "name arguments")},
    "ChatAnswer": {
        "role": "assistant",
        "content": _TEXT,
        "refusal": None,
        "reasoning_content?": str,
        "tool_calls?": [ref("CalledTool"), ...],
    },
    "CompletionChoice": {
        "index": int,
        "text": str,
        "logprobs": (ref("CompletionLogprobs"), None),
        "finish_reason": _REASON,
    },
    "ChatChoice": {
        "index": int,
        "message": ref("ChatAnswer"),
        "logprobs": ({"content": _LOGPROBS, "refusal": None}, None),
        "finish_reason": _REASON,
    },
    "Completion": {
        **_COMPLETION,
        "object": "text_completion",
        "choices": [ref("CompletionChoice"), ...],
    },
    "Chat": {**_COMPLETION, "object": "chat.completion", "choices": [ref("ChatChoice"), ...]},
}
_OUTPUT_TEXT = {"type": "output_text", "text": str, "annotations": [dict], "logprobs": _LOGPROBS}
_THOUGHT = {"type": "reasoning_text", "text": str}
_ITEM = {"id": str, "status": _STATUS}
_MESSAGE = {"type": "message", "role": "assistant", "content": [_OUTPUT_TEXT, ...]}
_RESPONSES: dict[str, Any] = {
    "OutputMessage": {**_ITEM, **_MESSAGE},
    "OutputCall": {**_ITEM, "type": "function_call", **each(str, "call_id name arguments")},
    "OutputReasoning": {**_ITEM, "type": "reasoning", "summary": [dict], "content": [_THOUGHT, ...]},
    "Response": {
        "": "Besides, it repeats what its request said: instructions, metadata, temperature, ...",
        "object": "response",
        **each(str, "id model"),
        "error": None,
        "previous_response_id": _TEXT,
        "created_at": int,
        "status": _STATUS,
        "incomplete_details": ({"reason": "max_output_tokens"}, None),
        "output": [(ref("OutputMessage"), ref("OutputCall"), ref("OutputReasoning")), ...],
        "store": bool,
        "text": {"format": dict, "verbosity": "medium"},
        "tool_choice": (str, dict),
        "tools": [dict],
        "usage": {
            **each(int, "input_tokens output_tokens total_tokens"),
            "input_tokens_details": _CACHED,
            "output_tokens_details": _REASONING,
        },
        "meshserve?": ref("Receipt"),
    },
    "InputCount": {"object": "response.input_tokens", "input_tokens": int},
    "Deleted": {"id": str, "object": "response", "deleted": True},
    "InputItem": {**each(str, "id type"), "status": "completed", "": "A message, reasoning, a call or what it came to."},
    "InputItems": {
        "object": "list",
        "data": [ref("InputItem")],
        **each(_TEXT, "first_id last_id"),
        "has_more": bool,
    },
}
_ANTHROPIC: dict[str, Any] = {
    "ContentBlock": (
        {"type": "text", "text": str},
        {"type": "tool_use", "id": str, "name": str, "input": dict},
        {"type": "thinking", "thinking": str, "signature": str},
    ),
    "AnthropicAnswer": {
        "type": "message",
        "role": "assistant",
        **each(str, "id model"),
        "content": [ref("ContentBlock"), ...],
        "stop_reason": {"end_turn", "max_tokens", "stop_sequence", "tool_use"},
        "stop_sequence": _TEXT,
        "usage": each(
            int, "input_tokens cache_creation_input_tokens cache_read_input_tokens output_tokens"
        ),
        "meshserve?": ref("Receipt"),
    },
    "Count": {"input_tokens": int},
}
_OLLAMA_PART = {"model": str, "created_at": str}
_OLLAMA_END = {
    "logprobs?": _LOGPROBS,
    "done": True,
    "done_reason": {"stop", "length", "load"},
    **each(int, "total_duration? load_duration? prompt_eval_count? prompt_eval_duration? eval_count? eval_duration?"),
    "meshserve?": ref("Receipt"),
}
_OLLAMA_ENTRY = {**each(str, "name model digest"), **each(int, "size size_vram context_length"), "details": dict}
_OLLAMA: dict[str, Any] = {
    "OllamaCalledTool": {"id": str, "function": {"index": int, "name": str, "arguments": dict}},
    "OllamaAnswer": {
        "role": "assistant",
        "content": str,
        "thinking?": str,
        "tool_calls?": [ref("OllamaCalledTool"), ...],
    },
    "OllamaChat": {**_OLLAMA_PART, "message": ref("OllamaAnswer"), **_OLLAMA_END},
    "OllamaText": {**_OLLAMA_PART, "response": str, "thinking?": str, **_OLLAMA_END},
    "OllamaModels": {"models": [{**_OLLAMA_ENTRY, "modified_at": str}]},
    "OllamaRunning": {"models": [{**_OLLAMA_ENTRY, "expires_at": str}]},
    "OllamaShown": {
        **each(str, "modelfile parameters template modified_at"),
        **each(dict, "details model_info"),
        "capabilities": [{"completion", "tools"}, ...],
    },
    "OllamaVersion": each(str, "version meshserve"),
}
_MESH: dict[str, Any] = {
    "Receipt": {
        "": (
            "Who served a request, why, and where its time went: `phases_ms` add up to `total_ms`. Peers are "
            "names; `prefill` is null where the decode worker did it itself, and `handoff` says what was expected."
        ),
        **each(str, "request_id client_id? model policy?"),
        "peers": each(_TEXT, "frontend processor router decode prefill"),
        **each([dict], "candidates? prefill_candidates? attempts? continuations?"),
        "tokens": each(int, "prompt cached completion"),
        "kv?": each(int, "blocks bytes"),
        "handoff?": (dict, None),
        "migrations?": int,
        "total_ms": float,
        "phases_ms": dict.fromkeys(PHASES, float),
    },
    "Peer": {
        **each(str, "name incarnation address mesh version"),
        **each([str], "roles addresses"),
        **each(_TEXT, "model model_hash kv_layout http"),
        "state": {"alive", "suspect", "draining"},
        "load": (dict[str, int], None),
        **each(_NUMBER, "since_s rtt_ms up_s"),
        **each(dict, "counters histograms histograms_by_worker cannot_join"),
        "latencies": (dict, None),
        "answered": bool,
        **each([dict], "refused gone silent"),
    },
    "Peers": [ref("Peer")],
    "Health": {"status": "alive", "name": str},
    "Ready": {"status": "ready"},
    "NotReady": {"status": {"waiting", "draining"}, "missing": [{"processor", "decode"}]},
    "Cancelled": {"cancelled": str},
}
ANSWERS: dict[str, Any] = {
    **_OPENAI,
    **_RESPONSES,
    **_ANTHROPIC,
    **_OLLAMA,
    **_MESH,
    "Tokenized": {**each(int, "count max_model_len"), "tokens": [int], "token_strs": ([str], None)},
    "Detokenized": {"prompt": str},
    "ModelEntry": {**each(str, "id owned_by"), "object": "model", **each(int, "created max_model_len"), "variants": [_VARIANT, ...]},
    "Models": {"object": "list", "data": [ref("ModelEntry")]},
}
"""By name: `schema_of` reads them."""
