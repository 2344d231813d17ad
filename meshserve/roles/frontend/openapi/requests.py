"""Schemas of the bodies that `parsing.py` and `tokenizing.py` read: OpenAI's older APIs, and the simple forms. Pure."""

from meshserve.roles.frontend.constraints import MAX_REGEX_CHARACTERS, OPTIONS_NOT_DONE
from meshserve.roles.frontend.openapi.schemas import (
    NULL,
    TEXT,
    Schema,
    array,
    either,
    labels,
    needs,
    neutral,
    one_of,
    optional_boolean,
    optional_integer,
    optional_number,
    optional_string,
    or_null,
    record,
    ref,
    string,
    strings,
    token_ids,
    told,
)
from meshserve.roles.frontend.openapi.tools import TOOLS_RULE
from meshserve.roles.frontend.parsing import (
    LABELS,
    MAX_BIAS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
    NOT_IN_CHATS,
    NOT_IN_COMPLETIONS,
    NOT_IN_GENERATE,
    NOT_IN_TOKENIZE,
    SEEDS,
    TOKEN_ID,
)
from meshserve.routing.policies import POLICIES
from meshserve.wire.completion import MAX_CHOICES, MAX_COUNT, MAX_LOGPROBS, MAX_STOPS
from meshserve.wire.generation import MAX_CHOICE_TEXTS, MAX_LOGIT_BIASES

