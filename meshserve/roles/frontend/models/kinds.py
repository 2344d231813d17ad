"""The types of fields that several bodies have: of what they are, and how a value that is not is refused. Pure."""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from msgspec import Meta, defstruct

from meshserve.roles.frontend.models.common import MAX_TOOLS, Body, given, only_with
from meshserve.roles.frontend.models.fields import LEFT_OUT_BLOCKS, LEFT_OUT_ITEMS
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
Refused = Annotated[None, Meta(description="Not supported: other values are refused.")]
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

# --- what is left out of a conversation that another model began


class LeftOut(Body):
    """Ignored: of a server's own tools, or for the server that wrote it only."""

    @property
    def type(self) -> str:
        """What it says of its kind."""
        return str(self.__struct_config__.tag)


def _left_out(types: str) -> Any:
    """One of these types, whatever else such an object holds: a struct for each."""
    names = {"".join(map(str.title, name.split("_"))): name for name in types.split()}
    bases = (LeftOut,)
    return reduce(or_, [defstruct(name, (), bases=bases, tag_field="type", tag=tag) for name, tag in names.items()])


if TYPE_CHECKING:
    LeftOutBlock: TypeAlias = LeftOut
    LeftOutItem: TypeAlias = LeftOut
else:
    LeftOutBlock = _left_out(LEFT_OUT_BLOCKS)
    LeftOutItem = _left_out(LEFT_OUT_ITEMS)

# --- tools and formats

MAX_CALLS = 128
"""Of tools, in one message."""
TOOLS = Meta(
    max_length=MAX_TOOLS,
    description="No two functions may have the same name. Tools that are no functions are left out.",
)
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
        description="A JSON Schema. Where the tool is `strict` or must be called, arguments keep to it:"
        " then it is of type object, and what the model's engine cannot keep to is refused.",
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
