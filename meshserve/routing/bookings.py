"""What a router has sent out and no worker has reported yet: pure."""

from dataclasses import dataclass

from meshserve.routing.candidates import Worker

BOOKING_TIMEOUT_S = 2.0

_MAX_REPORTED = 4096
"""Requests that a worker reported before this router heard of them; beyond it the oldest are forgotten."""


@dataclass(slots=True)
class _Booking:
    worker: Worker
    num_tokens: int
    num_blocks: int
    until_s: float


class Bookings:
    """Load that is on its way, so that two choices in one millisecond do not pile onto one worker."""

    def __init__(self) -> None:
        self._bookings: dict[tuple[str, str], _Booking] = {}
        self._reported: dict[tuple[str, str], float] = {}
        self._due_s = 0.0
        """Nothing is due before: to find the first of a dict whose first ones are deleted all the time takes a microsecond."""

    def book(self, worker: Worker, request_id: str, num_tokens: int, now_s: float, num_blocks: int = 0) -> None:
        """Count this request on the worker until it reports it itself, or for two seconds.

        `num_tokens` are those that it will compute, `num_blocks` those that it will hold.
        """
        key = worker.incarnation, request_id
        if key in self._bookings:
            self.end(*key)
        self._bookings[key] = _Booking(worker, num_tokens, num_blocks, now_s + BOOKING_TIMEOUT_S)
        worker.book(num_tokens, num_blocks)

    def hear(self, worker: Worker, request_id: str, num_tokens: int, now_s: float, num_blocks: int = 0) -> None:
        """Another router's booking: the same, unless the worker's report was faster than the other router's word."""
        self.expire(now_s)  # a router that nobody asks hears all the same
        if self._reported.pop((worker.incarnation, request_id), None) is None:
            self.book(worker, request_id, num_tokens, now_s, num_blocks)

    def end(self, incarnation: str, request_id: str) -> bool:
        """The worker's own report counts it, or it went elsewhere. False if it was not booked."""
        booking = self._bookings.pop((incarnation, request_id), None)
        if booking is None:
            return False
        booking.worker.unbook(booking.num_tokens, booking.num_blocks)
        return True

    def reported(self, incarnation: str, request_id: str, now_s: float) -> None:
        """The worker's own report counts it, even if this router has not heard yet who sent it there."""
        if not self.end(incarnation, request_id):
            self._reported[(incarnation, request_id)] = now_s + BOOKING_TIMEOUT_S
            if len(self._reported) > _MAX_REPORTED:
                del self._reported[next(iter(self._reported))]

    def expire(self, now_s: float) -> None:
        """Bookings are made in order of time, so the first that is not due ends the search."""
        if now_s < self._due_s:
            return
        due, self._due_s = [], now_s + BOOKING_TIMEOUT_S  # of what is booked from now on
        for key, booking in self._bookings.items():
            if booking.until_s > now_s:
                self._due_s = booking.until_s
                break
            due.append(key)
        for key in due:
            self.end(*key)
        while self._reported:
            first_s = next(iter(self._reported.values()))
            if first_s > now_s:
                self._due_s = min(self._due_s, first_s)
                break
            del self._reported[next(iter(self._reported))]

    def kept(self, incarnation: str, request_id: str) -> None:
        """This worker computes the prompt itself: what was booked on others for it is not going to be reported by them."""
        for key in [key for key in self._bookings if key[1] == request_id and key[0] != incarnation]:
            self.end(*key)

    def __len__(self) -> int:
        return len(self._bookings)
