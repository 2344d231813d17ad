"""How much of its host an engine takes: memory for its KV cache, and threads."""

from meshserve.engines.claims import Claim, Share
from meshserve.engines.host import available_bytes, num_engine_threads
from meshserve.errors import StartupFailed, UsageError

_MOST_CONTEXTS, _MEMORY_SHARE = 8, 4
"""A KV cache takes the lesser of so many full contexts, and of this part of the memory that is available and not claimed by others."""
_FEWEST_BLOCKS, _FEWEST_USUAL_BLOCKS = 2, 4
"""Of a KV cache whose size was asked for, and of one whose size was not."""


def claim_kv_cache(
    claim: Claim,
    *,
    context_length: int,
    bytes_per_token: int,
    block_size: int,
    asked_tokens: int | None = None,
    asked_threads: int | None = None,
) -> tuple[int, int]:
    """Claim memory for a KV cache, and threads; returns its blocks, and the threads. What was asked for is claimed as it is.

    Raises UsageError for a cache that is too small, StartupFailed where there is no room for it; nothing is claimed then.
    """

    def decide(claimed: Share) -> Share:
        if asked_tokens is None:
            num_blocks = _usual_blocks(context_length, bytes_per_token, block_size, claimed.pending_bytes)
        else:
            _check_asked(asked_tokens, bytes_per_token, block_size)
            num_blocks = asked_tokens // block_size
        return Share(num_blocks * block_size * bytes_per_token, asked_threads or num_engine_threads(claimed.threads))

    share = claim.make(decide)
    return share.pending_bytes // bytes_per_token // block_size, share.threads


def _check_asked(asked_tokens: int, bytes_per_token: int, block_size: int) -> None:
    if asked_tokens < _FEWEST_BLOCKS * block_size:
        raise UsageError(f"--kv-cache-tokens is at least {_FEWEST_BLOCKS * block_size} for a real model, not {asked_tokens}")
    size_bytes, available = asked_tokens * bytes_per_token, available_bytes()
    if size_bytes > available:  # the system would promise it, and end this process later
        raise StartupFailed(
            f"a KV cache of {asked_tokens} tokens takes {size_bytes / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are available: "
            "lower --kv-cache-tokens, or end other programs"
        )


def _usual_blocks(context_length: int, bytes_per_token: int, block_size: int, claimed_bytes: int) -> int:
    fitting = max(0, available_bytes() - claimed_bytes) // _MEMORY_SHARE // bytes_per_token
    if fitting < _FEWEST_USUAL_BLOCKS * block_size:
        raise StartupFailed(f"there is room for a KV cache of {fitting} tokens only: end other programs, or use a smaller model")
    return min(_MOST_CONTEXTS * context_length, fitting) // block_size
