"""`python -m bench.workloads NAME --seed S --requests N > FILE`: workloads in a trace's format, the same for the same seed.

Each rewards something else: `no-sharing` even load and nothing more, `hot-prefix` spreading what everybody shares, `tenants` keeping
the popular apart from the rare, `conversations` coming back to where the last turn was after a pause, `agents` the same within
seconds and over large shared prompts. Lengths are log-normal and arrivals Poisson, as production traces are roughly (Wang et al.,
BurstGPT, 2024; Qin et al., Mooncake, FAST 2025); `--speed` of the replay sets the load.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import click

from bench.traces import TRACE_BLOCK_SIZE, TraceRequest, format_trace


class Dice:
    """Seeded draws, and ids for blocks that nobody has had before."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._ids = itertools.count()

    def gap_s(self, mean_s: float) -> float:
        """Between two events that know nothing of each other: exponential."""
        return self._random.expovariate(1 / mean_s)

    def length(self, median: int, spread: float = 1.0, most: int = 100_000) -> int:
        """Tokens: log-normal; `spread` is the standard deviation of the logarithm."""
        return max(1, min(most, round(self._random.lognormvariate(math.log(median), spread))))

    def count(self, mean: float) -> int:
        """At least 1, geometric."""
        return 1 + int(self._random.expovariate(1.0) * (mean - 1))

    def popular(self, num_things: int) -> int:
        """One of them, by Zipf's law: the n-th is drawn 1/n as often as the first."""
        return self._random.choices(range(num_things), [1 / (rank + 1) for rank in range(num_things)])[0]

    def blocks(self, num_blocks: int) -> list[int]:
        """Ids of new blocks."""
        return list(itertools.islice(self._ids, num_blocks))


@dataclass(slots=True)
class Context:
    """A growing prompt. Its full blocks keep their ids."""

    dice: Dice
    hashes: list[int] = field(default_factory=list)
    num_tokens: int = 0

    @classmethod
    def from_prefix(cls, dice: Dice, prefix: list[int]) -> "Context":
        """One that begins with these full blocks."""
        return cls(dice, list(prefix), len(prefix) * TRACE_BLOCK_SIZE)

    def grow(self, num_tokens: int) -> "Context":
        """Append so many tokens that nobody else has."""
        self.num_tokens += num_tokens
        self.hashes += self.dice.blocks(self.num_tokens // TRACE_BLOCK_SIZE - len(self.hashes))
        return self

    def ask(self, arrival_s: float, num_output_tokens: int) -> TraceRequest:
        """A request with this prompt as it is now."""
        return TraceRequest(arrival_s, self.num_tokens, num_output_tokens, tuple(self.hashes))


def no_sharing(dice: Dice) -> Iterator[TraceRequest]:
    """Every prompt is new: 4,000 tokens at the median, four a second."""
    now_s = 0.0
    while True:
        now_s += dice.gap_s(0.25)
        yield Context(dice).grow(dice.length(4000)).ask(now_s, dice.length(120))


def hot_prefix(dice: Dice) -> Iterator[TraceRequest]:
    """All prompts begin with the same 16 blocks (8,192 tokens) and go on for 600 tokens of their own; eight a second."""
    now_s, prefix = 0.0, dice.blocks(16)
    while True:
        now_s += dice.gap_s(0.125)
        yield Context.from_prefix(dice, prefix).grow(dice.length(600)).ask(now_s, dice.length(100))


def tenants(dice: Dice) -> Iterator[TraceRequest]:
    """400 tenants, as popular as Zipf has it, with prompts of 2 to 50 blocks that all their requests begin with; five a second."""
    now_s = 0.0
    prefixes = [dice.blocks(min(50, 1 + dice.length(5000) // TRACE_BLOCK_SIZE)) for _ in range(400)]
    while True:
        now_s += dice.gap_s(0.2)
        prefix = prefixes[dice.popular(len(prefixes))]
        yield Context.from_prefix(dice, prefix).grow(dice.length(1000)).ask(now_s, dice.length(120))


def conversations(dice: Dice) -> Iterator[TraceRequest]:
    """People: a question about 3,000 tokens, then 8 turns on average, a minute apart. One begins every two seconds."""
    return _sessions(dice, [dice.blocks(2)], _Habits(2.0, 3000, 8.0, 60.0, 150, 250))


def agents(dice: Dice) -> Iterator[TraceRequest]:
    """Programs: one of 12 applications with 8 to 40 blocks of instructions and tools, 12 calls each, 4 s apart; short answers."""
    prompts = [dice.blocks(8 + dice.length(8, 0.8, 32)) for _ in range(12)]
    return _sessions(dice, prompts, _Habits(2.5, 600, 12.0, 4.0, 700, 60))


WORKLOADS: dict[str, Callable[[Dice], Iterator[TraceRequest]]] = {
    "no-sharing": no_sharing,
    "hot-prefix": hot_prefix,
    "tenants": tenants,
    "conversations": conversations,
    "agents": agents,
}


@dataclass(frozen=True, slots=True)
class _Habits:
    start_gap_s: float
    first_tokens: int
    mean_turns: float
    turn_gap_s: float
    turn_tokens: int
    output_tokens: int


def _sessions(dice: Dice, prompts: list[list[int]], habits: _Habits) -> Iterator[TraceRequest]:
    """Sessions that begin one after the other and go on side by side. A turn's prompt holds all that was said, answers included."""
    order = itertools.count()
    turns: list[tuple[float, int, Context, int]] = []
    next_start_s = dice.gap_s(habits.start_gap_s)
    while True:
        while not turns or next_start_s <= turns[0][0]:
            context = Context.from_prefix(dice, prompts[dice.popular(len(prompts))]).grow(dice.length(habits.first_tokens))
            heapq.heappush(turns, (next_start_s, next(order), context, dice.count(habits.mean_turns)))
            next_start_s += dice.gap_s(habits.start_gap_s)
        now_s, _, context, num_left = heapq.heappop(turns)
        num_output = dice.length(habits.output_tokens, 0.8, 4000)
        yield context.ask(now_s, num_output)
        if num_left > 1 and context.num_tokens < 100_000:
            context.grow(num_output + dice.length(habits.turn_tokens, 1.0, 20_000))
            heapq.heappush(turns, (now_s + num_output * 0.02 + dice.gap_s(habits.turn_gap_s), next(order), context, num_left - 1))


def make_workload(name: str, seed: int, num_requests: int, speed: float = 1.0) -> list[TraceRequest]:
    """The first so many requests of a workload. KeyError for an unknown name."""
    made = itertools.islice(WORKLOADS[name](Dice(seed)), num_requests)
    return [TraceRequest(one.arrival_s / speed, one.num_tokens, one.num_output_tokens, one.hashes) for one in made]


@click.command()
@click.argument("name", type=click.Choice(list(WORKLOADS)))
@click.option("--seed", default=0, show_default=True)
@click.option("--requests", default=4000, show_default=True)
def main(name: str, seed: int, requests: int) -> None:
    """Print a workload as a trace, one request a line."""
    for line in format_trace(make_workload(name, seed, requests)):
        click.echo(line)


if __name__ == "__main__":
    main()
