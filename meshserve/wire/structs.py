"""Messages of the mesh as typed structs. MessagePack holds plain data; a struct's types say what the data must be, with bounds.

Plain data is what :mod:`meshserve.wire.frames` packs: None, bool, int, float, str, bytes, lists, and maps with text as keys.
"""

import re
import sys
from array import array
from typing import TYPE_CHECKING, Annotated, Any, Self

import msgspec
from msgspec import Meta, field
from msgspec.structs import asdict, replace

from meshserve.errors import ProtocolError, UnknownField

__all__ = ["Meta", "asdict", "field", "replace"]
"""Of msgspec, for other modules: only this folder and the models of the HTTP APIs import it."""

if TYPE_CHECKING:
    Tokens = array[int]
else:
    Tokens = array
"""Token ids, of typecode "I": 4 bytes a token, and one object that the garbage collector does not walk."""

MAX_TOKENS_ON_WIRE = 4_194_304
_MOST_ERROR_CHARACTERS = 200
_UNKNOWN_FIELD = re.compile(r"unknown field `(\w{1,64})`")
"""In the words of `msgspec`, which has one class for all that is malformed."""
MAX_FIGURE = 2**40
"""Beyond any real load. Sums and products of such figures still fit on the wire, where an integer has 64 bits."""

Figure = Annotated[int, Meta(ge=0, lt=MAX_FIGURE)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
MAX_MS = 1e9
Milliseconds = Annotated[float, Meta(ge=0, le=MAX_MS)]
NonEmpty = Annotated[str, Meta(min_length=1)]


class Message:
    """Base of all messages."""

    __slots__ = ()

    def to_wire(self) -> Any:
        """Plain data for :meth:`from_wire`."""
        return msgspec.to_builtins(self, builtin_types=(bytes,), enc_hook=_pack)

    @classmethod
    def from_wire(cls, data: Any) -> Self:
        """Read plain data; a message from this very peer is given back as it is.

        Raises ProtocolError, which names the place, for missing, mistyped and outsized fields.
        """
        found: Self = read(cls, data)
        return found

    def _check(self) -> None:
        """Raises ProtocolError for fields that do not go together. :func:`read` calls it for the outermost
        message, which calls the checks of the messages in it."""


class Map(Message, msgspec.Struct, omit_defaults=True):
    """A message that is a map on the wire. Fields with their default value are left out. Unknown fields are ignored, unless the class
    forbids them."""


class FrozenMap(Message, msgspec.Struct, omit_defaults=True, frozen=True):
    """A :class:`Map` that is never changed."""


class Row(Message, msgspec.Struct, array_like=True):
    """A message that is an array on the wire: its fields in order. Later versions may append some, which are ignored here."""


class FrozenRow(Message, msgspec.Struct, array_like=True, frozen=True):
    """A :class:`Row` that is never changed."""


def read(kind: Any, data: Any) -> Any:
    """Read plain data as this type, which is a struct or a type of plain data. Raises ProtocolError, as :meth:`Message.from_wire`,
    which is an UnknownField if a field is unknown to a struct that forbids such fields."""
    if isinstance(data, Message):  # from this very peer
        return data
    try:
        found = msgspec.convert(data, kind, builtin_types=(bytes,), dec_hook=_unpack)
    except msgspec.ValidationError as error:
        if (unknown := _UNKNOWN_FIELD.search(str(error))) is not None:
            raise UnknownField(f"a peer of an older version does not know {unknown[1]}: upgrade meshserve there") from error
        # cut, since the library repeats what it found
        raise ProtocolError(f"malformed {kind.__name__ if isinstance(kind, type) else 'data'}: {error}"[:_MOST_ERROR_CHARACTERS]) from error
    if isinstance(found, Message):
        found._check()
    return found


def plain(message: Any) -> Any:
    """Plain data for :func:`read`."""
    return message.to_wire() if isinstance(message, Message) else message


def pack_tokens(tokens: Tokens) -> bytes:
    """Token ids as little-endian 32-bit words: a hundred times faster than a list of integers, and of fixed size."""
    if sys.byteorder == "big":
        tokens = array("I", tokens)
        tokens.byteswap()
    return tokens.tobytes()


def unpack_tokens(data: Any) -> Tokens:
    """The inverse of :func:`pack_tokens`. Raises ProtocolError for anything else."""
    if not isinstance(data, bytes) or len(data) % 4 or len(data) > 4 * MAX_TOKENS_ON_WIRE:
        raise ProtocolError("token ids are 32-bit words")
    tokens = array("I", data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def _pack(value: Any) -> Any:
    if isinstance(value, array):
        return pack_tokens(value)
    raise TypeError(f"{type(value).__name__} is not for the wire")


def _unpack(kind: type, data: Any) -> Any:
    assert kind is array, "token ids are the only type of our own"
    return unpack_tokens(data)


# --- how deep plain data goes

MAX_NESTING = 64
"""Levels of maps and lists in tools, schemas and arguments: code that recurses over them has a bounded stack."""


def is_shallow(value: Any, max_levels: int = MAX_NESTING) -> bool:
    """Whether maps and lists are in each other no deeper than this. Takes no stack itself."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(max_levels):
        children = (child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent))
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return True
    return False
