"""What the mesh asks of an engine.

An engine is owned by one peer and shared by its roles. All methods are called on the event loop's thread and return at once;
an engine that blocks or computes does so elsewhere and calls its sinks back on the loop (`loop.call_soon_threadsafe`).
What an engine cannot do it says by `kv_layout.refusal` and by raising :class:`~meshserve.errors.Unsupported`.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meshserve.engines.core.rates import StepRates
from meshserve.errors import MeshserveError
from meshserve.wire.card import KVLayout, ModelCard
from meshserve.wire.generation import GenerateRequest, TokenLogprobs


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the command line says about an engine; each engine words its own errors about `options`."""

    model: str | None = None
    """`--model`, for the engine `llama` the path of a file; None is the engine's default."""
    options: dict[str, str] = field(default_factory=dict)
    """`--engine-opt KEY=VALUE`, as strings. An unknown key is a UsageError that lists the known ones."""
    kv_cache_tokens: int | None = None
    """`--kv-cache-tokens`: tokens whose KV the engine holds at most, of all sequences together; None is for the engine to say."""
    kv_type: str | None = None
    """`--kv-type`, one of `config.KV_TYPES`; None is the engine's default. An engine that has no such choice raises UsageError."""


@dataclass(slots=True)  # not frozen, as those below: that triples what an object of so many fields costs, and each request has some
class GenerationStats:
    """What the engine measured of one generation, on its own monotonic clock."""

    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose KV was there already when the sequence was admitted: in the local cache, not handed over for it."""
    queue_ms: float
    """From `generate` to the start of the first step that worked on it."""
    prefill_ms: float
    """From there to the first token."""
    decode_ms: float
    """From the first token to the last."""


@dataclass(slots=True)
class Admission:
    """What is known of a generation once its first step has begun, in the terms of :class:`GenerationStats`."""

    num_cached_tokens: int
    queue_ms: float


class GenerationSink(Protocol):
    """Who receives one sequence's tokens. Exactly one of `on_finish` and `on_error` is called, last, unless the request is cancelled."""

    def on_prompt_logprobs(self, logprobs: list[TokenLogprobs | None]) -> None:
        """One for each token of the prompt, None for the first: it follows nothing. Called once, before the output, only if the
        request asked for them (`prompt_logprobs`) and is not one that another worker began (`num_generated`).
        """

    def on_tokens(self, tokens: list[int], logprobs: list[TokenLogprobs] | None = None) -> None:
        """Tokens of one step, in order: never empty, and no token twice; `logprobs` one each, if the request asked for them."""

    def on_finish(self, reason: str, stats: GenerationStats) -> None:
        """`stop`: the model ended (its end-of-sequence token is not given out). `length`: `max_tokens` were generated."""

    def on_error(self, error: MeshserveError) -> None:
        """The sequence ended without its output."""


KVBlock = tuple[int, int, bytes]
"""A block that was computed: its index in the prompt, its number of tokens, its payload."""


class PrefillSink(Protocol):
    """Receives the KV blocks of one prompt. Exactly one of `on_prefilled` and `on_prefill_failed` is
    called, last, unless the prefill is cancelled."""

    def on_blocks(self, blocks: list[KVBlock]) -> None:
        """The blocks that one step completed, at its end: never none, each once, ascending."""

    def on_prefilled(self, num_cached_tokens: int) -> None:
        """All blocks were delivered; `num_cached_tokens` of the prompt's tokens were prefix hits."""

    def on_prefill_failed(self, error: MeshserveError) -> None:
        """No more blocks will come."""


