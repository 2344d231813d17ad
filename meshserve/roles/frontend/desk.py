"""Where a request asks for its place in the mesh: between an HTTP request and the admission of its model."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from meshserve.config import ServeConfig
from meshserve.errors import InvalidRequest, MeshserveError, Overloaded, RateLimited
from meshserve.mesh.mesh import Mesh
from meshserve.roles.frontend.admission import Ticket
from meshserve.roles.frontend.asgi import Scope
from meshserve.roles.frontend.guard import CLIENT
from meshserve.roles.frontend.places import Places

TIMEOUT_HEADER = "x-request-timeout"
MIN_TIMEOUT_S = 0.001


def request_timeout_s(scope: Scope, most_s: float) -> float:
    """What the header asks for, and no more than `most_s`. Raises InvalidRequest that names it."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-timeout"), None)
    if given is None:
        return most_s
    try:
        asked_s = float(given) if b"_" not in given else math.nan  # Python's own way to write numbers
    except ValueError:
        asked_s = math.nan
    if not MIN_TIMEOUT_S <= asked_s < math.inf:
        raise InvalidRequest(f"{TIMEOUT_HEADER} must be a number of seconds, {MIN_TIMEOUT_S} at least", param=TIMEOUT_HEADER)
    return min(asked_s, most_s)


class Waiting(Protocol):
    """What waits for the answer, as far as the desk knows it."""

    on_over: Callable[[bool], None] | None

    def on_error(self, error: MeshserveError) -> None:
        """There will be no answer."""


class Desk:
    """Gives a request its place, and takes it back the moment that nothing more comes for it."""

    def __init__(self, mesh: Mesh, config: ServeConfig) -> None:
        self._mesh = mesh
        self._places = Places(mesh, config.front)

    def ask(self, scope: Scope, model: str, weight: int, deadline_s: float, answer: Waiting, pass_on: Callable[[], None]) -> None:
        """Have `pass_on` called when there are `weight` places: at once, or later. What it raises, and a refusal, go to the answer.

        Raises Overloaded or RateLimited, and what `pass_on` raises, if it is now.
        """
        ticket = Ticket(scope.get(CLIENT, ""), weight, time.monotonic(), deadline_s)
        answer.on_over = partial(self._places.leave, model, ticket)
        is_now = True

        def decided(error: MeshserveError | None) -> None:
            try:
                if error is not None:
                    self._mesh.counters.add("requests_refused")
                    raise error
                pass_on()
            except MeshserveError as problem:
                if is_now:
                    raise
                answer.on_error(problem)

        try:
            self._places.ask(model, ticket, decided)
        except (Overloaded, RateLimited):
            self._mesh.counters.add("requests_refused")
            raise
        is_now = False

    def close(self) -> None:
        """Nobody gets a place any more."""
        self._places.close()
