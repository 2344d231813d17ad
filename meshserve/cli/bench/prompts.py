"""Prompts: lengths from distributions, texts of so many tokens, conversations, traces. Pure.

The characters of a token are measured at the target, which counts the tokens of two probes:
:meth:`Scale.from_probes`.
"""

import itertools
import json
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meshserve.cli.bench.requests import Request
from meshserve.errors import UsageError

FORMS = "N | uniform:LOW:HIGH | normal:MEAN:DEVIATION | lognormal:MEDIAN:SIGMA"
MAX_TOKENS = 1_000_000
_POOL_CHARS = 1 << 18
_TEXT = """
mesh peer prompt token block cache river harbour paper window signal garden letter engine number winter summer bridge stone
market station silver copper evening morning thunder valley mountain island ocean forest meadow lantern mirror shadow
the of and to in that it was for with as his on be at by had not are but from or have an they which one you were her all
she there would their we him been has when who will more no if out so said what up its about into than them can only other
"""
PROBE_CHARS = (400, 2000)
TRACE_BLOCK_SIZE = 512
"""Tokens that one id of `hash_ids` stands for."""


Lengths = Callable[[random.Random], int]
"""Draws the next token count, from 1 to 1,000,000."""


def parse_lengths(text: str) -> Lengths:
    """One of :data:`FORMS`; `lognormal` takes the median and the standard deviation of the logarithm. Raises UsageError."""
    kind, *parts = text.split(":")
    try:
        if not parts:
            kind, parts = "fixed", [kind]
        numbers = [float(part) for part in parts]
    except ValueError as exc:
        raise UsageError(f"{text!r} is no distribution of lengths: {FORMS}") from exc
    draw = _draw(kind, numbers)
    if draw is None:
        raise UsageError(f"{text!r} is no distribution of lengths: {FORMS}")
    return lambda rng: max(1, min(MAX_TOKENS, round(draw(rng))))


def _draw(kind: str, numbers: list[float]) -> Callable[[random.Random], float] | None:
    if not all(math.isfinite(number) and 0 <= number <= MAX_TOKENS for number in numbers):
        return None
    match kind, numbers:
        case "fixed", [count] if count >= 1:
            return lambda rng: count
        case "uniform", [low, high] if 1 <= low <= high:
            return lambda rng: rng.randint(math.ceil(low), math.floor(high))
        case "normal", [mean, deviation] if mean >= 1:
            return lambda rng: rng.gauss(mean, deviation)
        case "lognormal", [median, sigma] if median >= 1 and sigma <= 10:
            return lambda rng: rng.lognormvariate(math.log(median), sigma)
    return None


@dataclass(frozen=True, slots=True)
class Scale:
    """How the target's tokens relate to characters."""

    chars_per_token: float = 4.0
    """What is usual for English text."""
    num_overhead_tokens: float = 0.0
    """That each request has on top, such as a chat's template."""

    def num_chars(self, num_tokens: int, is_first: bool = True) -> int:
        """Of a text with so many tokens; the first text of a prompt carries what the template adds."""
        return max(1, round((num_tokens - (self.num_overhead_tokens if is_first else 0.0)) * self.chars_per_token))

    @classmethod
    def from_probes(cls, num_short: int, num_long: int) -> "Scale | None":
        """From how many tokens texts of :data:`PROBE_CHARS` characters had; None if that cannot be."""
        num_more = num_long - num_short
        if num_more <= 0:
            return None
        short_chars, long_chars = PROBE_CHARS
        chars_per_token = (long_chars - short_chars) / num_more
        return cls(chars_per_token, max(0.0, num_short - short_chars / chars_per_token))


