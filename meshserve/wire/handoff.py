"""Prefill tickets, claims for them, and what goes before KV blocks on the bulk path."""

import math
from typing import Annotated

from meshserve.errors import ProtocolError
from meshserve.wire.structs import Count, FrozenRow, Map, Meta, Milliseconds, Row, Tokens, field

MAX_RENEWED = 4096
"""Attempts that one renewal names."""

_Seconds = Annotated[float, Meta(ge=0)]
_Attempt = Annotated[int, Meta(ge=1)]


class Offer(Row):
    """What a claim would be answered with, sent along with the ticket: its prefill worker may begin at once, and claims with the result.

    The work stays with its decode worker, as with any ticket: the decode worker takes the blocks of the first claim, and a prefill worker
    that computed in vain finds it gone. (On one machine this took a third off the time of a prompt of 40 tokens: two messages until its KV
    is in, instead of four.)
    """

    number: Annotated[int, Meta(ge=1)]
    """Rises with each offer of its decode worker: one that comes again is an ordinary ticket."""
    first_block: Count
    tokens: Tokens
    """All that are to be prefilled, as in a granted claim."""
    came_s: float = -math.inf
    """On the clock of the prefill worker, which sets it; what a peer says here is dropped."""


class Ticket(Row):
    """A note that there is a prompt to prefill. It promises nothing: a worker that wants the work claims it."""

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
    """Which block a payload is."""

    index: int
    num_tokens: int
    digest: bytes


class BulkHeader(FrozenRow, frozen=True):
    """Before a run of payloads: whose attempt they belong to, and which blocks they are."""

    decode_peer: str
    """Incarnation that the blocks are meant for."""
    prefill_peer: str
    """Incarnation that sends them."""
    request_id: str
    attempt: int
    marks: tuple[BlockMark, ...]
    computed_ms: Milliseconds
    """What the worker's engine has taken so far, from the claim on, by its own clock."""
    layout: str = ""
    """Fingerprint of the KV layout that the blocks have."""
    prefix_hash: int = 0
    """Of all tokens up to the end of the last block here: blocks of other tokens, or of other places, have another."""


class Claim(Row):
    """A claim for a prompt; one that was begun on an offer brings its blocks."""

    request_id: str
    header: BulkHeader | None = None
    payloads: list[bytes] = field(default_factory=list)
    """Whether the blocks are what the header says is checked later."""
    waited_ms: Milliseconds = 0.0
    """Between the offer's coming and the prompt's beginning, at the prefill worker."""

    def _check(self) -> None:
        if self.header is not None and self.header.request_id != self.request_id:
            raise ProtocolError("malformed Claim: its blocks are of another request")


class Grant(Map):
    """The item with which a decode worker grants the first claim: the task."""

    tokens: Tokens
    """The prompt's, but for the last one."""
    attempt: _Attempt
    first_block: Count
    """The first that the decode worker lacks."""


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
    """The decode worker's engine has so many bytes of blocks of an attempt."""

    request_id: str
    attempt: int
    num_bytes: Count
