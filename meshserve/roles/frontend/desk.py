"""Where a request asks for its place in the mesh: between an HTTP request and the admission of its model."""

import math
import time
from functools import partial
from typing import Protocol

from meshserve.config import ServeConfig
from meshserve.errors import InvalidRequest, MeshserveError, Overloaded, RateLimited
from meshserve.mesh.mesh import Mesh
from meshserve.roles.frontend.admission import Ticket
from meshserve.roles.frontend.places import Places
from meshserve.wire.completion import CompletionRequest

TIMEOUT_HEADER = "x-request-timeout"
MIN_TIMEOUT_S = 0.001


def request_timeout_s(given: bytes | None, most_s: float) -> float:
    """What the header asks for, and no more than `most_s`. Raises InvalidRequest that names it."""
    if given is None:
        return most_s
    try:
        asked_s = float(given) if b"_" not in given else math.nan  # Python's own way to write numbers
    except ValueError:
        asked_s = math.nan
    if not MIN_TIMEOUT_S <= asked_s < math.inf:
        raise InvalidRequest(f"{TIMEOUT_HEADER} must be a number of seconds, {MIN_TIMEOUT_S} at least", param=TIMEOUT_HEADER)
    return min(asked_s, most_s)


class Applicant(Protocol):
    """Who asks for a place, as far as the desk knows it: an exchange."""

    request: CompletionRequest | None
    client: str
    """Whose request it is: clients share the mesh evenly."""
    deadline_s: float
    ticket: Ticket | None

    def placed(self) -> None:
        """There is a place."""

    def on_error(self, error: MeshserveError) -> None:
        """There will be none."""


class Desk:
    """Gives a request its place, and takes it back the moment that nothing more comes for it."""

    def __init__(self, mesh: Mesh, config: ServeConfig) -> None:
        self._mesh = mesh
        self._places = Places(mesh, config.front)
        self.leave = self._places.leave

    def ask(self, applicant: Applicant) -> None:
        """Call its `placed` when there are as many places as it has answers: at once, or later, or else its `on_error`.

        Raises Overloaded or RateLimited.
        """
        request = applicant.request
        assert request is not None
        ticket = applicant.ticket = Ticket(applicant.client, request.num_choices, time.monotonic(), applicant.deadline_s)
        try:
            if self._places.ask(request.model, ticket, partial(self._decided, applicant)):
                applicant.placed()
        except (Overloaded, RateLimited):
            self._mesh.counters.add("requests_refused")
            raise

    def _decided(self, applicant: Applicant, error: MeshserveError | None) -> None:
        """Of one that had to wait."""
        if error is None:
            applicant.placed()
        else:
            self._mesh.counters.add("requests_refused")
            applicant.on_error(error)

    def close(self) -> None:
        """Nobody gets a place any more."""
        self._places.close()
