"""Prefill tickets, claims for them, and what goes before KV blocks on the bulk path."""

import math
from collections.abc import Collection
from typing import Annotated

from meshserve.errors import ProtocolError
from meshserve.wire.structs import Count, FrozenRow, Map, Meta, Milliseconds, Row, Tokens, field

MAX_RENEWED = 4096
"""Attempts that one renewal names."""

_Seconds = Annotated[float, Meta(ge=0)]
_Attempt = Annotated[int, Meta(ge=1)]


class Offer(Row):
    """The task, sent along with its ticket: the prefill worker may begin at once, and claims with the result.

    The decode worker owns the task, as with any ticket, and takes the blocks of the first claim. (Measured on
    one machine: a third less time for a prompt of 40 tokens, whose KV takes two messages instead of four.)
    """

    number: Annotated[int, Meta(ge=1)]
    """Rises with each offer of its decode worker: an offer that comes again is an ordinary ticket."""
    first_block: Count
    tokens: Tokens
    """All that are to be prefilled, as in a granted claim."""
    came_s: float = -math.inf
    """On the clock of the prefill worker, which sets it; a value from a peer is dropped."""


class Ticket(Row):
    """Announces a prompt to prefill. It assigns nothing: a prefill worker claims the task."""

    decode_peer: str
    """Incarnation of the decode worker that owns the task."""
    request_id: str
    attempt: _Attempt
    num_tokens: Count
    offer: Offer | None = None

    def _check(self) -> None:
        if self.offer is not None:
            self.offer.came_s = -math.inf


class BlockMark(FrozenRow, frozen=True):
    """Which block a payload is, or which piece of one: a block that is longer than a frame comes in pieces, in order."""

    index: int
    num_tokens: int
    """In the whole block."""
    digest: bytes
    """Of this payload."""
    offset: Count = 0
    """Bytes of the block before this piece."""
    left_bytes: Count = 0
    """Bytes of the block after this piece; 0: the block ends with it."""


class BulkHeader(FrozenRow, frozen=True):
    """Before a run of payloads: whose attempt they belong to, and which blocks they are."""

    decode_peer: str
    """Incarnation that the blocks are meant for."""
    prefill_peer: str
    """Incarnation that sends them."""
    request_id: str
    attempt: int
    marks: tuple[BlockMark, ...]
    """One for each payload."""
    computed_ms: Milliseconds
    """Time of the prefill worker's engine since the claim, by its own clock."""
    layout: str = ""
    """Fingerprint of the KV layout that the blocks have."""
    prefix_hash: int = 0
    """Of all tokens up to the end of the last block here: other tokens or other places have another hash."""

    @property
    def num_blocks(self) -> int:
        """Blocks of which there is a part here."""
        return len({mark.index for mark in self.marks})

    @property
    def num_ended(self) -> int:
        """Blocks that end here."""
        return num_ended(self.marks)


def num_ended(marks: Collection[BlockMark]) -> int:
    """Blocks that end with one of these pieces."""
    return sum([not mark.left_bytes for mark in marks])


class Claim(Row):
    """A claim for a prompt; the claim of a prompt that was computed on an offer brings its blocks."""

    request_id: str
    header: BulkHeader | None = None
    payloads: list[bytes] = field(default_factory=list)
    """Compared with the header when they are taken in."""
    waited_ms: Milliseconds = 0.0
    """From the arrival of the offer to the beginning of the prompt, at the prefill worker."""
    resumes: Count = 0
    """The attempt of this prefill worker whose blocks were lost with their connection: the claimed one
    follows it. 0: none."""

    def _check(self) -> None:
        if self.header is not None and self.header.request_id != self.request_id:
            raise ProtocolError("malformed Claim: its blocks are of another request")


class HeldPart(Row):
    """The first bytes of a block, which the decode worker has from the same prefill worker."""

    num_bytes: Annotated[int, Meta(ge=1)]
    digest: bytes
    """Of these bytes: a prefill worker whose block begins otherwise sends the whole block."""


class Grant(Map):
    """A decode worker grants the first claim with this item: the task."""

    tokens: Tokens
    """The prompt's, but for the last one."""
    attempt: _Attempt
    first_block: Count
    """The first that the decode worker lacks."""
    held: HeldPart | None = None
    """What the decode worker has of that block."""


class NamedAttempt(Row):
    """An attempt that a prefill worker runs."""

    request_id: str
    attempt: int
    overdue_s: _Seconds
    """How long its next sign of progress is overdue."""


class Renewal(Row):
    """The attempts of one decode worker that a prefill worker runs: their leases go on."""

    attempts: Annotated[list[NamedAttempt], Meta(max_length=MAX_RENEWED)]


class Acknowledgement(Row):
    """`num_bytes` of an attempt came, and its decode worker holds none of them up: the engine has taken in the blocks that
    they end, or the attempt was over, and they were refused."""

    request_id: str
    attempt: int
    num_bytes: Count
