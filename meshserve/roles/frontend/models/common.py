"""How the bodies of HTTP requests are declared, and what those of all APIs share. Pure.

A field's type, with its `Meta`, is the field's validation, its JSON Schema and its documentation. A field
with a default may be left out, and null is the same as leaving it out. Members that no field names are
ignored, as OpenAI-compatible servers do. `reading.py` reads these structs, `schemas.py` makes their schemas.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from meshserve.routing.policies import POLICIES
from meshserve.wire.completion import MAX_CHOICES, MAX_STOPS, CompletionRequest
from meshserve.wire.generation import MAX_COUNT, MAX_LOGPROBS, TokenCount

Fields = dict[str, Any]
Schema = dict[str, Any]
Rules = tuple[Schema, ...]
NotDone = dict[str, tuple[Any, ...]]

MAX_SESSION_CHARACTERS = 256
"""Of who asks, as far as the fields tell: requests of one session like to go to one worker."""


class Body(Struct, kw_only=True, omit_defaults=True):
    """A JSON object in a request."""

    NOT_DONE: ClassVar[NotDone] = {}
    """Fields that ask for what is not done here, each with the values besides null that ask for nothing.
    Other values are refused by name, and never silently ignored."""
    RULES: ClassVar[Rules] = ()
    """Rules between fields, for the schema; what makes a request of the body checks them."""
    IS_UNTAGGED: ClassVar[bool] = False
    """Of several kinds of objects, the one that need not say its `type`."""
    EXAMPLE: ClassVar[Fields] = {}
    """A body as people would send it, with all fields that must be there."""


@dataclass(slots=True)
class ResponseOptions:
    """How the client wants its answer."""

    is_stream: bool = False
    wants_usage: bool = False
    """A last chunk with the usage, in a stream."""
    echoed: Fields | None = None
    """What the API repeats of the request in its answer."""


Parsed = tuple[CompletionRequest, ResponseOptions]


def mistake(words: str, *covers: str) -> Meta:
    """How a value that is not valid is refused: "PARAM WORDS".

    `covers` are the places inside, as `.type`, whose mistakes are reported as the value's own; `*` is all.
    """
    return Meta(extra={"words": words, "covers": covers})


def not_done(null: str = "", false: str = "", empty: str = "", **others: tuple[Any, ...]) -> NotDone:
    """By the value that asks for nothing, besides null: only null, `false`, an empty list, others."""
    groups: tuple[tuple[str, tuple[Any, ...]], ...] = ((null, ()), (false, (False,)), (empty, ([],)))
    return {name: values for names, values in groups for name in names.split()} | others


def given(field: str, **schema: Any) -> Schema:
    """A rule: the field is there, and such."""
    return {"properties": {field: schema}, "required": [field]}


def either(*ways: Schema) -> Schema:
    """A rule: one of these at least."""
    return {"anyOf": list(ways)}


def unasked(field: str, *values: Any) -> Schema:
    """A rule: the field is not there, null, or one of these."""
    return {"properties": {field: {"enum": [*values, None]}}}


def only_with(rule: Schema, field: str, *values: Any) -> Schema:
    """A rule: the field asks for something only where `rule` holds; null and `values` ask for nothing."""
    return either(rule, unasked(field, *values))


# --- types of fields

NonEmpty = Annotated[str, Meta(min_length=1)]
ModelName = Annotated[NonEmpty, Meta(extra_json_schema={"$ref": "#/components/schemas/Model"})]
AnyModel = Annotated[NonEmpty | None, Meta(description="Default: the first that is served.")]
TokenLimit = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
NumChoices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Stream = Annotated[bool, Meta(description="Server-sent events as the text comes.")]
Parallel = Annotated[bool, Meta(description="False: the answer ends after its first call.")]
Refused = Annotated[None, Meta(description="Not done here: other values are refused.")]
"""Of an object inside a body: taken as null only."""
Stops = Annotated[
    NonEmpty | Annotated[list[NonEmpty], Meta(max_length=MAX_STOPS)],
    mistake(f"must be a string or up to {MAX_STOPS} strings, none of them empty", "*"),
]
PART = mistake("must be an object with a type and a text", "*")
CONTENT = mistake("must be text, or a list of parts")
STREAM_ONLY = Meta(description="Goes with `stream` only.")
STREAM_RULE = only_with(given("stream", const=True), "stream_options")


class TextPart(Body, kw_only=True):
    """Text, where there is no other kind of part."""

    type: Literal["text"]
    text: str


Text = Annotated[str | list[Annotated[TextPart, PART]], CONTENT]
"""Parts' texts are joined. Images, audio and other parts are refused by name."""

# --- what all APIs that complete share

_UNASKED = "By default the model's own, if it has one."
_TEMPERATURE = "0 takes the likeliest token. Default: the model's."
_MIN_P = f"The least probability, as a share of the likeliest token's, of what is chosen. {_UNASKED}"
_REPETITION_PENALTY = (
    "Divides the logits above 0 of tokens that were there before, and multiplies those below. " + _UNASKED
)
_RECEIPT = "Who served the request, why, and where its time went, with the answer."
_POLICY = Meta(description="How the worker is chosen.", extra_json_schema={"enum": list(POLICIES)})


class Extension(Body):
    """What meshserve takes besides."""

    receipt: Annotated[bool, Meta(description=_RECEIPT)] = False
    policy: Annotated[str, _POLICY] | None = None


class SampledBody(Body, kw_only=True):
    """Sampling, the model, and meshserve's own field.

    A field that :class:`~meshserve.wire.generation.AskedSampling` has too is passed on by its name: see `sampled`.
    """

    model: ModelName
    min_tokens: Annotated[TokenCount, Meta(description="At most the limit of tokens.")] = 0
    temperature: Annotated[float, Meta(ge=0, le=2, description=_TEMPERATURE)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1, description=_UNASKED)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1, description=_MIN_P)] | None = None
    repetition_penalty: (
        Annotated[float, Meta(ge=0.01, le=10, description=_REPETITION_PENALTY)] | None
    ) = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    ignore_eos: Annotated[bool, Meta(description="Go on until the limit of tokens.")] = False
    meshserve: Extension | None = None


class LabelledBody(SampledBody, kw_only=True):
    """With OpenAI's fields for the statistics and caches of the server's owner: they change no answer."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