@dataclass(slots=True)
class EngineLoad:
    """What an engine has to do, for routers and people."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_prefill_tokens: int = 0
    """Prompt tokens that still have to be computed, of running and waiting sequences."""
    used_blocks: int = 0
    """Blocks that running sequences hold."""
    cached_blocks: int = 0
    """Blocks that nobody holds and that can be found by their hash."""
    num_blocks: int = 0
    max_running: int = 0
    """Most sequences that run at once; 0: the engine does not say."""


Frame = bytes | memoryview
KVPayload = Frame | list[Frame]
"""Of one block: in one piece, or in several, in order."""


def size_of(payload: KVPayload) -> int:
    """Its bytes."""
    return sum(map(len, payload)) if isinstance(payload, list) else len(payload)


class Reservation(Protocol):
    """Blocks that a decode engine set aside for a prompt whose KV comes from another worker. Ends in `generate` or `release`."""

    num_cached_tokens: int
    """Tokens at the prompt's start whose blocks are there already: always whole blocks."""
    num_tokens: int
    """Tokens that the blocks cover: all of the prompt but the last one."""

    def missing(self) -> Sequence[int]:
        """Indexes of the blocks that are still to be written, ascending."""

    def tokens_in(self, index: int) -> int:
        """Of block `index`: whole blocks but for a partial last one."""

    @property
    def is_complete(self) -> bool:
        """All blocks are written, and the engine has them."""

    def write(
        self,
        blocks: Sequence[tuple[int, KVPayload]],
        on_done: Callable[[MeshserveError | None], None],
    ) -> None:
        """Take in blocks, given as index and payload: in any order, each once, all or none.

        `on_done` is called once, perhaps within this call, unless it raises: with None when the engine
        has the blocks, with the error if it could not take one of them, or failed as a whole.

        Raises BlockRefused if a block is not missing, or its payload is not what its place demands. All
        blocks of the call are missing then as before, and after an error.
        """

    def release(self) -> None:
        """Give the blocks back; full ones from the prompt's start on stay as prefixes. Harmless after `generate` took the
        reservation, and when called twice."""


BlockListener = Callable[[Sequence[int], Sequence[int]], None]
"""Called with the hashes of blocks stored and of blocks evicted since the last call, at most once a step."""


class Engine(Protocol):
    """A model on this host. Built by `factory(EngineOptions)`, which raises UsageError or StartupFailed."""

    card: ModelCard

    @property
    def kv_layout(self) -> KVLayout:
        """How it keeps KV; complete once the engine has started."""

    description: str
    """What it takes of its host, in one line for people at start; "" if that is not worth one."""

    files: Mapping[str, bytes]
    """Contents of the files that the card names, by their SHA-256: what processors make the tokenizer of. Never changed."""

    rates: StepRates
    """What was measured of its steps, for routers. An engine that cannot see its own steps leaves it empty."""

    on_failure: Callable[[MeshserveError], None]
    """Set by the engine's owner. Called when the engine as a whole can compute no more, after its requests have ended in errors."""

    async def start(self) -> None:
        """Get ready to compute; called before anything else, and again after a failure or :meth:`close`: then with an empty cache.
        Raises StartupFailed."""

    async def close(self) -> None:
        """Stop all work at once and give back every resource: requests and reservations end. Sinks are called no more; what comes
        later is refused as EngineFailed. Harmless when called twice."""

    def check(self, request: GenerateRequest) -> None:
        """Raises the InvalidRequest (or a subclass) with which `generate` would fail for what the request itself says."""

    def num_cached_tokens(self, request: GenerateRequest) -> int:
        """How many tokens at the start of this prompt have their KV here, in whole blocks, without computing anything."""

    def reserve(self, request: GenerateRequest) -> Reservation:
        """Set blocks aside for this prompt's KV that another worker computes. Raises PoolFull, and then holds nothing; Unsupported
        without KV.

        PoolFull also while earlier sequences wait for room: a request that is refused waits behind them, in order.
        """

    def generate(self, request: GenerateRequest, sink: GenerationSink, reservation: Reservation | None = None) -> None:
        """Queue a sequence. With a reservation that has no missing block, its KV is used and only the last prompt token is computed.

        Raises InvalidRequest, or PoolFull if it could never fit. After a cancel nothing more is called on the sink.
        """

    def prefill(self, request_id: str, tokens: "array[int]", first_block: int, sink: PrefillSink) -> None:
        """Compute the KV of all these tokens and give out the blocks from `first_block` on, a partial last one included.

        Raises as `generate` does; Unsupported without KV.
        """

    def cancel(self, request_id: str) -> None:
        """End a generation or a prefill and release its blocks; unknown ids are ignored."""

    def admission(self, request_id: str) -> Admission | None:
        """Of a generation that gives out its first token: what came before. None if the engine cannot say: all was prefill then."""

    def overdue_s(self, request_id: str) -> float | None:
        """How long the engine's next sign of progress is overdue by its own expectation: near 0 while it works, growing once it hangs.

        None if it does not hold this request. A step that is meant to take long is not overdue before its end.
        """

    def load(self) -> EngineLoad:
        """A snapshot, cheap enough for every step."""

    def watch_blocks(self, listener: BlockListener | None) -> list[int]:
        """Report stored and evicted full prompt blocks from now on; returns the hashes of those that are there."""
