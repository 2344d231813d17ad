"""How long a request may take, as its header says."""

import math

from meshserve.errors import InvalidRequest

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
