"""`/v1/completions`, `/generate`, and what they share with chats: their fields, and what these become. Pure."""

import json
from array import array
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.models import kinds
from meshserve.roles.frontend.models.common import Body, Fields, Parsed, ResponseOptions, Schema, either, given, invalid
from meshserve.roles.frontend.models.fields import others
from meshserve.roles.frontend.models.reading import read, read_object, set_aside
from meshserve.roles.frontend.models.requests import ANY_OBJECT, MAX_SCHEMA_CHARACTERS, LabelledBody, format_schema, json_text, sampled
from meshserve.wire.completion import MAX_CHOICES, CompletionRequest, DetokenizeRequest, Prompts
from meshserve.wire.generation import (
    MAX_CHOICE_TEXTS,
    MAX_COUNT,
    MAX_LOGIT_BIASES,
    Bias,
    Penalty,
    TokenCount,
)

# --- what completions, chats and the simple form share

_DOCUMENT = "The text is valid under this schema, given as an object or as text."
Document = Annotated[
    dict[str, Any] | str,
    Meta(description=_DOCUMENT),
    kinds.mistake("must be a JSON Schema, as an object or as text"),
]
_REGEX = Meta(min_length=1, max_length=16_384, description="The whole text matches it.")
_CHOICES = Meta(min_length=1, max_length=MAX_CHOICE_TEXTS, description="The text is one of these.")
OneOf = Annotated[
    list[kinds.NonEmpty],
    _CHOICES,
    kinds.mistake(f"must be a list of 1 to {MAX_CHOICE_TEXTS} texts, none of them empty", "*"),
]
LogitBias = Annotated[
    dict[
        Annotated[str, Meta(pattern="^[0-9]{1,10}$")],
        Bias | None,
    ],
    Meta(max_length=MAX_LOGIT_BIASES, description="By token id, what is added to its logit."),
    kinds.mistake(f"must be an object from up to {MAX_LOGIT_BIASES} token ids to numbers from -100 to 100", "*"),
]


class JsonSchema(Body, kw_only=True, tag_field="type", tag="json_schema"):
    """The text is a document that is valid under the schema."""

    json_schema: kinds.NamedSchema


class StructuredOutputs(Body):
    """One of these, and no `response_format`."""

    json: Document | None = None
    json_object: bool = False
    regex: Annotated[str, _REGEX] | None = None
    choice: OneOf | None = None

    OTHERS = others("structured_outputs")


class StreamOptions(Body):
    """How a stream is written."""

    include_usage: bool = False


class OpenAiBody(LabelledBody, kw_only=True):
    """What the three share. What a text must keep to is asked for as OpenAI has it, and as vLLM does."""

    top_k: Annotated[int, Meta(ge=-1, le=MAX_COUNT, description="0 and -1: all.")] | None = None
    stop: kinds.Stops | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias | None = None
    response_format: kinds.FreeText | kinds.JsonObject | JsonSchema | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Document | None = None
    guided_regex: Annotated[str, _REGEX] | None = None
    guided_choice: OneOf | None = None


_CONSTRAINTS = {"response_format", "structured_outputs"}
_CONSTRAINTS |= {"guided_json", "guided_regex", "guided_choice"}


def openai_fields(asked: OpenAiBody, fields: Fields, max_tokens: int | None, ignored: list[str]) -> Fields:
    """What the three have in a CompletionRequest. Raises InvalidRequest that names the field."""
    found = sampled(asked, fields, max_tokens, asked.prompt_cache_key or asked.user)
    if asked.top_k == -1:
        found["top_k"] = 0
    if asked.stop:
        found["stop"] = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    if asked.logit_bias:
        biases = asked.logit_bias.items()
        found["logit_bias"] = tuple((int(name), bias or 0.0) for name, bias in biases)
    if not _CONSTRAINTS.isdisjoint(fields):
        set_aside(StructuredOutputs, fields.get("structured_outputs") or {}, ignored)
        found |= _constraint(asked, asked.structured_outputs or StructuredOutputs())
    return found


