"""The types of fields that several bodies have: of what they are, and how a value that is not is refused. Pure."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from meshserve.roles.frontend.models.common import Body, given, only_with
from meshserve.wire.completion import MAX_CHOICES, MAX_STOPS
from meshserve.wire.generation import MAX_COUNT, MAX_LOGPROBS


def mistake(words: str, *covers: str) -> Meta:
    """How a value that is not valid is refused: "PARAM WORDS".

    `covers` are the places inside, as `.type`, whose mistakes are reported as the value's own; `*` is all.
    """
    return Meta(extra={"words": words, "covers": covers})


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


class TextPart(Body, kw_only=True):
    """Text, where there is no other kind of part."""

    type: Literal["text"]
    text: str


Text = Annotated[str | list[Annotated[TextPart, PART]], CONTENT]
"""Parts' texts are joined. Images, audio and other parts are refused by name."""

# --- tools and formats

MAX_CALLS = 128
"""Of tools, in one message."""
TOOLS = Meta(max_length=128, description="No two may have the same name.")
HAS_TOOLS = given("tools", type="array", minItems=1)
TOOLS_RULE = only_with(HAS_TOOLS, "tool_choice", "none", "auto")
CHOICE = Meta(
    description="`required`, or a function of the tools: it is called. Without tools, none can be required.",
    extra={
        "words": "must be 'none', 'auto', 'required' or an object that names a function",
        "covers": (".type",),
    },
)
FunctionName = Annotated[
    str,
    Meta(pattern=r"^[a-zA-Z0-9_-]{1,128}$"),
    mistake("must be up to 128 letters, digits, dashes and underscores"),
]
_STRICT = (
    "Arguments are valid under their schema: what the model writes counts as a call only if they are."
)
Parameters = Annotated[
    dict[str, Any],
    Meta(
        description="A JSON Schema of type object. What the model's engine cannot keep to is refused.",
        extra_json_schema={"properties": {"type": {"const": "object"}}},
    ),
]


class Described(Body, kw_only=True):
    """A function that a model may call."""

    name: FunctionName
    description: str | None = None
    strict: Annotated[bool, Meta(description=_STRICT)] = False


class FreeText(Body, tag_field="type", tag="text"):
    """Any text."""


class JsonObject(Body, tag_field="type", tag="json_object"):
    """The text is a JSON object."""


class NamedSchema(Body, kw_only=True):
    """The text is a document that is valid under this JSON Schema."""

    name: NonEmpty
    description: str | None = None
    strict: bool = False
    schema: dict[str, Any]