STREAM_OPTIONS_RULE = needs("stream_options", NULL, "stream")
_UNASKED = "By default the model's own, if it has one."
TOP_P: Schema = {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1, "description": _UNASKED}
MIN_P: Schema = {
    **optional_number(0, 1),
    "description": f"Tokens less likely than this share of the likeliest one's probability are not chosen. {_UNASKED}",
}
REPETITION_PENALTY: Schema = {
    **optional_number(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    "description": f"Divides the logits above 0 of tokens that were there before, and multiplies those below. {_UNASKED}",
}
MODEL = ref("Model")

_STREAM: dict[str, Schema] = {
    "stream": told(optional_boolean(), "Server-sent events as the text comes."),
    "stream_options": told(or_null(record({"include_usage": optional_boolean()})), "Goes with `stream` only."),
}
_TEXT_OR_TOKENS = (TEXT, token_ids(1))


def extension() -> Schema:
    """What meshserve takes besides."""
    policy = told({"enum": [*POLICIES, None]}, "How the worker is chosen.")
    receipt = told(optional_boolean(), "Who served the request, why, and where its time went, with the answer.")
    return or_null(record({"receipt": receipt, "policy": policy}))


def sampling() -> dict[str, Schema]:
    """What completions and chats have in common."""
    penalty = optional_number(-MAX_PENALTY, MAX_PENALTY, 0)
    bias = {
        "type": ["object", "null"],
        "propertyNames": {"pattern": f"^{TOKEN_ID.pattern}$"},
        "additionalProperties": optional_number(-MAX_BIAS, MAX_BIAS),
        "maxProperties": MAX_LOGIT_BIASES,
    }
    return {
        "model": MODEL,
        "min_tokens": told(optional_integer(0, MAX_COUNT, 0), "At most as many as are allowed to be made."),
        "temperature": told(optional_number(0, MAX_TEMPERATURE), "0 takes the likeliest token. Default: the model's."),
        "top_p": TOP_P,
        "top_k": told(optional_integer(-1, MAX_COUNT), f"0 and -1: all. {_UNASKED}"),
        "seed": optional_integer(*SEEDS),
        "ignore_eos": told(optional_boolean(), "Go on until `max_tokens`."),
        "stop": strings(MAX_STOPS),
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
        "logit_bias": told(bias, "By token id, what is added to its logit."),
        "min_p": MIN_P,
        "repetition_penalty": REPETITION_PENALTY,
        "response_format": ref("ResponseFormat"),
        **constraints(),
        "meshserve": ref("Extension"),
        **labels(LABELS),
    }


def constraints() -> dict[str, Schema]:
    """vLLM's ways to say what a text must keep to."""
    words = "The text is valid under this schema, given as an object or as text."
    schema = told({"type": ["object", "string", "null"]}, words)
    regex = told({"type": ["string", "null"], "minLength": 1, "maxLength": MAX_REGEX_CHARACTERS}, "The whole text matches it.")
    choices = {"type": ["array", "null"], "items": string(), "minItems": 1, "maxItems": MAX_CHOICE_TEXTS}
    choice = told(choices, "The text is one of these.")
    options = {"json": schema, "json_object": optional_boolean(), "regex": regex, "choice": choice, **neutral(OPTIONS_NOT_DONE)}
    return {
        "structured_outputs": told(or_null(record(options)), "One of these, and no `response_format`."),
        "guided_json": schema,
        "guided_regex": regex,
        "guided_choice": choice,
    }


def _completion() -> Schema:
    n = optional_integer(1, MAX_CHOICES, 1)
    body = record(
        {
            "prompt": told(
                either(*_TEXT_OR_TOKENS, array(either(*_TEXT_OR_TOKENS), 1, MAX_CHOICES)),
                f"Text or token ids, or a list of these. Prompts times `n` are {MAX_CHOICES} at most.",
            ),
            "n": n,
            "best_of": told(n, "Equal to `n`: no answers are made to be thrown away."),
            "echo": told(optional_boolean(), "The text begins with the prompt."),
            "logprobs": told(optional_integer(0, MAX_LOGPROBS), "So many alternatives for each token."),
            "max_tokens": told(optional_integer(0, MAX_COUNT, 16), "0 with `echo` only."),
            **sampling(),
            **_STREAM,
            **neutral(NOT_IN_COMPLETIONS),
        },
        ["model", "prompt"],
    )
    at_least_one = {"properties": {"max_tokens": {"type": ["integer", "null"], "minimum": 1}}}
    echoes = {"properties": {"echo": {"const": True}}, "required": ["echo"]}
    return {**body, "allOf": [STREAM_OPTIONS_RULE, either(at_least_one, echoes)]}


def _chat() -> Schema:
    most = optional_integer(1, MAX_COUNT)
    body = record(
        {
            "messages": ref("Messages"),
            "max_completion_tokens": most,
            "max_tokens": told(most, "The older name; the other one counts where both are given."),
            "n": optional_integer(1, MAX_CHOICES, 1),
            "logprobs": optional_boolean(),
            "top_logprobs": told(optional_integer(0, MAX_LOGPROBS), "Goes with `logprobs` only."),
            "tools": ref("Tools"),
            "tool_choice": ref("ToolChoice"),
            "parallel_tool_calls": told(optional_boolean(True), "False: the answer ends after its first call."),
            "metadata": {"type": ["object", "null"]},
            **sampling(),
            **_STREAM,
            **neutral(NOT_IN_CHATS),
        },
        ["model", "messages"],
    )
    return {**body, "allOf": [STREAM_OPTIONS_RULE, TOOLS_RULE, needs("top_logprobs", one_of(0, None), "logprobs")]}


def _generate() -> Schema:
    prompt = told(either(*_TEXT_OR_TOKENS, array(either(*_TEXT_OR_TOKENS), 1, 1)), "One prompt.")
    fields = {
        "prompt": prompt,
        "request_id": told(optional_string(), "The client's own name for the request; it comes back with each line."),
        "max_tokens": optional_integer(1, MAX_COUNT, 64),
        **sampling(),
        "model": _any_model(),
    }
    return record({**fields, **neutral(NOT_IN_GENERATE)}, ["prompt"])


def _any_model() -> Schema:
    return told(or_null(string()), "Default: the first that is served.")


def _tokenize() -> Schema:
    """A prompt or a chat, told apart by whether there are messages."""
    both = {"model": _any_model(), "return_token_strs": told(optional_boolean(), "The tokens' texts too."), **neutral(NOT_IN_TOKENIZE)}
    prompt = {"prompt": string(), "messages": NULL, **neutral({"add_special_tokens": (True,)})}
    chat = {
        "messages": ref("Messages"),
        "prompt": NULL,
        "tools": ref("Tools"),
        "tool_choice": ref("ToolChoice"),
        "parallel_tool_calls": optional_boolean(True),
        "add_generation_prompt": optional_boolean(True),
        **neutral({"add_special_tokens": (False,)}),
    }
    return either(record({**both, **prompt}, ["prompt"]), {**record({**both, **chat}, ["messages"]), "allOf": [TOOLS_RULE]})


def components() -> dict[str, Schema]:
    """Schemas of requests, by name."""
    return {
        "Model": told({**string(), "examples": ["dummy"]}, "Of `/v1/models`."),
        "Extension": extension(),
        "CompletionRequest": _completion(),
        "ChatRequest": _chat(),
        "GenerateRequest": _generate(),
        "TokenizeRequest": _tokenize(),
        "DetokenizeRequest": record({"model": _any_model(), "tokens": token_ids()}, ["tokens"]),
    }