def _constraint(asked: OpenAiBody, options: StructuredOutputs) -> Fields:
    """The one of `json_schema`, `regex` and `choices` that is asked for; empty for free text."""
    wanted, prefix = asked.response_format, "structured_outputs."
    schema = wanted.json_schema if isinstance(wanted, JsonSchema) else wanted
    given = (
        ("response_format", "json_schema", format_schema(schema, "response_format.json_schema")),
        ("guided_json", "json_schema", _schema_text(asked.guided_json, "guided_json")),
        ("guided_regex", "regex", asked.guided_regex),
        ("guided_choice", "choices", tuple(asked.guided_choice or ())),
        (f"{prefix}json", "json_schema", _schema_text(options.json, f"{prefix}json")),
        (f"{prefix}json_object", "json_schema", ANY_OBJECT if options.json_object else ""),
        (f"{prefix}regex", "regex", options.regex),
        (f"{prefix}choice", "choices", tuple(options.choice or ())),
    )
    found = [(param, attribute, value) for param, attribute, value in given if value]
    if len(found) > 1:
        words = f"only one of {found[0][0]} and {found[1][0]} can be kept to"
        raise InvalidRequest(words, param=found[1][0])
    return {attribute: value for _, attribute, value in found}


def _schema_text(value: Fields | str | None, param: str) -> str:
    """A schema as an object, or as its text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{param}: the schema is not JSON", param=param) from error
        if not isinstance(value, dict):
            raise InvalidRequest(f"{param}: the schema must be an object", param=param)
    return "" if value is None else json_text(value, param, MAX_SCHEMA_CHARACTERS)


# --- completions and the simple form

_TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}
_TOKENS: Schema = {"type": "array", "items": _TOKEN_ID}
_TEXT_OR_TOKENS: list[Schema] = [{"type": "string"}, {**_TOKENS, "minItems": 1}]


def _prompts(most: int) -> Schema:
    """Text or token ids, or a list of these: `msgspec` knows no union of two kinds of lists."""
    several = {"type": "array", "items": either(*_TEXT_OR_TOKENS), "minItems": 1, "maxItems": most}
    return either(*_TEXT_OR_TOKENS, several)


_PROMPTS = f"Text or token ids, or a list of these. Prompts times `n` are {MAX_CHOICES} at most."
_LIMIT = f"must be an integer between 1 and {MAX_COUNT}, or 0 with echo"
_LOGPROBS = Meta(description="So many alternatives for each token.")
_BEST_OF = Meta(description="Equal to `n`: no answers are made to be thrown away.")
_LABEL = Meta(description="The client's own name for the request; it comes back with each line.")


class CompletionBody(OpenAiBody, kw_only=True):
    """`POST /v1/completions`."""

    prompt: Annotated[Any, Meta(description=_PROMPTS, extra_json_schema=_prompts(MAX_CHOICES))]
    n: kinds.NumChoices = 1
    best_of: Annotated[kinds.NumChoices | None, _BEST_OF] = None
    echo: Annotated[bool, Meta(description="The text begins with the prompt.")] = False
    logprobs: Annotated[kinds.NumLogprobs | None, _LOGPROBS] = None
    max_tokens: Annotated[TokenCount, kinds.mistake(_LIMIT), Meta(description="0 with `echo` only.")] = 16
    stream: kinds.Stream = False
    stream_options: Annotated[StreamOptions | None, kinds.STREAM_ONLY] = None

    OTHERS = others("completions")
    GOES_WITH: ClassVar[dict[str, str]] = {"stream_options": "stream"}
    RULES = (
        either(
            {"properties": {"max_tokens": {"type": ["integer", "null"], "minimum": 1}}},
            given("echo", const=True),
        ),
    )
    EXAMPLE: ClassVar[Fields] = {"model": "dummy", "prompt": "Hello", "max_tokens": 16}


class GenerateBody(OpenAiBody, kw_only=True):
    """`POST /generate`."""

    prompt: Annotated[Any, Meta(description="One prompt.", extra_json_schema=_prompts(1))]
    request_id: Annotated[str | None, _LABEL] = None
    max_tokens: kinds.TokenLimit = 64
    model: kinds.AnyModel = None  # type: ignore[assignment]  # a default, where the other APIs have none

    OTHERS = others("generate")
    EXAMPLE: ClassVar[Fields] = {"prompt": "Hello", "max_tokens": 16}


class TokenizePrompt(Body, kw_only=True):
    """`POST /tokenize` of a prompt."""

    prompt: kinds.NonEmpty
    model: kinds.AnyModel = None
    messages: None = None
    return_token_strs: Annotated[bool, Meta(description="The tokens' texts too.")] = False

    OTHERS = others("tokenize", "tokenize_prompt")
    EXAMPLE: ClassVar[Fields] = {"prompt": "Hello"}


class DetokenizeBody(Body, kw_only=True):
    """`POST /detokenize`."""

    tokens: Annotated[Any, Meta(extra_json_schema=_TOKENS)]
    model: kinds.AnyModel = None

    EXAMPLE: ClassVar[Fields] = {"tokens": [72, 101, 108, 108, 111]}


def parse_completion(body: bytes, request_id: str, client_id: str) -> Parsed:
    """`POST /v1/completions`. Raises InvalidRequest that names the field."""
    fields, ignored = read_object(body), list[str]()
    asked = read(CompletionBody, fields, ignored)
    prompt, n = _read_prompt(asked.prompt), asked.n
    if n * (len(prompt) if isinstance(prompt, tuple) else 1) > MAX_CHOICES:
        words = f"n times the number of prompts must be at most {MAX_CHOICES}"
        raise InvalidRequest(words, param="n" if n > 1 else "prompt")
    if asked.best_of not in (None, n):
        words = f"best_of must be {n}, as n is: no answers are made to be thrown away"
        raise Unsupported(words, param="best_of")
    if asked.max_tokens == 0 and not asked.echo:
        raise invalid("max_tokens", _LIMIT)
    request = CompletionRequest(
        request_id,
        "completion",
        prompt=prompt,
        n=n,
        echo=asked.echo,
        logprobs=-1 if asked.logprobs is None else asked.logprobs,
        max_tokens=asked.max_tokens,
        client_id=client_id,
        **openai_fields(asked, fields, asked.max_tokens, ignored),
    )
    options = asked.stream_options or StreamOptions()
    return request, ResponseOptions(asked.stream, options.include_usage, ignored=ignored)


def parse_generate(
    body: bytes, request_id: str, client_id: str, default_model: str
) -> Parsed:
    """`POST /generate`: the simple form, `{"prompt", "request_id"}`. Raises InvalidRequest that names the field."""
    fields, ignored = read_object(body), list[str]()
    asked = read(GenerateBody, fields, ignored)
    asked.model = asked.model or default_model
    prompt = _read_prompt(asked.prompt)
    if isinstance(prompt, tuple):
        raise invalid("prompt", "must be one prompt")
    request = CompletionRequest(
        request_id,
        "completion",
        prompt=prompt,
        max_tokens=asked.max_tokens,
        client_id=client_id if asked.request_id is None else asked.request_id[:256],
        **openai_fields(asked, fields, asked.max_tokens, ignored),
    )
    return request, ResponseOptions(is_stream=True, ignored=ignored)


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """`POST /detokenize`. The model is empty if the client named none."""
    asked = read(DetokenizeBody, read_object(body), [])
    return DetokenizeRequest(asked.model or "", _token_ids(asked.tokens, "tokens", "a list of token ids"))


def _read_prompt(value: Any) -> Prompts:
    """Text, token ids, or a list of either."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        if len(value) > MAX_CHOICES:
            raise invalid("prompt", f"must be at most {MAX_CHOICES} prompts, not {len(value)}")
        prompts = tuple(part if isinstance(part, str) else _prompt_tokens(part) for part in value)
        return prompts if len(prompts) > 1 else prompts[0]
    return _prompt_tokens(value)


def _prompt_tokens(value: Any) -> "array[int]":
    form = "a string, a list of token ids, or a list of one of these"
    tokens = _token_ids(value, "prompt", form)
    if not tokens:
        raise InvalidRequest("the prompt is empty", param="prompt")
    return tokens


def _token_ids(value: Any, param: str, form: str) -> "array[int]":
    """A list of them, checked at 30 ns each: a prompt may have 100,000."""
    try:
        kinds = set(map(type, value)) if isinstance(value, list) else {None}
        if kinds <= {int}:
            return array("I", value)
        if kinds <= {int, float} and all(map(float.is_integer, map(float, value))):
            return array("I", map(int, value))
    except OverflowError:
        pass
    raise invalid(param, f"must be {form}")
