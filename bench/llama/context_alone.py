"""A process with llama.cpp and nothing of meshserve's engine: what the library, a model and a context take of memory, stage by stage."""

import ctypes
import logging
import re
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from bench.llama.resident import resident_of
from meshserve.engines.llama.context import LlamaContext
from meshserve.engines.llama.library import load_library
from meshserve.engines.llama.model import LlamaModel

_BUFFER = re.compile(r"(KV|compute|output) buffer size = +([0-9.]+) MiB")
_PROMPT_TOKENS = 64


class ContextSize(NamedTuple):
    """How a peer's engine makes its context."""

    num_cells: int
    num_sequences: int
    max_batch: int
    max_outputs: int
    kv_type: str


class Stages(NamedTuple):
    """Bytes of anonymous memory that each stage added, and the buffers' sizes by llama.cpp's log."""

    library: int
    model: int
    """The vocabulary, and weights that are not read from the mapped file."""
    context: int
    """Made, and not used yet: the pool, which is cleared then, and what is kept for each sequence and cell."""
    steps: int
    """Compute and output buffers, as far as steps like a peer's touch them."""
    buffers: dict[str, int]
    """Sizes of the context's buffers: `KV`, `compute` and `output`."""


def measure(pipe: Connection, path: Path, size: ContextSize) -> None:
    """Send the stages over the pipe; the process ends then."""
    log = _BufferLog()
    logging.getLogger("meshserve").addHandler(log)
    logging.getLogger("meshserve").setLevel(logging.DEBUG)
    seen = [_anonymous_bytes()]
    load_library()
    seen.append(_anonymous_bytes())
    model = LlamaModel(path)
    seen.append(_anonymous_bytes())
    context = LlamaContext(model, num_threads=1, **size._asdict())
    seen.append(_anonymous_bytes())
    _use(context, size)
    seen.append(_anonymous_bytes())
    of_library, of_model, of_context, of_steps = (after - before for before, after in pairwise(seen))
    pipe.send(Stages(of_library, of_model, of_context, of_steps, log.buffers))
    context.close()
    model.close()


def _anonymous_bytes() -> int:
    """What is free goes back to the system before: else a stage would be given memory of an earlier one, and seem to need less."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    return resident_of().anonymous


def _use(context: LlamaContext, size: ContextSize) -> None:
    """The kinds of steps that a peer's engine makes: a chunk of a prompt, tokens of many sequences, both at once."""
    running = range(size.max_outputs)
    for position in range(2):
        context.decode([1] * len(running), [position] * len(running), running, [True] * len(running))
    count = min(_PROMPT_TOKENS, size.max_batch - len(running))
    for first in (0, count):
        prompt = range(first, first + count)
        rows = [*running, *[len(running)] * count]
        positions = [2 + first // count] * len(running) + list(prompt)
        context.decode([1] * len(rows), positions, rows, [True] * len(running) + [False] * count)


class _BufferLog(logging.Handler):
    """Adds up the sizes of buffers that llama.cpp logs."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers = dict.fromkeys(("KV", "compute", "output"), 0)

    def emit(self, record: logging.LogRecord) -> None:
        if found := _BUFFER.search(record.getMessage()):
            self.buffers[found[1]] += round(float(found[2]) * 2**20)
