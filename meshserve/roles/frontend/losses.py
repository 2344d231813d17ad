"""The processors that one request has lost, and how often it may be started over. Pure."""

from typing import Any

from meshserve.errors import MeshserveError, ModelNotFound, NoWorker
from meshserve.observe.receipts import StartedOver
from meshserve.wire.completion import CompletionRequest
from meshserve.wire.structs import replace

_MAX_FRUITLESS = 4
"""Processors in a row that were lost before the answer got longer: the request itself may end
processors."""


class Losses:
    """The lost processors of one request."""

    __slots__ = (
        "_lost_s",
        "_moved",
        "_num_fruitless",
        "_num_migrations",
        "_waits_until_s",
        "blind",
        "told",
    )

    def __init__(self) -> None:
        self._num_fruitless = self._num_migrations = 0
        self._lost_s = self._waits_until_s = 0.0
        self._moved: dict[str, Any] | None = None
        """The continuation that is under way, as the receipt will show it."""
        self.blind: tuple[str, ...] = ()
        """Incarnations of processors that knew no worker: they have just started, or reach none."""
        self.told = StartedOver()
        """The part of the receipt about lost processors."""

    def allow_another(self, max_migrations: int, *, has_begun: bool) -> bool:
        """Whether the request may be started over once more; `has_begun`: a part of its answer was
        sent."""
        num_fruitless = self._num_fruitless + 1 if self._is_fruitless(has_begun) else 0
        return num_fruitless < _MAX_FRUITLESS and self._num_migrations + has_begun <= max_migrations

    def _is_fruitless(self, has_begun: bool) -> bool:
        """Whether the present processor has sent nothing new of the answer."""
        return not has_begun or self._moved is not None

    def may_wait(self, now_s: float, longest_s: float, deadline_s: float) -> bool:
        """Whether the request may wait for a processor: `longest_s` after each loss, but not beyond
        its deadline. Processors that knew no worker are asked again, as they may know one now."""
        self.blind = ()
        self._waits_until_s = self._waits_until_s or min(now_s + longest_s, deadline_s)
        return now_s < self._waits_until_s

    def is_too_early(self, error: MeshserveError, has_begun: bool) -> bool:
        """Whether a processor that has sent nothing new knows no worker, or no worker of the model,
        although a lost processor knew one."""
        if not isinstance(error, (NoWorker, ModelNotFound)) or not self._is_fruitless(has_begun):
            return False
        return any(lost["outcome"] != NoWorker.code for lost in self.told.attempts)

    def add(
        self,
        processor: str,
        error: MeshserveError,
        began_s: float,
        now_s: float,
        *,
        has_begun: bool,
    ) -> None:
        """One more processor (a name) is lost; it had the request since `began_s`."""
        self._num_fruitless = self._num_fruitless + 1 if self._is_fruitless(has_begun) else 0
        self._num_migrations += has_begun
        self._waits_until_s = 0.0
        attempt = {
            "peer": processor,
            "role": "processor",
            "outcome": error.code,
            "ms": round((now_s - began_s) * 1000, 3),
        }
        self.told.attempts.append(attempt)
        if has_begun and self._moved is None:  # else the pause has begun already
            self._lost_s, self._moved = (
                now_s,
                {"role": "processor", "from": processor, "outcome": error.code},
            )

    def went_on(self, processor: str, now_s: float) -> None:
        """The processor of this name sent something new."""
        if self._moved is not None:
            moved = {
                **self._moved,
                "to": processor,
                "pause_ms": round((now_s - self._lost_s) * 1000, 3),
            }
            self.told.continuations.append(moved)
            self._moved = None

    def renamed(
        self, request: CompletionRequest, name: str, *, is_given: bool
    ) -> CompletionRequest:
        """The request for the next processor; `is_given`: a part of its answer is kept.

        The answer to it then continues that part, as equal seeds give equal answers.
        """
        self.told.name = name
        # set only if a part is kept: older processors do not know the field
        origin = (request.origin or request.request_id) if is_given else ""
        return replace(request, request_id=name, origin=origin)
