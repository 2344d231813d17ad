"""Pings in streams without new text, so that no proxy and no client takes the stream for dead."""

from meshserve.mesh.calls import OutgoingCall
from meshserve.roles.frontend.completions import Completions
from meshserve.roles.frontend.http.connection import Connection
from meshserve.roles.frontend.http.connections import SWEEP_S

HEAD_BY_S = 5.0
"""Time from admission until the head of a stream is sent in any case. Lower turns late refusals,
which clients know by their status, into errors in a stream; higher exceeds the read timeout of some
proxies."""


class Pauses:
    """Finds long pauses by a look at each sweep, so that no token reads a clock. Pure."""

    def __init__(self, ping_s: float, sweep_s: float) -> None:
        """`ping_s` is the longest pause between two writes after the head, 0 for no limit;
        `sweep_s` is the time between two looks.
        """
        self._ping_s, self._sweep_s = ping_s, sweep_s
        self._num_written = -1
        self._since_s = 0.0

    def is_due(self, now_s: float, num_written: int, *, has_head: bool) -> bool:
        """Whether a ping is due. `num_written` counts the writes so far."""
        if num_written != self._num_written:
            self._num_written, self._since_s = num_written, now_s
            return False
        longest_s = self._ping_s if has_head else min(self._ping_s or HEAD_BY_S, HEAD_BY_S)
        # a write is noticed up to one sweep late, and the next look comes one sweep later
        return longest_s > 0 and now_s - self._since_s + 2 * self._sweep_s >= longest_s


class Liveness:
    """Sends the pings of one admitted stream. Created at the first sweep, so that short streams pay
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
        """Look at the stream at a sweep. The response's head has `headers`; `ping` is a part of the
        body without text.
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
        """Send the head once a worker has the request: a failure before that has an HTTP status.
        """
        request = connection.request
        self._is_asking = True
        is_taken = await self._under_way.is_taken(processor, request_id)
        self._is_asking = False
        if is_taken and connection.request is request and not connection.is_started:
            _show(connection, headers, ping)


def _show(connection: Connection, headers: bytes, ping: bytes) -> None:
    """Send the head, if it was not sent, and a ping. A client that does not read gets no more
    pings.
    """
    if connection.is_stuck:
        return
    if not connection.is_started:
        connection.start(200, headers)
    connection.write(ping, is_last=False)
