"""Continuous batching with chunked prefill over a paged pool: which sequence computes how many tokens in the next step.

Pure: no clock, no event loop, no bytes. Engines run the scheduler in real time, a simulator in virtual time. The rules are those of
vLLM's scheduler (Kwon et al., SOSP 2023) with Sarathi's chunked prefill (Agrawal et al., 2023).
"""

from bisect import insort
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Generic, TypeVar

from meshserve.errors import PoolFull
from meshserve.kv.pool import BlockPool


class Stage(Enum):
    """Where a sequence is."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class Sequence:
    """One sequence as the scheduler sees it: lengths, hashes and blocks, no tokens.

    `num_tokens` is the prompt's length and `hashes` are those of its full blocks. With `max_new_tokens` 0 it is a prefill:
    all its tokens are computed and none is produced.
    """

    __slots__ = (
        "added_at",
        "arrival",
        "blocks",
        "capacity",
        "first_token_at",
        "hashes",
        "max_new_tokens",
        "num_cached",
        "num_computed",
        "num_generated",
        "num_pending",
        "num_registered",
        "num_tokens",
        "stage",
        "started_at",
    )

    def __init__(self, num_tokens: int, hashes: Seq[int], max_new_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.hashes = hashes
        self.max_new_tokens = max_new_tokens
        self.stage = Stage.NEW
        self.arrival = 0
        self.blocks: list[int] = []
        self.capacity = 0  # tokens that `blocks` can hold
        self.num_computed = 0  # tokens whose KV is there
        self.num_pending = 0  # tokens to be computed before the next one can be produced; 0 while decoding
        self.num_generated = 0
        self.num_registered = 0  # prompt blocks that were offered to the prefix cache
        self.num_cached: int | None = None  # prompt tokens found in the prefix cache when first admitted
        self.added_at = 0.0
        self.started_at: float | None = None
        self.first_token_at: float | None = None


S = TypeVar("S", bound=Sequence)


@dataclass(slots=True)
class Step(Generic[S]):
    """One forward pass. The sequences of `decodes` compute one token each; those of `prefills` as many as stands beside them."""

    decodes: list[S]
    prefills: list[tuple[S, int]]
    admitted: list[S]
    """Those of `prefills` that were waiting until now, some of them perhaps for the second time after a preemption."""
    num_prompt_tokens: int = 0
    """Of all prefills together."""
    used_blocks: int = 0
    """Of the pool, held by running sequences and reservations."""
    is_first: bool = False
    """The engine was idle before."""


@dataclass(slots=True)
class Outcome(Generic[S]):
    """What a step led to. Each sequence in `producing` has one more token; those whose stage is ENDED have all of `max_new_tokens`."""

    producing: list[S]
    tokens: list[int]
    """One for each of `producing`, as the model runner sampled it."""
    prefilled: list[S]
    """Prefills that ended with this step."""


@dataclass(slots=True)
class StepLimits:
    """What one step may hold. The model runner may change it between steps."""

    max_running: int
    """Sequences in the batch."""
    max_step_tokens: int
    """Tokens of all sequences in one step: more computes prompts sooner, and makes running sequences wait longer for them."""
    max_prompt_tokens: int = 0
    """Prompt tokens of all sequences in one step; 0: `max_step_tokens` alone counts. Lower gives out KV blocks sooner."""
    max_mixed_tokens: int = 0
    """The same for a step that also decodes. Lower keeps the pace of running sequences."""
    chunk_tokens: int = 1
    """A prompt is cut at multiples of this. Above 1, the prompt's last token is a step of its own, so that outputs do not depend on
    where the rest was computed."""


_by_arrival = attrgetter("arrival")
_RUNNING = Stage.RUNNING  # to look at an enum's member costs more than to compare with it


class Scheduler(Generic[S]):
    """Owns the queue and the running batch. `schedule` and `update` alternate; `add` and `end` may come at any time.

    Running decodes come first in a step, then prompts in order of arrival, within the limits. All blocks of a prompt are allocated when
    it is admitted, so that half-computed prompts never starve each other.
    """

    def __init__(self, pool: BlockPool, block_size: int, limits: StepLimits) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_running = min(limits.max_running, limits.max_step_tokens)  # else some decodes would never be part of a step
        self._limits = limits
        self.waiting_prefill_tokens = 0
        self.is_waiting_for_room = False
        """The next one to be admitted did not fit at the last plan: what comes later must not take the blocks that it waits for."""
        self._running: list[S] = []
        self._full: list[S] = []
        """Of the decodes, those whose next token needs a block more, and perhaps some that ended or were preempted since."""
        self._waiting: deque[S] = deque()
        self._holding: deque[S] = deque()  # waiting with their blocks in hand: behind a head that needs those, all would wait for ever
        self._num_arrived = 0

    @property
    def is_idle(self) -> bool:
        """There is nothing to do or to wait for."""
        return not self._running and not self._waiting and not self._holding

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that no step worked on yet, or that were preempted."""
        return len(self._waiting) + len(self._holding)

    def add(self, sequence: S, now: float, blocks: list[int] | None = None) -> None:
        """Queue a sequence. Raises PoolFull if it could never fit.

        `blocks`, already held, have room for all its tokens and contain the KV of all but the last one.
        """
        most_tokens = sequence.num_tokens + max(0, sequence.max_new_tokens - 1)
        needed = self._num_blocks(most_tokens)
        if needed > self.pool.num_blocks:
            raise PoolFull(f"{most_tokens} tokens need {needed} KV blocks, and this worker has {self.pool.num_blocks} in all")
        self._num_arrived += 1
        sequence.arrival = self._num_arrived
        sequence.added_at = now
        sequence.stage = Stage.WAITING
        if blocks is None:
            self._set_pending(sequence, sequence.num_tokens)
            self._waiting.append(sequence)
            return
        self._hold(sequence, blocks, sequence.num_tokens - 1)
        self._register(sequence)
        self._holding.append(sequence)

    def end(self, sequence: S) -> None:
        """Take a sequence out, whatever it does, and release its blocks. Harmless when it has ended."""
        if sequence.stage is _RUNNING:
            self._running.remove(sequence)
        elif sequence.stage is Stage.ENDED:
            return
        elif sequence.stage is Stage.WAITING:
            (self._holding if sequence in self._holding else self._waiting).remove(sequence)
        self._drop_blocks(sequence)
        self._set_pending(sequence, 0)
        sequence.stage = Stage.ENDED

    def schedule(self, now: float) -> Step[S] | None:
        """The next step, its blocks allocated; None if there is nothing to do, or no room for any of what waits."""
        is_short = bool(self._full) and self._grow_decodes()
        if not self.waiting_prefill_tokens:  # most steps: all that is here decodes
            self.is_waiting_for_room = False
            return Step(self._running[:], [], [], 0, self.pool.num_used) if self._running else None
        decodes = [sequence for sequence in self._running if not sequence.num_pending]
        step = Step(decodes, [], [])
        budget = most_new = self._prompt_budget(len(decodes))
        budget = self._schedule_running(step, most_new)
        if not is_short or not self._running:  # else what was preempted would only take back the blocks it gave up
            budget = self._schedule_waiting(step, budget, now)
        if not decodes and not step.prefills:
            return None
        step.num_prompt_tokens, step.used_blocks = most_new - budget, self.pool.num_used
        return step

    def _prompt_budget(self, num_decodes: int) -> int:
        limits = self._limits
        most_new = limits.max_step_tokens - num_decodes
        most_prompt = limits.max_mixed_tokens if num_decodes else limits.max_prompt_tokens
        return min(most_new, most_prompt) if most_prompt else most_new

    def update(self, step: Step[S], tokens: Seq[int], now: float) -> Outcome[S]:
        """Take note of what a step led to. Sequences that ended in the meantime are passed over.

        `tokens` has one for each of the step's decodes and then one for each of its prefills; those of prefills that are not at the
        end of their prompt have no meaning.
        """
        producing: list[S] = []
        ended: set[S] = set()
        for sequence in step.decodes:
            if sequence.stage is not _RUNNING:
                ended.add(sequence)
                continue
            sequence.num_computed = num_computed = sequence.num_computed + 1
            sequence.num_generated = num_generated = sequence.num_generated + 1
            producing.append(sequence)
            if num_generated == sequence.max_new_tokens:
                self.end(sequence)
            elif num_computed == sequence.capacity:
                self._full.append(sequence)
        produced = list(tokens[: len(step.decodes)])
        if ended:
            produced = [token for sequence, token in zip(step.decodes, produced, strict=True) if sequence not in ended]
        outcome = Outcome(producing, produced, [])
        for index, (sequence, num_tokens) in enumerate(step.prefills, len(step.decodes)):
            if sequence.stage is _RUNNING:
                self._update_prefill(sequence, num_tokens, tokens[index], outcome, now)
        return outcome

    def _update_prefill(self, sequence: S, num_tokens: int, token: int, outcome: Outcome[S], now: float) -> None:
        sequence.num_computed += num_tokens
        self._set_pending(sequence, sequence.num_pending - num_tokens)
        self._register(sequence)
        if sequence.num_pending:
            return
        if not sequence.max_new_tokens:
            outcome.prefilled.append(sequence)
            self.end(sequence)
            return
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        sequence.num_generated += 1
        outcome.producing.append(sequence)
        outcome.tokens.append(token)
        if sequence.num_generated == sequence.max_new_tokens:
            self.end(sequence)
        elif sequence.num_computed == sequence.capacity:
            self._full.append(sequence)

    def _schedule_running(self, step: Step[S], budget: int) -> int:
        for sequence in self._running:
            if sequence.num_pending and budget:
                budget -= self._take_chunk(step, sequence, budget)
        return budget

    def _schedule_waiting(self, step: Step[S], budget: int, now: float) -> int:
        self.is_waiting_for_room = False
        while budget and len(self._running) < self.max_running:
            sequence = self._admit(now)
            if sequence is None:
                self.is_waiting_for_room = bool(self._waiting)
                break
            step.admitted.append(sequence)
            budget -= self._take_chunk(step, sequence, budget)
        return budget

    def _take_chunk(self, step: Step[S], sequence: S, budget: int) -> int:
        """The next part of a prompt becomes part of the step; returns its length, which may be 0 where all is cached."""
        num_pending, chunk = sequence.num_pending, self._limits.chunk_tokens
        if chunk > 1 and num_pending > 1 and sequence.max_new_tokens:
            num_pending -= 1  # the last token is a step of its own
        num_tokens = min(num_pending, budget)
        if chunk <= num_tokens < num_pending:  # a cut within the prompt is made where any other worker would make it
            num_tokens -= (sequence.num_computed + num_tokens) % chunk
        step.prefills.append((sequence, num_tokens))
        return num_tokens

    def _admit(self, now: float) -> S | None:
        """Move the next waiting sequence that has a place in the pool into the batch."""
        if self._holding:
            sequence = self._holding.popleft()
        elif self._waiting and self._place(self._waiting[0]):
            sequence = self._waiting.popleft()
        else:
            return None
        sequence.stage = _RUNNING
        if sequence.started_at is None:
            sequence.started_at = now
        running = self._running
        if not running or running[-1].arrival < sequence.arrival:
            running.append(sequence)
        else:  # it was preempted, or brought its blocks
            insort(running, sequence, key=_by_arrival)
        return sequence

    def _place(self, sequence: S) -> bool:
        num_tokens = sequence.num_tokens + sequence.num_generated
        # a token can only be produced from one that is computed; a prefill produces none
        most_cached = (num_tokens - 1 if sequence.max_new_tokens else num_tokens) // self.block_size
        prefix = self.pool.lookup(sequence.hashes[:most_cached])
        try:
            blocks = self.pool.acquire(prefix, self._num_blocks(num_tokens) - len(prefix))
        except PoolFull:
            return False
        self._hold(sequence, blocks, len(prefix) * self.block_size)
        sequence.num_registered = len(prefix)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        return True

    def _hold(self, sequence: S, blocks: list[int], num_computed: int) -> None:
        sequence.blocks = blocks
        sequence.capacity = len(blocks) * self.block_size
        sequence.num_computed = num_computed
        self._set_pending(sequence, sequence.num_tokens + sequence.num_generated - num_computed)

    def _grow_decodes(self) -> bool:
        """A block more for each decode whose last one is full. True if others had to give up theirs for it."""
        is_short = False
        full, self._full = self._full, []
        for sequence in sorted(full, key=_by_arrival):
            if sequence.stage is _RUNNING:
                is_short |= self._make_room(sequence)
                if sequence.stage is _RUNNING:
                    sequence.blocks += self.pool.allocate(1)
                    sequence.capacity += self.block_size
        return is_short

    def _make_room(self, sequence: S) -> bool:
        """Preempt the latest arrivals, `sequence` itself among them, until one block is available."""
        if self.pool.num_available:
            return False
        while not self.pool.num_available and sequence.stage is _RUNNING:
            self._preempt(self._running[-1])
        return True

    def _preempt(self, sequence: S) -> None:
        self._running.pop()
        self._drop_blocks(sequence)
        sequence.num_computed = sequence.num_registered = 0
        self._set_pending(sequence, sequence.num_tokens + sequence.num_generated)
        sequence.stage = Stage.WAITING
        self._waiting.appendleft(sequence)

    def _drop_blocks(self, sequence: S) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []  # a new list: the old one may still be in somebody's hands
        sequence.capacity = 0

    def _register(self, sequence: S) -> None:
        num_full = min(sequence.num_computed // self.block_size, len(sequence.hashes))
        for index in range(sequence.num_registered, num_full):
            self.pool.register(sequence.blocks[index], sequence.hashes[index])
        sequence.num_registered = max(sequence.num_registered, num_full)

    def _set_pending(self, sequence: S, num_tokens: int) -> None:
        self.waiting_prefill_tokens += num_tokens - sequence.num_pending
        sequence.num_pending = num_tokens

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
