"""Tickets, and the bounded list of them that a prefill worker keeps: pure."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from meshserve.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Ticket:
    """A note that there is a prompt to prefill. It promises nothing: who wants the work claims it."""

    decode_peer: str
    """Incarnation of the decode worker that owns the task."""
    request_id: str
    attempt: int
    num_tokens: int

    def to_wire(self) -> list[Any]:
        """Plain data for :meth:`from_wire`."""
        return [self.decode_peer, self.request_id, self.attempt, self.num_tokens]

    @classmethod
    def from_wire(cls, data: Any) -> "Ticket":
        """Raises ProtocolError for anything but a ticket."""
        if not isinstance(data, list) or [type(part) for part in data] != [str, str, int, int]:
            raise ProtocolError("malformed ticket")
        return cls(*data)


class TicketList:
    """Unclaimed tickets in order of arrival, one per request. A newer attempt's replaces an older one's."""

    def __init__(self, max_tickets: int) -> None:
        self._max = max_tickets
        self._tickets: OrderedDict[tuple[str, str], Ticket] = OrderedDict()
        self.num_tokens = 0
        """Prompt tokens that the waiting tickets announce."""

    def __len__(self) -> int:
        return len(self._tickets)

    def add(self, ticket: Ticket) -> bool:
        """False if the list is full or the ticket is older than one that waits: the sender's hedging finds another worker."""
        key = (ticket.decode_peer, ticket.request_id)
        known = self._tickets.get(key)
        if known is not None and known.attempt >= ticket.attempt:
            return True
        if known is None and len(self._tickets) >= self._max:
            return False
        self.strike(*key)
        self._tickets[key] = ticket
        self.num_tokens += ticket.num_tokens
        return True

    def strike(self, decode_peer: str, request_id: str) -> bool:
        """This one is void. False if it is not here (any more)."""
        ticket = self._tickets.pop((decode_peer, request_id), None)
        if ticket is not None:
            self.num_tokens -= ticket.num_tokens
        return ticket is not None

    def strike_all_of(self, decode_peer: str) -> None:
        """The decode worker is gone, and its tasks with it."""
        for _, request_id in [key for key in self._tickets if key[0] == decode_peer]:
            self.strike(decode_peer, request_id)

    def take(self) -> Ticket | None:
        """The next one to claim: the oldest."""
        if not self._tickets:
            return None
        key = next(iter(self._tickets))
        ticket = self._tickets[key]
        self.strike(*key)
        return ticket
