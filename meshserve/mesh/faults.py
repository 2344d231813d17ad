"""Messages of members that no correct peer sends: a counter for each kind, and one warning with a count."""

import logging
import time

from meshserve.mesh.repeats import Repeats
from meshserve.telemetry import Counters, log_event, printable

_log = logging.getLogger(__name__)

FAULTS = {
    "end": "ended a sequence that was not at its end",
    "excess": "gave more tokens than were asked for",
    "order": "gave tokens that do not follow each other",
    "token": "gave a token that its model does not have, or log probabilities that are none",
    "item": "sent something that cannot be read in place of tokens",
    "error": "reported an error that cannot be read",
    "report": "reported a state that cannot be",
    "stall": "lives, and made no progress on a request for too long",
}
"""Words for each kind of fault, which follow a peer's name. The counter of a kind is `faults_KIND`."""

_MAX_DETAIL = 200


class Faults:
    """Counts and logs the faults of all members. The request of a fault goes to another worker; the faulty peer stays a member."""

    def __init__(self, counters: Counters) -> None:
        self._counters, self._repeats = counters, Repeats()

    def note(self, kind: str, who: str, detail: str = "") -> None:
        """Count a fault of this kind by the peer of this name. The first is logged, and later a count at growing pauses."""
        self._counters.add(f"faults_{kind}")
        num_times = self._repeats.again(kind, time.monotonic())
        if num_times:
            seen = f", {num_times} times so far" if num_times > 1 else ""
            said = f": {printable(detail[:_MAX_DETAIL])}" if detail else ""
            text = f"{who} {FAULTS[kind]}{said}{seen}; it needs an upgrade or a restart"
            log_event(_log, "peer_faulty", text, logging.WARNING, peer=who, kind=kind, times=num_times)
