"""Tickets, and the bounded list of them that a prefill worker keeps: pure."""

import math
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from meshserve.errors import ProtocolError
from meshserve.wire.generation import pack_tokens, unpack_tokens


@dataclass(slots=True)
class Offer:
    """What a claim would be answered with, sent along with the ticket: who gets it may begin at once, and claims with the result.

    The work stays with its decode worker, as with any ticket: it takes the blocks of the first claim, and whoever computed in vain finds
    it gone. (On one machine this took a third off the time of a prompt of 40 tokens: two messages until its KV is in, instead of four.)
    """

    number: int
    """Rises with each offer of its decode worker: one that comes again is an ordinary ticket."""
    first_block: int
    tokens: "array[int]"
    """All that are to be prefilled, as in a granted claim."""
    came_s: float = -math.inf
    """On the clock of the prefill worker, which sets it."""

    def to_wire(self) -> list[Any]:
        """Plain data for :meth:`from_wire`."""
        return [self.number, self.first_block, pack_tokens(self.tokens)]

    @classmethod
    def from_wire(cls, data: Any) -> "Offer":
        """Raises ProtocolError for anything but an offer."""
        if not isinstance(data, list) or [type(part) for part in data] != [int, int, bytes] or data[0] < 1 or data[1] < 0:
            raise ProtocolError("malformed offer")
        return cls(data[0], data[1], unpack_tokens(data[2]))


@dataclass(frozen=True, slots=True)
class Ticket:
    """A note that there is a prompt to prefill. It promises nothing: who wants the work claims it."""

    decode_peer: str
    """Incarnation of the decode worker that owns the task."""
    request_id: str
    attempt: int
    num_tokens: int
    offer: Offer | None = None

    def to_wire(self) -> list[Any]:
        """Plain data for :meth:`from_wire`."""
        plain = [self.decode_peer, self.request_id, self.attempt, self.num_tokens]
        return plain if self.offer is None else [*plain, self.offer.to_wire()]

    @classmethod
    def from_wire(cls, data: Any) -> "Ticket":
        """Raises ProtocolError for anything but a ticket."""
        if not isinstance(data, list) or [type(part) for part in data[:4]] != [str, str, int, int] or data[2] < 1 or data[3] < 0:
            raise ProtocolError("malformed ticket")
        if len(data) > 5:
            raise ProtocolError("malformed ticket")
        return cls(data[0], data[1], data[2], data[3], Offer.from_wire(data[4]) if len(data) == 5 else None)


class TicketList:
    """Unclaimed tickets, one per request. A newer attempt's replaces an older one's.

    Decode workers take turns by tokens served: next is the one that got least, so that one with a thousand long prompts cannot
    keep another with one prompt waiting behind them all. (Start-time fair queueing, Goyal et al., SIGCOMM 1996; who comes back after a
    pause starts level with the others, not with a credit.) Within one decode worker's tickets, those of a second or later attempt come
    first: they have waited once already. All else is in order of arrival.
    """

    def __init__(self, max_tickets: int) -> None:
        self._max = max_tickets
        self._tickets: dict[str, OrderedDict[str, Ticket]] = {}
        self._num = 0
        self._served_tokens: dict[str, int] = {}
        self._level_tokens = 0

    def __len__(self) -> int:
        return self._num

    def add(self, ticket: Ticket) -> bool:
        """False if the list is full: the sender's hedging finds another worker. An older attempt's ticket is passed over."""
        own = self._tickets.get(ticket.decode_peer)
        known = own.get(ticket.request_id) if own is not None else None
        if known is not None and known.attempt >= ticket.attempt:
            return True
        if known is None and self._num >= self._max:
            return False
        self.strike(ticket.decode_peer, ticket.request_id)
        self._append(ticket)
        return True

    def _append(self, ticket: Ticket) -> None:
        own = self._tickets.get(ticket.decode_peer)
        if own is None:
            own = self._tickets[ticket.decode_peer] = OrderedDict()
            self._served_tokens[ticket.decode_peer] = max(self._level_tokens, self._served_tokens.get(ticket.decode_peer, 0))
        own[ticket.request_id] = ticket
        if ticket.attempt > 1:
            for waiting in [found.request_id for found in own.values() if found.attempt == 1]:
                own.move_to_end(waiting)
        self._num += 1

    def strike(self, decode_peer: str, request_id: str) -> bool:
        """This one is void. False if it is not here (any more)."""
        own = self._tickets.get(decode_peer)
        if own is None or own.pop(request_id, None) is None:
            return False
        self._num -= 1
        if not own:
            del self._tickets[decode_peer]
        return True

    def strike_all_of(self, decode_peer: str) -> None:
        """The decode worker is gone, and its tasks with it."""
        self._num -= len(self._tickets.pop(decode_peer, ()))
        self._served_tokens.pop(decode_peer, None)

    def peek(self) -> Ticket | None:
        """The next one to claim, if any."""
        if not self._tickets:
            return None
        decode_peer = min(self._tickets, key=self._served_tokens.__getitem__)
        return next(iter(self._tickets[decode_peer].values()))

    def take(self) -> Ticket | None:
        """The next one to claim, off the list."""
        ticket = self.peek()
        if ticket is not None:
            self._level_tokens = max(self._level_tokens, self._served_tokens[ticket.decode_peer])
            self.strike(ticket.decode_peer, ticket.request_id)
        return ticket

    def serve(self, decode_peer: str, num_tokens: int) -> None:
        """A claim was granted: its decode worker is served so much more."""
        if decode_peer in self._served_tokens:
            self._served_tokens[decode_peer] += num_tokens
