"""What OpenAI's two older APIs and the simple form share: sampling, and what a text must keep to. Pure."""

import json
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from meshserve.errors import InvalidRequest
from meshserve.roles.frontend.models.common import (
    Body,
    Fields,
    FreeText,
    JsonObject,
    LabelledBody,
    NamedSchema,
    NonEmpty,
    NotDone,
    ResponseOptions,
    Stops,
    mistake,
    not_done,
)
from meshserve.roles.frontend.models.reading import refuse_not_done
from meshserve.roles.frontend.models.requests import (
    ANY_OBJECT,
    MAX_SCHEMA_CHARACTERS,
    format_schema,
    json_text,
    sampled,
)
from meshserve.wire.completion import MAX_COUNT
from meshserve.wire.generation import MAX_CHOICE_TEXTS, MAX_LOGIT_BIASES

_DOCUMENT = "The text is valid under this schema, given as an object or as text."
Document = Annotated[
    dict[str, Any] | str,
    Meta(description=_DOCUMENT),
    mistake("must be a JSON Schema, as an object or as text"),
]
_REGEX = Meta(min_length=1, max_length=16_384, description="The whole text matches it.")
_CHOICES = Meta(min_length=1, max_length=MAX_CHOICE_TEXTS, description="The text is one of these.")
OneOf = Annotated[
    list[NonEmpty],
    _CHOICES,
    mistake(f"must be a list of 1 to {MAX_CHOICE_TEXTS} texts, none of them empty", "*"),
]
LogitBias = Annotated[
    dict[
        Annotated[str, Meta(pattern="^[0-9]{1,10}$")],
        Annotated[float, Meta(ge=-100, le=100)] | None,
    ],
    Meta(max_length=MAX_LOGIT_BIASES, description="By token id, what is added to its logit."),
    mistake(f"must be an object from up to {MAX_LOGIT_BIASES} token ids to numbers from -100 to 100", "*"),
]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


class JsonSchema(Body, kw_only=True, tag_field="type", tag="json_schema"):
    """The text is a document that is valid under the schema."""

    json_schema: NamedSchema


class StructuredOutputs(Body):
    """One of these, and no `response_format`."""

    json: Document | None = None
    json_object: bool = False
    regex: Annotated[str, _REGEX] | None = None
    choice: OneOf | None = None

    NOT_DONE: ClassVar[NotDone] = not_done(
        null="grammar structural_tag whitespace_pattern",
        false="disable_fallback disable_any_whitespace disable_additional_properties",
    )


class StreamOptions(Body):
    """How a stream is written."""

    include_usage: bool = False


class OpenAiBody(LabelledBody, kw_only=True):
    """What the three share. What a text must keep to is asked for as OpenAI has it, and as vLLM does."""

    top_k: Annotated[int, Meta(ge=-1, le=MAX_COUNT, description="0 and -1: all.")] | None = None
    stop: Stops | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias | None = None
    response_format: FreeText | JsonObject | JsonSchema | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Document | None = None
    guided_regex: Annotated[str, _REGEX] | None = None
    guided_choice: OneOf | None = None

    NOT_DONE: ClassVar[NotDone] = not_done(
        null="prompt_logprobs truncate_prompt_tokens guided_grammar regex ebnf",
        false="use_beam_search include_stop_str_in_output return_token_ids return_tokens_as_token_ids",
        empty="stop_token_ids bad_words logits_processors",
        length_penalty=(1,),
        skip_special_tokens=(True,),
    )


_CONSTRAINTS = {"response_format", "structured_outputs"}
_CONSTRAINTS |= {"guided_json", "guided_regex", "guided_choice"}


def openai_fields(asked: OpenAiBody, fields: Fields, max_tokens: int | None) -> Fields:
    """What the three have in a CompletionRequest. Raises InvalidRequest that names the field."""
    found = sampled(asked, fields, max_tokens)
    found["session"] = asked.session
    if asked.top_k == -1:
        found["top_k"] = 0
    if asked.stop:
        found["stop"] = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    if asked.logit_bias:
        biases = asked.logit_bias.items()
        found["logit_bias"] = tuple((int(name), bias or 0.0) for name, bias in biases)
    if not _CONSTRAINTS.isdisjoint(fields):
        refuse_not_done(StructuredOutputs, fields.get("structured_outputs") or {})
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


def stream_of(is_stream: bool, options: StreamOptions | None) -> ResponseOptions:
    """`stream` and `stream_options`. Raises InvalidRequest for the second without the first."""
    if options is not None and not is_stream:
        raise InvalidRequest("stream_options goes with stream only", param="stream_options")
    return ResponseOptions(is_stream, options is not None and options.include_usage)
