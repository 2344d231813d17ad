"""Schemas of what comes back with status 200, as the writers make it. Pure."""

from meshserve.observe.receipts import PHASES
from meshserve.roles.frontend.openapi.schemas import (
    COUNT,
    NULL,
    TEXT,
    Schema,
    array,
    either,
    kind,
    one_of,
    or_null,
    record,
    ref,
    told,
    whole,
)

_NUMBER: Schema = {"type": "number"}
_BOOLEAN: Schema = {"type": "boolean"}
_OBJECT: Schema = {"type": "object"}
_REASON: Schema = {"type": "string", "enum": ["stop", "length", "tool_calls"]}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}


def _with_receipt(schema: Schema) -> Schema:
    return {**schema, "properties": {**schema["properties"], "meshserve": ref("Receipt")}}


def _usage() -> Schema:
    return whole(
        {
            "prompt_tokens": COUNT,
            "completion_tokens": COUNT,
            "total_tokens": COUNT,
            "prompt_tokens_details": whole({"cached_tokens": COUNT}),
            "completion_tokens_details": whole({"reasoning_tokens": COUNT}),
        }
    )


def _named(what: str, choice: str) -> Schema:
    return _with_receipt(
        whole(
            {
                "id": TEXT,
                "object": kind(what),
                "created": COUNT,
                "model": TEXT,
                "system_fingerprint": TEXT,
                "choices": array(ref(choice), 1),
                "usage": ref("Usage"),
            }
        )
    )


def _token_logprob() -> Schema:
    token = {"token": TEXT, "logprob": {"type": ["number", "null"]}, "bytes": array(COUNT)}
    return whole({**token, "top_logprobs": array(whole(token))})


def _completions() -> dict[str, Schema]:
    logprobs = whole(
        {
            "tokens": array(TEXT),
            "token_logprobs": array({"type": ["number", "null"]}),
            "top_logprobs": array({"type": ["object", "null"], "additionalProperties": _NUMBER}),
            "text_offset": array(COUNT),
        }
    )
    content = whole({"content": array(ref("TokenLogprob")), "refusal": NULL})
    message = record(
        {
            "role": kind("assistant"),
            "content": _TEXT_OR_NULL,
            "refusal": NULL,
            "reasoning_content": TEXT,
            "tool_calls": array(ref("ToolCall"), 1),
        },
        ["role", "content", "refusal"],
    )
    return {
        "Usage": _usage(),
        "TokenLogprob": _token_logprob(),
        "CompletionChoice": whole({"index": COUNT, "text": TEXT, "logprobs": or_null(logprobs), "finish_reason": _REASON}),
        "ChatChoice": whole({"index": COUNT, "message": message, "logprobs": or_null(content), "finish_reason": _REASON}),
        "Completion": _named("text_completion", "CompletionChoice"),
        "Chat": _named("chat.completion", "ChatChoice"),
    }


def _response() -> Schema:
    text = whole({"type": kind("output_text"), "text": TEXT, "annotations": array(_OBJECT), "logprobs": array(ref("TokenLogprob"))})
    status = {"type": "string", "enum": ["completed", "incomplete"]}
    message = {"id": TEXT, "type": kind("message"), "status": status, "role": kind("assistant"), "content": array(text, 1)}
    call = {"id": TEXT, "type": kind("function_call"), "status": status, "call_id": TEXT, "name": TEXT, "arguments": TEXT}
    thought = whole({"type": kind("reasoning_text"), "text": TEXT})
    reasoning = {"id": TEXT, "type": kind("reasoning"), "status": status, "summary": array(_OBJECT), "content": array(thought, 1)}
    usage = {
        "input_tokens": COUNT,
        "input_tokens_details": whole({"cached_tokens": COUNT}),
        "output_tokens": COUNT,
        "output_tokens_details": whole({"reasoning_tokens": COUNT}),
        "total_tokens": COUNT,
    }
    return told(
        _with_receipt(
            whole(
                {
                    "id": TEXT,
                    "object": kind("response"),
                    "created_at": COUNT,
                    "status": status,
                    "error": NULL,
                    "incomplete_details": or_null(whole({"reason": kind("max_output_tokens")})),
                    "model": TEXT,
                    "output": array(either(whole(message), whole(call), whole(reasoning)), 1),
                    "previous_response_id": NULL,
                    "store": {"const": False},
                    "text": whole({"format": _OBJECT, "verbosity": kind("medium")}),
                    "tool_choice": {"type": ["string", "object"]},
                    "tools": array(_OBJECT),
                    "usage": whole(usage),
                }
            )
        ),
        "Besides, it repeats what its request said: instructions, metadata, temperature, ...",
    )


