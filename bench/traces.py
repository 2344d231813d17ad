"""Requests of a trace in Mooncake's format: one JSON object a line (`timestamp` ms, `input_length`, `output_length`, `hash_ids`).

The format is that of the traces released with Mooncake (Qin et al., FAST 2025): one id per block of 512 prompt tokens, the partial
last one included; equal ids mean an equal block and an equal prefix.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from meshserve.cli.bench.prompts import TRACE_BLOCK_SIZE, TraceLine, read_lines
from meshserve.errors import UsageError

__all__ = ["TRACE_BLOCK_SIZE", "TraceRequest", "format_trace", "parse_trace", "read_trace"]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request, as the mesh sees it."""

    arrival_s: float
    num_tokens: int
    num_output_tokens: int
    hashes: tuple[int, ...]
    """Of its full blocks: only those can be found again."""


def read_trace(path: Path, block_size: int = TRACE_BLOCK_SIZE, speed: float = 1.0) -> list[TraceRequest]:
    """The requests of a file in order of arrival. Raises UsageError where the file is not a trace, or cannot be cut into such blocks."""
    with path.open() as lines:
        return parse_trace(lines, block_size, speed)


def parse_trace(lines: Iterable[str], block_size: int = TRACE_BLOCK_SIZE, speed: float = 1.0) -> list[TraceRequest]:
    """The requests of these lines in order of arrival, `speed` times as fast. Raises UsageError as :func:`read_trace` does."""
    if TRACE_BLOCK_SIZE % block_size:
        raise UsageError(f"a trace's blocks have {TRACE_BLOCK_SIZE} tokens: a block size must divide that, and {block_size} does not")
    return [_in_blocks(line, block_size) for line in read_lines(lines, speed)]


def format_trace(requests: Iterable[TraceRequest]) -> Iterator[str]:
    """Lines that :func:`parse_trace` makes the same requests of, for blocks of 512 tokens. A partial last block gets an id of its own."""
    next_id = -1
    for request in requests:
        hash_ids = list(request.hashes)
        if request.num_tokens % TRACE_BLOCK_SIZE:
            hash_ids.append(next_id)
            next_id -= 1
        yield json.dumps(
            {
                "timestamp": round(request.arrival_s * 1000, 3),
                "input_length": request.num_tokens,
                "output_length": request.num_output_tokens,
                "hash_ids": hash_ids,
            }
        )


def _in_blocks(line: TraceLine, block_size: int) -> TraceRequest:
    parts = TRACE_BLOCK_SIZE // block_size
    hashes = tuple(hash_id * parts + part for hash_id in line.hash_ids for part in range(parts))
    return TraceRequest(line.arrival_s, line.num_tokens, line.num_output_tokens, hashes[: line.num_tokens // block_size])
