"""The bounded list of tickets that a prefill worker keeps: pure."""

from collections import OrderedDict

from meshserve.wire.handoff import Ticket


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
