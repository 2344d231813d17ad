"""A stream for which nothing comes shows that it lives, so that no proxy and no client takes it for
dead.
"""

from meshserve.mesh.calls import OutgoingCall
from meshserve.roles.frontend.completions import Completions
from meshserve.roles.frontend.http.connection import Connection
from meshserve.roles.frontend.http.connections import SWEEP_S

HEAD_BY_S = 5.0
"""After its admission the head of a stream is sent, whatever becomes of the request. Lower turns
late refusals, which clients know by their status, into errors in a stream; higher is cut off by
proxies that wait for less."""


class Pauses:
    """Finds pauses that are too long, by looking at each sweep: tokens pay for no clock. Pure."""

    def __init__(self, ping_s: float, sweep_s: float) -> None:
        """The longest pause between two writes once the head is sent, 0 for any; and the time
        between two looks.
        """
        self._ping_s, self._sweep_s = ping_s, sweep_s
        self._num_written = -1
        self._since_s = 0.0

    def is_due(self, now_s: float, num_written: int, *, has_head: bool) -> bool:
        """Whether it is time to write something. `num_written` counts the writes so far."""
        if num_written != self._num_written:
            self._num_written, self._since_s = num_written, now_s
            return False
        longest_s = self._ping_s if has_head else min(self._ping_s or HEAD_BY_S, HEAD_BY_S)
        # a write is noticed up to one sweep late, and the next look comes one sweep later
        return longest_s > 0 and now_s - self._since_s + 2 * self._sweep_s >= longest_s


class Liveness:
    """Of one stream that was admitted. Made for those that a sweep meets, so that short ones pay
    nothing.
    """

    def __init__(self, completions: Completions) -> None:
        self._under_way = completions.under_way
        self._pauses = Pauses(completions.config.frontend.stream_ping_s, SWEEP_S)
        self._is_first_look = True
        self._is_asking = False

    def look(
        self,
        now_s: float,
        connection: Connection,
        call: OutgoingCall | None,
        request_id: str,
        headers: bytes,
        ping: bytes,
    ) -> None:
        """A sweep passes. The response's head has `headers`; `ping` says that the stream lives, and
        nothing else.
        """
        is_first, self._is_first_look = self._is_first_look, False
        if self._pauses.is_due(now_s, connection.num_written, has_head=connection.is_started):
            _show(connection, headers, ping)
        elif not (is_first or call is None or connection.is_started or self._is_asking):
            # not at the first look: the request may have been admitted a moment ago
            connection.run(self._begin_if_taken(connection, call.peer, request_id, headers, ping))

    async def _begin_if_taken(
        self, connection: Connection, processor: str, request_id: str, headers: bytes, ping: bytes
    ) -> None:
        """Send the head once a worker has the request: what fails before that is told by an HTTP
        status.
        """
        request = connection.request
        self._is_asking = True
        is_taken = await self._under_way.is_taken(processor, request_id)
        self._is_asking = False
        if is_taken and connection.request is request and not connection.is_started:
            _show(connection, headers, ping)


def _show(connection: Connection, headers: bytes, ping: bytes) -> None:
    """The head, if it is still to be sent, and a ping. A client that takes nothing in gets no more
    of them.
    """
    if connection.is_stuck:
        return
    if not connection.is_started:
        connection.start(200, headers)
    connection.write(ping, is_last=False)
