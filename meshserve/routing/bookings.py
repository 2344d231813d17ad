"""What a router has sent out and no worker has reported yet: pure."""

from dataclasses import dataclass

from meshserve.routing.candidates import Worker

BOOKING_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class _Booking:
    worker: Worker
    num_tokens: int
    num_blocks: int
    until_s: float


class Bookings:
    """Load that is on its way, so that two choices in one millisecond do not pile onto one worker."""

    def __init__(self) -> None:
        self._bookings: dict[tuple[str, str], _Booking] = {}

    def book(self, worker: Worker, request_id: str, num_tokens: int, now_s: float, num_blocks: int = 0) -> None:
        """Count this request on the worker until it reports it itself, or for two seconds.

        `num_tokens` are those that it will compute, `num_blocks` those that it will hold.
        """
        self.end(worker.incarnation, request_id)
        self._bookings[(worker.incarnation, request_id)] = _Booking(worker, num_tokens, num_blocks, now_s + BOOKING_TIMEOUT_S)
        worker.book(num_tokens, num_blocks)

    def end(self, incarnation: str, request_id: str) -> None:
        """The worker's own report counts it, or it went elsewhere."""
        booking = self._bookings.pop((incarnation, request_id), None)
        if booking is not None:
            booking.worker.unbook(booking.num_tokens, booking.num_blocks)

    def expire(self, now_s: float) -> None:
        """Bookings are made in order of time, so the first that is not due ends the search."""
        due = []
        for key, booking in self._bookings.items():
            if booking.until_s > now_s:
                break
            due.append(key)
        for key in due:
            self.end(*key)

    def __len__(self) -> int:
        return len(self._bookings)
