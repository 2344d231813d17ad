"""Continuous batching with chunked prefill over a paged pool: which sequence computes how many tokens in the next step.

Pure: no clock, no event loop, no bytes. Engines run the scheduler in real time, a simulator in virtual time. The rules are those of
vLLM's scheduler (Kwon et al., SOSP 2023) with Sarathi's chunked prefill (Agrawal et al., 2023).
"""

from bisect import insort
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import Generic, TypeVar

from meshserve.errors import PoolFull
from meshserve.kv.pool import BlockPool


class Stage(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence as the scheduler sees it: lengths, hashes and blocks, no tokens.

    `num_tokens` is the prompt's length and `hashes` are those of its full blocks. With `max_new_tokens` 0 it is a prefill:
    all its tokens are computed and none is produced.
    """

    num_tokens: int
    hashes: Seq[int]
    max_new_tokens: int
    stage: Stage = Stage.WAITING
    arrival: int = 0
    blocks: list[int] = field(default_factory=list)
    capacity: int = 0  # tokens that `blocks` can hold, but no more than the sequence will ever have
    num_computed: int = 0  # tokens whose KV is there
    num_pending: int = 0  # tokens to be computed before the next one can be produced; 0 while decoding
    num_generated: int = 0
    num_cached: int | None = None  # prompt tokens found in the prefix cache when first admitted
    added_at: float = 0.0
    started_at: float | None = None
    first_token_at: float | None = None


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

    def most_new_tokens(self, num_decodes: int) -> int:
        """Prompt tokens that a step can compute beside so many sequences that decode."""
        most = self.max_step_tokens - num_decodes
        most_prompt = self.max_mixed_tokens if num_decodes else self.max_prompt_tokens
        return min(most, most_prompt) if most_prompt else most


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
        self.running: list[S] = []
        """The batch, in order of arrival."""
        self.num_unfinished = 0
        """Sequences that run or wait."""
        self._full: list[S] = []
        """Of the decodes, those whose next token needs a block more, and perhaps some that ended or were preempted since."""
        self._waiting: deque[S] = deque()
        self._holding: deque[S] = deque()  # waiting with their blocks in hand: behind a head that needs those, all would wait for ever
        self._num_arrived = 0

    def add(self, sequence: S, now: float, blocks: list[int] | None = None) -> None:
        """Queue a sequence. Raises PoolFull if it could never fit.

        `blocks`, already held, have room for all its tokens and contain the KV of all but the last one.
        """
        most_tokens = sequence.num_tokens + max(0, sequence.max_new_tokens - 1)
        needed = -(-most_tokens // self.block_size)
        if needed > self.pool.num_blocks:
            raise PoolFull(f"{most_tokens} tokens need {needed} KV blocks, and this worker has {self.pool.num_blocks} in all")
        self._num_arrived += 1
        sequence.arrival, sequence.added_at = self._num_arrived, now
        sequence.num_pending = sequence.num_tokens
        self.waiting_prefill_tokens += sequence.num_tokens
        self.num_unfinished += 1
        if blocks is None:
            self._waiting.append(sequence)
        else:
            self._hold(sequence, blocks, sequence.num_tokens - 1)
            self._register(sequence, 0)
            self._holding.append(sequence)

    def end(self, sequence: S) -> None:
        """Take a sequence out, whatever it does, and release its blocks. Harmless when it has ended."""
        if sequence.stage is Stage.ENDED:
            return
        if sequence.stage is _RUNNING:
            self.running.remove(sequence)
        else:
            (self._holding if sequence in self._holding else self._waiting).remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []  # a new list: the old one may still be in somebody's hands
        self.waiting_prefill_tokens -= sequence.num_pending
        sequence.num_pending = 0
        sequence.stage = Stage.ENDED
        self.num_unfinished -= 1

    def schedule(self, now: float) -> Step[S] | None:
        """The next step, its blocks allocated; None if there is nothing to do, or no room for any of what waits."""
        is_short = bool(self._full) and self._grow_decodes()
        running = self.running
        if not self.waiting_prefill_tokens:  # most steps: all that is here decodes
            self.is_waiting_for_room = False
            return Step(running[:], [], [], 0, self.pool.num_used) if running else None
        step: Step[S] = Step([], [], [])
        prompts: list[S] = []
        for sequence in running:
            (prompts if sequence.num_pending else step.decodes).append(sequence)
        budget = most_new = self._limits.most_new_tokens(len(step.decodes))
        for sequence in prompts:
            if not budget:
                break
            budget -= self._take_chunk(step, sequence, budget)
        if not is_short or not running:  # else what was preempted would only take back the blocks it gave up
            budget = self._admit(step, budget, now)
        if not step.decodes and not step.prefills:
            return None
        step.num_prompt_tokens, step.used_blocks = most_new - budget, self.pool.num_used
        return step

    def update(self, step: Step[S], tokens: Seq[int], now: float) -> Outcome[S]:
        """Take note of what a step led to. Sequences that ended in the meantime are passed over.

        `tokens` has one for each of the step's decodes and then one for each of its prefills; those of prefills that are not at the
        end of their prompt have no meaning.
        """
        decodes = step.decodes
        outcome: Outcome[S] = Outcome([], [], [])
        keep_sequence, keep_token = outcome.producing.append, outcome.tokens.append
        for sequence, token in zip(decodes, tokens, strict=False):
            if sequence.stage is not _RUNNING:
                continue
            keep_sequence(sequence)
            keep_token(token)
            sequence.num_generated += 1
            sequence.num_computed = num_computed = sequence.num_computed + 1
            if num_computed == sequence.capacity:
                self._reach_capacity(sequence)
        for index, (sequence, num_tokens) in enumerate(step.prefills, len(decodes)):
            if sequence.stage is _RUNNING:
                self._update_prefill(sequence, num_tokens, tokens[index], outcome, now)
        return outcome

    def _update_prefill(self, sequence: S, num_tokens: int, token: int, outcome: Outcome[S], now: float) -> None:
        first_block = sequence.num_computed // self.block_size
        sequence.num_computed += num_tokens
        sequence.num_pending -= num_tokens
        self.waiting_prefill_tokens -= num_tokens
        if sequence.num_computed // self.block_size > first_block:
            self._register(sequence, first_block)
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
        if sequence.num_computed == sequence.capacity:
            self._reach_capacity(sequence)

    def _reach_capacity(self, sequence: S) -> None:
        if sequence.num_generated == sequence.max_new_tokens:
            self.end(sequence)
        else:
            self._full.append(sequence)

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

    def _admit(self, step: Step[S], budget: int, now: float) -> int:
        """Move waiting sequences that have a place in the pool into the batch; returns the tokens that are left of the budget."""
        self.is_waiting_for_room = False
        running = self.running
        while budget and len(running) < self.max_running and (self._holding or self._waiting):
            if self._holding:
                sequence = self._holding.popleft()
            elif self._place(self._waiting[0]):
                sequence = self._waiting.popleft()
            else:
                self.is_waiting_for_room = True
                break
            sequence.stage = _RUNNING
            if sequence.started_at is None:
                sequence.started_at = now
            if running and running[-1].arrival > sequence.arrival:  # it was preempted, or another brought its blocks
                insort(running, sequence, key=_by_arrival)
            else:
                running.append(sequence)
            step.admitted.append(sequence)
            budget -= self._take_chunk(step, sequence, budget)
        return budget

    def _place(self, sequence: S) -> bool:
        num_tokens = sequence.num_tokens + sequence.num_generated
        # a token can only be produced from one that is computed; a prefill produces none
        most_cached = (num_tokens - 1 if sequence.max_new_tokens else num_tokens) // self.block_size
        prefix = self.pool.lookup(sequence.hashes[:most_cached])
        try:
            blocks = self.pool.acquire(prefix, -(-num_tokens // self.block_size) - len(prefix))
        except PoolFull:
            return False
        self._hold(sequence, blocks, len(prefix) * self.block_size)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        return True

    def _hold(self, sequence: S, blocks: list[int], num_computed: int) -> None:
        """The sequence, none of which was computed, gets blocks that have so many of its tokens."""
        sequence.blocks, sequence.num_computed = blocks, num_computed
        sequence.num_pending -= num_computed
        self.waiting_prefill_tokens -= num_computed
        sequence.capacity = min(len(blocks) * self.block_size, sequence.num_tokens + sequence.max_new_tokens - 1)

    def _grow_decodes(self) -> bool:
        """A block more for each decode whose last one is full. True if the latest arrivals had to give up theirs for it."""
        is_short = False
        full, self._full = self._full, []
        for sequence in sorted(full, key=_by_arrival):
            # the latest arrival gives way, perhaps this one: so the earliest always comes to its end
            while not self.pool.num_available and sequence.stage is _RUNNING:
                is_short = True
                self._preempt(self.running.pop())
            if sequence.stage is _RUNNING:
                sequence.blocks += self.pool.allocate(1)
                most_computed = sequence.num_tokens + sequence.max_new_tokens - 1
                sequence.capacity = min(sequence.capacity + self.block_size, most_computed)
        return is_short

    def _preempt(self, sequence: S) -> None:
        self.pool.release(sequence.blocks)
        num_tokens = sequence.num_tokens + sequence.num_generated
        self.waiting_prefill_tokens += num_tokens - sequence.num_pending
        sequence.blocks, sequence.num_computed, sequence.num_pending = [], 0, num_tokens
        sequence.stage = Stage.WAITING
        self._waiting.appendleft(sequence)

    def _register(self, sequence: S, first_block: int) -> None:
        """Offer the full prompt blocks from this one on to the prefix cache."""
        end = min(sequence.num_computed // self.block_size, len(sequence.hashes))
        if end > first_block:
            self.pool.register(sequence.blocks[first_block:end], sequence.hashes[first_block:end])
