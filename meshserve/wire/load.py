"""What a worker reports of itself to the routers that watch it."""

from meshserve.wire.message import Figure, FrozenRow

MAX_HASHES_PER_REPORT = 8192


class WorkerLoad(FrozenRow, frozen=True):
    """How busy one worker is. A figure that a worker of an earlier version does not send is 0."""

    num_running: Figure = 0
    """Sequences in the engine's batch."""
    num_waiting: Figure = 0
    """Sequences that wait for a place in it."""
    waiting_prefill_tokens: Figure = 0
    """Prompt tokens still to be computed here."""
    used_blocks: Figure = 0
    cached_blocks: Figure = 0
    num_blocks: Figure = 0
    num_tickets: Figure = 0
    """Prompts queued for prefill here, claimed or not."""
    prefill_base_us: Figure = 0
    """Measured here, as are those below; 0 until there was something to measure. Of a step with prompt tokens, however few."""
    prefill_ns_per_token: Figure = 0
    decode_base_us: Figure = 0
    """Of a decode step with an empty cache."""
    decode_ns_per_block: Figure = 0
    """What one more held block adds to a decode step."""
    handoff_ns_per_token: Figure = 0
    """For KV received from prefill workers."""
    mean_output_tokens: Figure = 0
    """Of the sequences that finished here lately."""
    max_running: Figure = 0
    """Most sequences in the engine's batch; 0: the engine does not say."""


class WorkerReport(FrozenRow, frozen=True):
    """One change of a worker's state. The first of a watch is the snapshot."""

    load: WorkerLoad
    stored: tuple[int, ...] = ()
    """Hashes of full prompt blocks whose KV is there now."""
    evicted: tuple[int, ...] = ()
    admitted: tuple[str, ...] = ()
    """Requests that the worker counts in its load by now, so that nobody else need."""
    kept: tuple[str, ...] = ()
    """Of these, those whose prompts it computes itself though there are prefill workers: no prefill worker is going to report them."""