def _message() -> Schema:
    text = whole({"type": kind("text"), "text": TEXT})
    use = whole({"type": kind("tool_use"), "id": TEXT, "name": TEXT, "input": _OBJECT})
    thinking = whole({"type": kind("thinking"), "thinking": TEXT, "signature": TEXT})
    usage = whole({"input_tokens": COUNT, "cache_creation_input_tokens": COUNT, "cache_read_input_tokens": COUNT, "output_tokens": COUNT})
    return _with_receipt(
        whole(
            {
                "id": TEXT,
                "type": kind("message"),
                "role": kind("assistant"),
                "model": TEXT,
                "content": array(either(text, use, thinking), 1),
                "stop_reason": {"type": "string", "enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
                "stop_sequence": _TEXT_OR_NULL,
                "usage": usage,
            }
        )
    )


def _receipt() -> Schema:
    peers = ("frontend", "processor", "router", "decode", "prefill")
    return told(
        record(
            {
                "request_id": TEXT,
                "client_id": TEXT,
                "model": TEXT,
                "policy": TEXT,
                "peers": told(whole(dict.fromkeys(peers, _TEXT_OR_NULL)), "Names; prefill is null where the decode worker did it itself."),
                "candidates": array(_OBJECT),
                "prefill_candidates": array(_OBJECT),
                "tokens": whole({"prompt": COUNT, "cached": COUNT, "completion": COUNT}),
                "kv": whole({"blocks": COUNT, "bytes": COUNT}),
                "attempts": array(_OBJECT),
                "handoff": told(
                    {"type": ["object", "null"], "additionalProperties": True},
                    "Where the decode worker had the prompt prefilled, with the expected milliseconds to the first token here and there.",
                ),
                "migrations": COUNT,
                "total_ms": _NUMBER,
                "phases_ms": told(whole(dict.fromkeys(PHASES, _NUMBER)), "They add up to `total_ms`."),
            },
            ["request_id", "model", "peers", "tokens", "total_ms", "phases_ms"],
        ),
        "Who served a request, why, and where its time went.",
    )


def _peer() -> Schema:
    fields: dict[str, Schema] = {
        "name": TEXT,
        "incarnation": TEXT,
        "roles": array(TEXT),
        "model": _TEXT_OR_NULL,
        "address": TEXT,
        "state": {"type": "string", "enum": ["alive", "suspect", "draining"]},
        "mesh": TEXT,
        "load": {"type": ["object", "null"], "additionalProperties": {"type": "integer"}},
        "since_s": {"type": ["number", "null"]},
        "rtt_ms": {"type": ["number", "null"]},
        "up_s": {"type": ["number", "null"]},
        "version": TEXT,
        "http": _TEXT_OR_NULL,
        "addresses": array(TEXT),
        "counters": _OBJECT,
        "histograms": _OBJECT,
        "histograms_by_worker": _OBJECT,
        "latencies": {"type": ["object", "null"]},
        "refused": array(_OBJECT),
        "gone": array(_OBJECT),
        "cannot_join": _OBJECT,
    }
    return whole(fields)


def components() -> dict[str, Schema]:
    """Schemas of answers, by name."""
    model = {"id": TEXT, "object": kind("model"), "created": COUNT, "owned_by": TEXT, "max_model_len": COUNT}
    tokenized = {"count": COUNT, "max_model_len": COUNT, "tokens": array(COUNT), "token_strs": or_null(array(TEXT))}
    missing = {"status": {"type": "string", "enum": ["waiting", "draining"]}, "missing": array(one_of("processor", "decode"))}
    return {
        **_completions(),
        "Response": _response(),
        "AnthropicAnswer": _message(),
        "Count": whole({"input_tokens": COUNT}),
        "Tokenized": whole(tokenized),
        "Detokenized": whole({"prompt": TEXT}),
        "ModelEntry": whole(model),
        "Models": whole({"object": kind("list"), "data": array(ref("ModelEntry"))}),
        "Health": whole({"status": kind("alive"), "name": TEXT}),
        "Ready": whole({"status": kind("ready")}),
        "NotReady": whole(missing),
        "Peer": _peer(),
        "Peers": array(ref("Peer")),
        "Cancelled": whole({"cancelled": told(TEXT, "The request's id.")}),
        "Receipt": _receipt(),
    }
