"""Responses that processors keep, so that later requests can refer to them: as they are kept, and how they are asked for."""

from itertools import groupby
from typing import Annotated, Any

from meshserve.wire.completion import MAX_MESSAGES, Ending, Owner, TextItem
from meshserve.wire.frames import pack_body, unpack_body
from meshserve.wire.structs import Count, Map, Meta, Row

MAX_KEPT_BYTES = 8 * 1024 * 1024
"""Of one response with its conversation. Longer ones are not kept: with other messages they have to fit into one frame."""

_PLAIN = -1


class KeptName(Row):
    """A response that somebody asks for."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    """The mesh's name of the request, without its dash: what the ids of the response and of its items are made of."""
    owner: Owner = b""
    """Of who asks: what others own is not found."""


class KeptResponse(Map):
    """An answer, with all that it was an answer to."""

    name: str
    """The mesh's name of the request, as the frontend gave it first."""
    model: str
    created_s: Count
    """When the client asked, in seconds since 1970."""
    echoed: str
    """JSON: what the API repeats of its request."""
    messages: Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES)]
    """The whole conversation, as in a CompletionRequest, without instructions that were for this answer only."""
    items: list[Any]
    """Of the processor's stream."""
    ending: Ending

    def packed(self) -> bytes:
        """For :func:`unpacked`."""
        return pack_body(self.to_wire())


def unpacked(data: bytes) -> KeptResponse:
    """Raises ProtocolError for anything else than what `packed` made."""
    return KeptResponse.from_wire(unpack_body(data, MAX_KEPT_BYTES))


def joined(items: list[Any]) -> list[Any]:
    """The same text in fewer items: with one for each token it would take several times the memory."""
    found: list[Any] = []
    for run, members in groupby(items, _run_of):
        if run == _PLAIN:
            found.append("".join(members))
        elif run is None:
            found += members
        else:
            found.append(TextItem(run, "".join([item.text for item in members])))
    return found


def _run_of(item: Any) -> int | None:
    """What may be joined with its like: plain text, or text of one choice. None: nothing of it may."""
    if isinstance(item, str):
        return _PLAIN
    return item.choice if isinstance(item, TextItem) and not item.logprobs else None
