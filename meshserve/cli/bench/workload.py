"""What is asked: prompts with lengths from distributions, shared prefixes, conversations, or the prompts of a trace. Pure."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from meshserve.cli.bench.distributions import Lengths
from meshserve.cli.bench.exchange import Job
from meshserve.cli.bench.texts import Scale, Texts
from meshserve.cli.bench.trace import TRACE_BLOCK_SIZE, TraceLine


@dataclass(frozen=True, slots=True)
class Shape:
    """Of generated prompts."""

    prompt_tokens: Lengths
    """Of each turn's own part."""
    output_tokens: Lengths
    num_shared_tokens: int = 0
    """With which prompts begin that share a prefix."""
    num_prefixes: int = 1
    num_turns: int = 1


class Workload:
    """Jobs without end, the same for the same seed."""

    def __init__(self, shape: Shape, scale: Scale, seed: int) -> None:
        self._shape, self._scale, self._seed = shape, scale, seed
        self._rng = random.Random(f"workload {seed}")
        self._texts = Texts(seed)
        self._numbers = itertools.count(1)
        num_chars = scale.num_chars(shape.num_shared_tokens) if shape.num_shared_tokens else 0
        labels = [f"prefix {seed}.{number}" for number in range(shape.num_prefixes)]
        self._prefixes = [self._texts.make(label, num_chars) if num_chars else "" for label in labels]

    def __iter__(self) -> Iterator[Job]:
        while True:
            prefix = self._rng.choice(self._prefixes)
            text = prefix + self._own_text(is_first=not prefix)
            yield Job((("user", text),), self._shape.output_tokens.draw(self._rng), self._shape.num_turns - 1)

    def _own_text(self, is_first: bool) -> str:
        num_tokens = self._shape.prompt_tokens.draw(self._rng)
        return self._texts.make(f"{self._seed}.{next(self._numbers)}", self._scale.num_chars(num_tokens, is_first))

    def next_turn(self, job: Job, answer: str) -> Job | None:
        """What is asked after this answer; None if the conversation is over."""
        if job.num_turns_left == 0:
            return None
        messages = (*job.messages, ("assistant", answer), ("user", self._own_text(is_first=False)))
        return replace(job, messages=messages, max_tokens=self._shape.output_tokens.draw(self._rng), num_turns_left=job.num_turns_left - 1)


def trace_jobs(lines: Sequence[TraceLine], scale: Scale, seed: int) -> Iterator[Job]:
    """The requests of a trace, the first at once. Blocks of equal ids have equal texts; the last one is cut so that the length is right."""
    texts = Texts(seed)
    block_chars = scale.num_chars(TRACE_BLOCK_SIZE, is_first=False)
    for line in lines:
        num_chars = scale.num_chars(line.num_tokens)
        blocks = "".join(texts.make(f"block {seed}.{hash_id}", block_chars) for hash_id in line.hash_ids)
        # from the first one's time on: a trace that was cut out of a longer one would else begin with its silence
        yield Job((("user", blocks[:num_chars] or "a"),), line.num_output_tokens, due_s=line.arrival_s - lines[0].arrival_s)
