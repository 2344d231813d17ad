"""How the bodies of HTTP requests are declared, and what those of all APIs share. Pure.

A field's type, with its `Meta`, is the field's validation, its JSON Schema and its documentation. A field
with a default may be left out, and null is the same as leaving it out. Members that no field names are
ignored, as OpenAI-compatible servers do. `reading.py` reads these structs, `schemas.py` makes their schemas.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from msgspec import Struct

from meshserve.errors import InvalidRequest
from meshserve.roles.frontend.models.fields import Others
from meshserve.wire.completion import CompletionRequest

Fields = dict[str, Any]
Schema = dict[str, Any]
Rules = tuple[Schema, ...]

MAX_TOOLS = 128
MAX_SESSION_CHARACTERS = 256
"""Of the session that a request names: requests of one session like to go to one worker."""


class Body(Struct, kw_only=True, omit_defaults=True):
    """A JSON object in a request."""

    OTHERS: ClassVar[Others] = {}
    """Fields that are ignored or refused, as the table of fields says. A field that is ignored may be one of
    the struct, which then says its type."""
    LEAVES_OUT: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Lists of which objects of other types than these are ignored; the first is that of an object without one."""
    GOES_WITH: ClassVar[dict[str, str]] = {}
    """Fields that may ask for something only where another field is true."""
    RULES: ClassVar[Rules] = ()
    """Other rules between fields, for the schema; what makes a request of the body checks them."""
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
    ignored: list[str] = field(default_factory=list)
    """Names of what the request has and no engine does, for a header of the answer."""
    shows_receipt: bool = True
    """False: a receipt that comes with the answer's end is for the writer only."""
    created_s: int = 0
    """When the client asked, in seconds since 1970, of an answer that may be kept; 0: when the answer is begun."""


Parsed = tuple[CompletionRequest, ResponseOptions]


def invalid(param: str, words: str) -> InvalidRequest:
    """The error for a field that is at fault: "PARAM WORDS"."""
    return InvalidRequest(f"{param} {words}", param=param)


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
