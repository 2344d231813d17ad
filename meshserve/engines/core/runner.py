"""What an engine's model must do, and nothing else: compute steps, give out and take in KV blocks."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meshserve.engines.core.request import EngineRequest, Generation, Prefill
from meshserve.engines.core.reservation import BlockReservation, WriteDone
from meshserve.engines.core.scheduler import Step, StepLimits
from meshserve.errors import MeshserveError
from meshserve.kv.pool import BlockPool
from meshserve.wire.card import KVLayout, ModelCard
from meshserve.wire.generation import Sampling, TokenLogprobs


@dataclass(slots=True)
class StepResult:
    """What a step computed. Plain data; made on any thread, read on the event loop."""

    tokens: list[int]
    """One for each of the step's decodes and then one for each of its prefills, :data:`~meshserve.engines.core.request.END` where the
    model ended. Those of prefills that are not at the end of their prompt, and of prompts that produce nothing, have no meaning."""
    logprobs: dict[EngineRequest, TokenLogprobs] = field(default_factory=dict)
    """Of those that asked for log probabilities."""
    blocks: list[tuple[Prefill, int, int, bytes]] = field(default_factory=list)
    """KV blocks that are complete with this step: prompt, index, number of tokens, payload; ascending for each prompt."""
    failed: list[tuple[EngineRequest, Exception]] = field(default_factory=list)
    """Those of the step whose next token could not be chosen."""
    duration_s: float = 0.0
    """From the step's beginning to its end, by the engine's clock."""


class ModelRunner(Protocol):
    """A model on this host. Methods are called on the event loop's thread and return at once; a runner that computes has a thread.

    Built by the engine's factory, which raises UsageError or StartupFailed. A block of the pool, by its number, is the runner's to map
    to memory. `request.state` and `reservation.state` are the runner's own.
    """

    card: ModelCard
    kv_layout: KVLayout
    """Complete once :meth:`start` has returned."""
    files: Mapping[str, bytes]
    """Contents of the files that the card names, by their SHA-256. Never changed."""
    vocab_size: int
    limits: StepLimits
    pool: BlockPool
    """Made by the runner, which knows its memory; the scheduler allocates from it."""
    shares_prefixes: bool
    """Whether a sequence may go on from blocks that another one computed. False where KV cannot be cut at a block's end, as with a
    recurrent state: then every sequence is computed, or handed over, from its first token. Complete once :meth:`start` has returned."""

    async def start(self, on_result: Callable[[StepResult], None], on_failure: Callable[[MeshserveError], None]) -> None:
        """Get ready to compute, with an empty cache; called again after a failure or :meth:`close`. `on_result` is called once a submitted
        step, on the event loop, perhaps within :meth:`submit`; instead `on_failure`, once, when the engine as a whole can compute no
        more. An error that :meth:`submit` raises counts as one. Raises StartupFailed."""

    async def close(self) -> None:
        """Stop all work at once and give back every resource. Harmless when nothing was started, and when called twice."""

    def check(self, tokens: "array[int]", sampling: Sampling | None) -> None:
        """Raises InvalidRequest for a prompt with a token that the model does not have, InvalidRequest or
        Unsupported for sampling parameters that this model cannot follow; None for a prompt that is only
        computed. The general limits were checked before: there is at least one token.
        """

    def prepare(self, generation: Generation, output: Sequence[int]) -> None:
        """Set its `sampler`, if it needs one. `output` is what an earlier worker generated. Raises InvalidRequest if that cannot be."""

    def take_over(self, reservation: BlockReservation, generation: Generation) -> None:
        """The generation goes on with what the reservation holds: its `state` too."""

    def submit(self, step: Step[EngineRequest]) -> None:
        """Compute a step; the next one is submitted after its result."""

    def share_prefix(self, reservation: BlockReservation) -> None:
        """A reservation was made: its first blocks are cached ones, the others will be written. Raises PoolFull without room for it."""

    def write_blocks(
        self, reservation: BlockReservation, blocks: list[tuple[int, bytes]], on_done: WriteDone
    ) -> None:
        """Take in blocks of a reservation, given as index and payload: all or none.

        Raises BlockRefused, before anything is changed, if a payload is not what the layout, its index
        and its number of tokens demand. What the library says of the blocks comes with `on_done`, perhaps
        within this call.
        """

    def overdue_s(self) -> float:
        """How long the next sign of progress is overdue by the runner's own expectation; 0 without work. A step that is overdue by
        :data:`~meshserve.engines.core.engine.HANGS_AFTER_S` for as long again counts as a failure."""
