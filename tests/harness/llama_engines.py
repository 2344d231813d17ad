"""Engines of llama.cpp with faults, for `--engine tests.harness.llama_engines:NAME`."""

import itertools
from array import array
from collections.abc import Callable, Iterator

from meshserve.engines.llama import LlamaEngine
from meshserve.engines.protocol import EngineOptions, KVBlock, PrefillSink
from meshserve.errors import MeshserveError

Lie = Callable[[bytes, bytes], bytes]
"""Makes a wrong block of a right one and the one before it."""

_MAGIC_BYTES = 4
LIES: dict[str, Lie] = {
    "another position": lambda block, previous: previous,
    "cut short": lambda block, previous: block[:-1],
    "too long": lambda block, previous: block + b"\0",
    "another build": lambda block, previous: bytes((block[0] ^ 1,)) + block[1:],
    "no block at all": lambda block, previous: b"",
}
"""Each is sent with the right checksum: only the engine that gets it can tell."""


class LyingEngine(LlamaEngine):
    """Gives out a wrong second block of each prompt, wrong in another way each time."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._lies: Iterator[Lie] = itertools.cycle(LIES.values())

    def prefill(self, request_id: str, tokens: "array[int]", first_block: int, sink: PrefillSink) -> None:
        """Compute it, and lie."""
        super().prefill(request_id, tokens, first_block, _LyingSink(sink, next(self._lies)))


class _LyingSink:
    def __init__(self, sink: PrefillSink, lie: Lie) -> None:
        self._sink, self._lie, self._previous = sink, lie, b""

    def on_blocks(self, blocks: list[KVBlock]) -> None:
        told = []
        for index, num_tokens, payload in blocks:
            told.append((index, num_tokens, self._lie(payload, self._previous) if index == 1 else payload))
            self._previous = payload
        self._sink.on_blocks(told)

    def on_prefilled(self, num_cached_tokens: int) -> None:
        self._sink.on_prefilled(num_cached_tokens)

    def on_prefill_failed(self, error: MeshserveError) -> None:
        self._sink.on_prefill_failed(error)
