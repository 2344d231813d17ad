"""Whether a decode worker has a prompt prefilled elsewhere: the decision alone, from figures that others measured. Pure.

Decode workers decide by it, and routers assume by it what a decode worker is going to decide.
"""

from typing import Any

from meshserve.wire.generation import HandoffDecision

UNMEASURED_LOCAL_TOKENS = 256
"""Uncached prompt tokens up to which a decode worker prefills itself while expected times say nothing."""

ALIKE_MS = 20.0
"""Expected times that differ by less than this decide nothing. Means over other prompts, the operating system and the network are wrong
by as much, and nobody notices it in a first token; so a prompt's length decides as it does before rates are measured, and what is long
leaves this worker's steps to streams that begin meanwhile. Lower follows figures to the last digit; an engine without delays, which has
nothing but such figures, would then hand over at random."""

_WHY = {
    "cached": "nothing but the prompt's last token is missing here",
    "short": "few tokens are missing here, and no time is expected to be gained elsewhere",
    "floor": "at most as many tokens are missing here as are never handed over by --max-local-prefill-tokens",
    "long": "many tokens are missing here, and no time is expected to be lost elsewhere",
    "faster-here": "the first token is expected sooner if this worker computes the prompt",
    "faster-there": "the first token is expected sooner if a prefill worker computes the prompt",
    "streams-run-here": "the prompt would hold up streams that run here, and is expected to take at most twice as long elsewhere",
    "no-peer": "no prefill worker can take this prompt",
    "queue-full": "too many prompts wait at the best prefill worker",
}


Choice = tuple[bool, str]
"""Whether to hand over, and the reason. They are made once, since routers ask for each decode worker of each request."""

_CACHED, _FLOOR, _SHORT, _FASTER_HERE = (False, "cached"), (False, "floor"), (False, "short"), (False, "faster-here")
_LONG, _FASTER_THERE, _STREAMS_RUN_HERE = (True, "long"), (True, "faster-there"), (True, "streams-run-here")
NO_PEER, QUEUE_FULL = (False, "no-peer"), (False, "queue-full")


def decide(num_uncached: int, max_local_tokens: int | None, local_ms: float | None, remote_ms: float | None, is_busy: bool) -> Choice:
    """Where a prompt with so many uncached tokens, less its last one, is prefilled.

    Expected times to the first token are None where a rate they need is not measured. `max_local_tokens` is what a user set: prompts with
    at most so many uncached tokens are never handed over. `is_busy` says that sequences run here: computing the prompt here holds them
    up, which is worth a first token that comes later.
    """
    if num_uncached < 1:
        return _CACHED
    if max_local_tokens is not None and num_uncached <= max_local_tokens:
        return _FLOOR
    if local_ms is None or remote_ms is None or -ALIKE_MS < remote_ms - local_ms < ALIKE_MS:
        return _LONG if max_local_tokens is not None or num_uncached > UNMEASURED_LOCAL_TOKENS else _SHORT
    if remote_ms <= local_ms:
        return _FASTER_THERE
    return _STREAMS_RUN_HERE if is_busy and remote_ms <= 2 * local_ms else _FASTER_HERE


def for_receipt(found: HandoffDecision) -> dict[str, Any]:
    """The decision as receipts show it."""
    return {
        "decided": "handoff" if found.is_handoff else "local",
        "local_ms": None if found.local_ms is None else round(found.local_ms, 3),
        "remote_ms": None if found.remote_ms is None else round(found.remote_ms, 3),
        "reason": found.reason,
        "why": _WHY.get(found.reason, ""),
    }
