"""Batches of messages on the call sockets.

One frame is a msgpack array of messages; a message is an array that starts with its kind. The DEALER side opens and cancels
streams and says hello; the ROUTER side answers. A frame that is anything else is refused whole.
"""

from typing import Any

import msgpack

from meshserve.errors import ProtocolError

HELLO, WELCOME, REFUSED, GOODBYE, PING, PONG, CREDIT, RESET = 0, 1, 2, 3, 4, 5, 6, 7
OPEN, ITEM, END, ERROR, CANCEL = 10, 11, 12, 13, 14

Envelope = list[Any]
"""Its kind, then values as in :data:`_SHAPES`; bodies, items and answers are plain data of :mod:`meshserve.wire.messages`."""

# What follows the kind. `object` is checked where it is used.
_SHAPES: dict[int, tuple[type, ...]] = {
    HELLO: (dict,),
    WELCOME: (dict,),
    REFUSED: (dict,),
    GOODBYE: (str,),
    PING: (int,),
    PONG: (int,),
    CREDIT: (int,),
    RESET: (str,),  # why: this connection is not known here (any more), its owner must make a new one
    OPEN: (int, str, int, object),  # stream, method, milliseconds to the deadline, body
    ITEM: (int, object),
    END: (int, object),
    ERROR: (int, dict),
    CANCEL: (int,),
}
_COMMON = ITEM, END
"""Nearly all messages: of one shape."""

MAX_MESSAGES_PER_FRAME = 65_536
_MAX_LENGTH = 16 * 1024 * 1024

_packer = msgpack.Packer(use_bin_type=True, autoreset=True)


def pack(messages: list[Envelope]) -> bytes:
    """One frame for these messages. Raises TypeError for anything but plain data: that is our own misuse."""
    data: bytes = _packer.pack(messages)
    return data


def unpack(data: bytes | memoryview) -> list[Envelope]:
    """The messages of one frame, their shapes checked. Raises ProtocolError for anything else, whatever the bytes are."""
    try:
        messages = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            use_list=True,
            max_str_len=_MAX_LENGTH,
            max_bin_len=_MAX_LENGTH,
            max_array_len=MAX_MESSAGES_PER_FRAME,
            max_map_len=MAX_MESSAGES_PER_FRAME,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises many kinds for hostile bytes: ValueError, OverflowError, RecursionError, TypeError ...
        raise ProtocolError(f"not msgpack: {type(error).__name__}") from error
    if type(messages) is not list or not messages:
        raise ProtocolError("a frame is an array of messages")
    for message in messages:
        if type(message) is not list or not message:
            raise ProtocolError("a message is an array")
        kind = message[0]
        is_common = kind in _COMMON and type(kind) is int  # without another call
        if not is_common or len(message) != 3 or type(message[1]) is not int:
            _check(kind, message)
    return messages


def _check(kind: Any, message: Envelope) -> None:
    shape = _SHAPES.get(kind) if type(kind) is int else None
    if shape is None or len(message) != len(shape) + 1:
        raise ProtocolError("a message of unknown kind or length")
    for value, expected in zip(message[1:], shape, strict=True):
        if expected is not object and type(value) is not expected:
            raise ProtocolError("a message with a mistyped field")


def pack_body(body: Any) -> bytes:
    """Plain data outside a batch: tickets and the headers of bulk frames."""
    data: bytes = _packer.pack(body)
    return data


def unpack_body(data: bytes | memoryview, max_bytes: int = 65_536) -> Any:
    """The inverse of :func:`pack_body`. Raises ProtocolError for malformed or longer data."""
    if len(data) > max_bytes:
        raise ProtocolError("a header that is too long")
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
    except Exception as error:  # as in unpack
        raise ProtocolError(f"not msgpack: {type(error).__name__}") from error