class Texts:
    """Slices of one long random text, each with a label in front, so that no two labels share a beginning."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"texts {seed}")
        known, words = _TEXT.split(), list[str]()
        size = 0
        while size < _POOL_CHARS:
            words.append(rng.choice(known))
            size += len(words[-1]) + 1
        self._pool = " ".join(words)

    def make(self, label: str, num_chars: int) -> str:
        """Exactly so many characters."""
        begin = zlib.crc32(label.encode()) % (len(self._pool) // 2)
        text = f"{label} {self._pool[begin : begin + num_chars]}"
        while len(text) < num_chars:
            text += self._pool
        return text[:num_chars]


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
    """Requests without end, the same for the same seed."""

    def __init__(self, shape: Shape, scale: Scale, seed: int) -> None:
        self._shape, self._scale, self._seed = shape, scale, seed
        self._rng = random.Random(f"workload {seed}")
        self._texts = Texts(seed)
        self._numbers = itertools.count(1)
        num_chars = scale.num_chars(shape.num_shared_tokens) if shape.num_shared_tokens else 0
        labels = [f"prefix {seed}.{number}" for number in range(shape.num_prefixes)]
        self._prefixes = [self._texts.make(label, num_chars) if num_chars else "" for label in labels]

    def __iter__(self) -> Iterator[Request]:
        while True:
            prefix = self._rng.choice(self._prefixes)
            text = prefix + self._own_text(is_first=not prefix)
            yield Request((("user", text),), self._shape.output_tokens(self._rng), self._shape.num_turns - 1)

    def _own_text(self, is_first: bool) -> str:
        num_tokens = self._shape.prompt_tokens(self._rng)
        return self._texts.make(f"{self._seed}.{next(self._numbers)}", self._scale.num_chars(num_tokens, is_first))

    def next_turn(self, request: Request, answer: str) -> Request | None:
        """What is asked after this answer; None if the conversation is over."""
        if request.num_turns_left == 0:
            return None
        messages = (*request.messages, ("assistant", answer), ("user", self._own_text(is_first=False)))
        return replace(
            request,
            messages=messages,
            max_tokens=self._shape.output_tokens(self._rng),
            num_turns_left=request.num_turns_left - 1,
        )


# --- traces in Mooncake's format (Qin et al., FAST 2025): one JSON object a line. Its `hash_ids` name blocks of 512 prompt
# tokens, the partial last one included; equal ids mean an equal block and an equal prefix.


@dataclass(frozen=True, slots=True)
class TraceLine:
    """One request as the file has it."""

    arrival_s: float
    num_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...]


def read_line(number: int, line: str, speed: float = 1.0) -> TraceLine:
    """One request, `speed` times as early. Raises UsageError that names the line."""
    try:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        arrival_s = float(found["timestamp"]) / 1000 / speed
        if not math.isfinite(arrival_s):
            raise ValueError("it never comes")
        hash_ids = tuple(int(hash_id) for hash_id in found["hash_ids"])
        return TraceLine(arrival_s, _length(found, "input_length"), _length(found, "output_length"), hash_ids)
    except KeyError as exc:
        raise UsageError(f"line {number} is not a request of a trace: it has no {exc}") from exc
    except (ValueError, TypeError, OverflowError) as exc:
        raise UsageError(f"line {number} is not a request of a trace: {exc}") from exc


def _length(found: dict[str, Any], name: str) -> int:
    """Raises ValueError for what is no number of tokens."""
    value = found[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or not 1 <= value <= MAX_TOKENS:
        raise ValueError(f"{name} is {value!r}, and no whole number from 1 to {MAX_TOKENS}")
    return int(value)


def read_lines(
    lines: Iterable[str], speed: float = 1.0, read: Callable[[int, str, float], TraceLine] = read_line
) -> list[TraceLine]:
    """All requests in order of arrival. Raises UsageError for a line that is none, or if there is none."""
    found = [read(number, line, speed) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UsageError("the trace has no requests")
    return sorted(found, key=lambda request: request.arrival_s)


def read_playable_line(number: int, line: str, speed: float = 1.0) -> TraceLine:
    """As :func:`read_line`. Raises UsageError also for blocks that do not add up to the length: the prompt would have another length."""
    found = read_line(number, line, speed)
    num_blocks, num_wanted = len(found.hash_ids), math.ceil(found.num_tokens / TRACE_BLOCK_SIZE)
    if num_blocks == num_wanted:
        return found
    named = f"hash_ids names {num_blocks} blocks of {TRACE_BLOCK_SIZE} tokens"
    raise UsageError(f"line {number} cannot be played: {named}, and input_length {found.num_tokens} is {num_wanted} of them")


def read_trace_file(path: Path, speed: float = 1.0) -> list[TraceLine]:
    """As :func:`read_lines`, of a file to be played. Raises UsageError also for a file that cannot be read."""
    try:
        with path.open() as lines:
            return read_lines(lines, speed, read_playable_line)
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"the trace {str(path)!r} cannot be read: {exc}") from exc


def trace_requests(lines: Sequence[TraceLine], scale: Scale, seed: int) -> Iterator[Request]:
    """The requests of a trace, the first at once. Blocks of equal ids have equal texts; the last one is cut so that the length is right."""
    texts = Texts(seed)
    block_chars = scale.num_chars(TRACE_BLOCK_SIZE, is_first=False)
    for line in lines:
        num_chars = scale.num_chars(line.num_tokens)
        blocks = "".join(texts.make(f"block {seed}.{hash_id}", block_chars) for hash_id in line.hash_ids)
        # from the first one's time on: a trace that was cut out of a longer one would else begin with its silence
        due_s = line.arrival_s - lines[0].arrival_s
        yield Request((("user", blocks[:num_chars] or "a"),), line.num_output_tokens, due_s=due_s, num_prompt_tokens=line.num_tokens)
