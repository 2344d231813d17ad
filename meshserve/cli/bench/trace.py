"""Traces in Mooncake's format: one JSON object a line (`timestamp` ms, `input_length`, `output_length`, `hash_ids`).

The format is that of the traces released with Mooncake (Qin et al., FAST 2025): one id per block of 512 prompt tokens, the partial
last one included; equal ids mean an equal block and an equal prefix.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshserve.errors import UsageError

TRACE_BLOCK_SIZE = 512
"""Tokens that one id of `hash_ids` stands for."""


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
        found: dict[str, Any] = json.loads(line)
        arrival_s = float(found["timestamp"]) / 1000 / speed
        if not math.isfinite(arrival_s):
            raise ValueError("it never comes")
        return TraceLine(
            arrival_s,
            max(1, int(found["input_length"])),
            max(1, int(found["output_length"])),
            tuple(int(hash_id) for hash_id in found["hash_ids"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError) as exc:
        raise UsageError(f"line {number} is not a request of a trace: {exc}") from exc


def read_lines(lines: Iterable[str], speed: float = 1.0) -> list[TraceLine]:
    """All requests in order of arrival. Raises UsageError for a line that is none, or if there is none."""
    found = [read_line(number, line, speed) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UsageError("the trace has no requests")
    return sorted(found, key=lambda request: request.arrival_s)


def read_trace_file(path: Path, speed: float = 1.0) -> list[TraceLine]:
    """As :func:`read_lines`, of a file. Raises UsageError also for a file that cannot be read."""
    try:
        with path.open() as lines:
            return read_lines(lines, speed)
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"the trace {str(path)!r} cannot be read: {exc}") from exc
