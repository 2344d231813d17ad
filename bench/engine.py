"""An engine that costs nothing, so that a benchmark measures the handoff alone: its blocks are made beforehand."""

from array import array
from collections.abc import Callable, Mapping, Sequence

from meshserve.engines.core.rates import StepRates
from meshserve.engines.core.scheduler import StepLimits
from meshserve.engines.protocol import Admission, BlockListener, EngineLoad, GenerationSink, KVPayload, PrefillSink, Reservation, size_of
from meshserve.errors import BlockRefused, MeshserveError, Unsupported
from meshserve.wire.card import KVLayout, ModelCard
from meshserve.wire.generation import GenerateRequest

_NUM_PAYLOADS = 16
"""Different blocks in memory, given out in turn: more than fit the processor's caches."""


CARD = ModelCard("bench", "bench", 1 << 22, "bytes", "")
"""A model of which only the KV's size matters."""


def bench_layout(kv_bytes_per_token: int, block_size: int) -> KVLayout:
    """That size."""
    return KVLayout("bench", block_size, kv_bytes_per_token)


class BenchReservation:
    """Copies what comes into memory that is there already, as an engine's pool is."""

    def __init__(self, buffers: list[bytearray], num_blocks: int, num_tokens: int) -> None:
        self.num_cached_tokens, self.num_tokens = 0, num_tokens
        self._buffers = buffers
        self._missing = set(range(num_blocks))
        self._block_tokens = num_tokens // num_blocks

    def missing(self) -> Sequence[int]:
        """Indexes of the blocks that are still to be written, ascending."""
        return sorted(self._missing)

    def tokens_in(self, index: int) -> int:
        """All blocks are full."""
        return self._block_tokens

    @property
    def is_complete(self) -> bool:
        """Nothing is missing."""
        return not self._missing

    def write(
        self,
        blocks: Sequence[tuple[int, KVPayload]],
        on_done: Callable[[MeshserveError | None], None],
    ) -> None:
        """Take in blocks. Raises BlockRefused if one is not missing or its length is wrong."""
        for index, payload in blocks:
            if index not in self._missing or size_of(payload) != len(self._buffers[0]):
                raise BlockRefused(f"block {index} does not fit")
        for index, payload in blocks:
            self._missing.discard(index)
            buffer, end = self._buffers[index % len(self._buffers)], 0
            for piece in payload if isinstance(payload, list) else [payload]:
                begin, end = end, end + len(piece)
                buffer[begin:end] = piece
        on_done(None)

    def release(self) -> None:
        """The memory stays."""


class BenchEngine:
    """Prefill gives out all blocks at once; nothing is ever cached."""

    description = ""

    def __init__(self, layout: KVLayout, on_prefill: Callable[[str], None] = lambda request_id: None) -> None:
        self.card, self.kv_layout, self.rates, self._on_prefill = CARD, layout, StepRates(StepLimits(1, 1)), on_prefill
        self.files: Mapping[str, bytes] = {}
        self.on_failure: Callable[[MeshserveError], None] = lambda error: None
        size_bytes = layout.block_bytes
        self._payloads = [bytes([number]) * size_bytes for number in range(_NUM_PAYLOADS)]
        self._buffers = [bytearray(size_bytes) for _ in range(_NUM_PAYLOADS)]
        for buffer in self._buffers:
            buffer[:] = self._payloads[0]  # the system finds the pages now, not while time is taken

    async def start(self) -> None:
        """Nothing to start."""

    async def close(self) -> None:
        """Nothing to give back."""

    def check(self, request: GenerateRequest) -> None:
        """Anything goes."""

    def num_cached_tokens(self, request: GenerateRequest) -> int:
        """None."""
        return 0

    def reserve(self, request: GenerateRequest) -> Reservation:
        """Room for all of the prompt but its last token, in whole blocks."""
        num_tokens = len(request.tokens) - 1
        return BenchReservation(self._buffers, num_tokens // self.kv_layout.block_size, num_tokens)

    def generate(self, request: GenerateRequest, sink: GenerationSink, reservation: Reservation | None = None) -> None:
        """It generates nothing."""
        raise Unsupported("this engine only hands KV over")

    def prefill(self, request_id: str, tokens: "array[int]", first_block: int, sink: PrefillSink) -> None:
        """Give out the blocks."""
        self._on_prefill(request_id)
        indexes = range(first_block, len(tokens) // self.kv_layout.block_size)
        size, payloads = self.kv_layout.block_size, self._payloads
        sink.on_blocks([(index, size, payloads[index % _NUM_PAYLOADS]) for index in indexes])
        sink.on_prefilled(0)

    def cancel(self, request_id: str) -> None:
        """Nothing runs for long."""

    def admission(self, request_id: str) -> Admission | None:
        """It generates nothing."""
        return None

    def overdue_s(self, request_id: str) -> float | None:
        """Never."""
        return 0.0

    def load(self) -> EngineLoad:
        """None."""
        return EngineLoad()

    def watch_blocks(self, listener: BlockListener | None) -> list[int]:
        """There are none."""
        return []
