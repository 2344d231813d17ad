"""A context of llama.cpp: one KV pool for all sequences, the steps on it, and its blocks on their way in and out.

llama.cpp ends the process where a call breaks its preconditions; so each is checked here before the call, and a broken one is a
ValueError. A context belongs to one thread; only :meth:`LlamaContext.abort` may be called from another.
"""

import contextlib
import ctypes
from array import array
from collections.abc import Iterable, Iterator, Sequence
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_uint8
from typing import Any

from meshserve.engines.llama.blocks import BlockFormat
from meshserve.engines.llama.library import AbortCallback
from meshserve.engines.llama.model import LlamaModel
from meshserve.errors import BlockRefused, EngineFailed, PoolFull, StartupFailed

KV_TYPES = {"f16": 1, "q8_0": 8}
MAX_SEQUENCES, MAX_CELLS = 255, 1 << 27
_FLASH_ATTENTION_ON = 1
_POOL_FULL, _ABORTED = 1, 2
_BLOCK_TOKENS, _NUM_BLOCKS = 4, 3  # of the trial of the handoff
_TEXT = "The quick brown fox jumps over the lazy dog, 1234567890 times; and then it rests.\n"


class LlamaContext:
    """A KV pool of `num_cells` tokens for `num_sequences` sequences, the last of which is scratch: blocks pass through it.

    llama.cpp adds up attention in the order of cells, and takes the first free one: a sequence that goes on in a cell before its own would
    get other logits (up to 0.5 off). So cells that are removed can be kept from others (`keeps_removed`).

    A step has at most `max_batch` tokens and `max_outputs` logits. Flash attention is always on: without it logits depend on the pool,
    and bad numbers in one sequence spoil all others. Raises StartupFailed if the context cannot be made.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        num_cells: int,
        num_sequences: int,
        max_batch: int,
        max_outputs: int,
        num_threads: int,
        kv_type: str = "q8_0",
    ) -> None:
        if not 2 <= num_sequences <= MAX_SEQUENCES or not 1 <= max_outputs <= max_batch or num_threads < 1:
            raise ValueError(f"a context has 2 to {MAX_SEQUENCES} sequences, no more outputs than batch, and at least 1 thread")
        if not 1 <= num_cells <= MAX_CELLS:  # llama.cpp computes sizes without looking whether they fit into their types
            raise ValueError(f"a context has 1 to {MAX_CELLS} cells")
        self.model, self.kv_type = model, kv_type
        self.max_batch, self.max_outputs, self.scratch = max_batch, max_outputs, num_sequences - 1
        self.block_format: BlockFormat | None = None
        """Set once a block of this context was seen to be readable (:meth:`learn_blocks`)."""
        self.keeps_removed = False
        """Whether cells that are removed are kept from others until :meth:`release_removed`, or until there are no more."""
        self._calls = model.library.functions
        self._removed = num_sequences
        """A sequence of llama.cpp that has the cells that are removed and not free yet; one position may be there many times."""
        self._has_removed = False
        self._handle: int | None = self._make(num_cells, num_threads)
        self._memory: int = self._calls.llama_get_memory(self._handle)
        self.num_cells: int = self._calls.llama_n_ctx(self._handle)
        self._prepare_batch()
        self._prepare_abort()
        self._outputs = b""

    def _make(self, num_cells: int, num_threads: int) -> int:
        params = self._calls.llama_context_default_params()
        params.n_ctx, params.n_seq_max = num_cells, self._removed + 1
        params.n_batch = params.n_ubatch = self.max_batch  # one pass each, so that a step that finds no room changes nothing
        params.n_threads = params.n_threads_batch = num_threads
        params.flash_attn_type = _FLASH_ATTENTION_ON
        params.type_k = params.type_v = KV_TYPES[self.kv_type]
        params.kv_unified = params.swa_full = True
        if hasattr(params, "n_outputs_max"):  # else there is room for the logits of a whole batch: 100 MB for 512 tokens and 49,152 pieces
            params.n_outputs_max = params.n_outputs_max_per_seq = max(self.max_outputs, self._removed + 1)
        self.model.library.route_log()
        self.model.library.take_error()
        handle: int | None = self._calls.llama_init_from_model(self.model.handle, params)
        if not handle:
            reason = self.model.library.take_error()
            raise StartupFailed(
                f"{self.model.path}: no memory for {num_cells:,} cells of KV cache ({reason}): lower --kv-cache-tokens or change --kv-type"
            )
        found = [getattr(self._calls, name)(handle) for name in ("llama_n_ctx_seq", "llama_n_batch", "llama_n_seq_max")]
        if found[0] < num_cells or found[1:] != [self.max_batch, self._removed + 1]:
            self._calls.llama_free(handle)
            raise StartupFailed(f"llama.cpp made another context than asked ({found}): set --kv-cache-tokens to {found[0]} or less")
        return handle

    def _prepare_batch(self) -> None:
        """Buffers that every step fills anew; each row has one sequence."""
        size, pointer = self.max_batch, POINTER(c_int32)
        tokens, positions, counts, sequences = ((c_int32 * size)() for _ in range(4))
        counts[:] = [1] * size
        outputs = (c_int8 * size)()
        pointers = (pointer * size)(*(ctypes.cast(ctypes.byref(sequences, 4 * row), pointer) for row in range(size)))
        self._batch = self.model.library.batch_type(0, tokens, None, positions, counts, pointers, outputs)
        self._views = [memoryview(buffer).cast("B").cast("i") for buffer in (tokens, positions, sequences)]
        self._wanted = memoryview(outputs).cast("B")

    def _prepare_abort(self) -> None:
        """llama.cpp asks a callback at each node of its graph. In Python that would wait for the GIL a thousand times a step; `strlen`
        of a text of ours answers as well: 0 while the text is empty.
        """
        self._abort_text = ctypes.create_string_buffer(2)
        self._abort_callback = AbortCallback(ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value or 0)
        self._calls.llama_set_abort_callback(self._handle, self._abort_callback, ctypes.addressof(self._abort_text))

    def abort(self) -> None:
        """End the step that runs now, soon, and all later ones. May be called from any thread."""
        self._abort_text[0] = b"\1"

    def decode(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wants_logits: Sequence[bool]) -> bool:
        """Compute one step; row for row a token, its position, its sequence, and whether its logits are wanted.

        Returns False, and nothing has changed, if the pool has fewer free cells than the step has tokens. Raises ValueError for rows that
        llama.cpp must not see; EngineFailed if it refuses the step (positions of a sequence that do not follow each other: nothing has
        changed), or was aborted (what is in the pool then is not known).
        """
        outputs = bytes(map(bool, wants_logits))
        rows = array("i", tokens), array("i", positions), array("i", sequences)
        self._check_rows(*rows, outputs)
        for view, values in zip(self._views, rows, strict=True):
            view[: len(outputs)] = values
        self._wanted[: len(outputs)] = outputs
        self._batch.n_tokens = len(outputs)
        self._outputs = b""
        code = self._calls.llama_decode(self._handle, self._batch)
        if code == _POOL_FULL and self.release_removed():
            code = self._calls.llama_decode(self._handle, self._batch)
        if code == 0:
            self._outputs = outputs
        elif code != _POOL_FULL:
            raise EngineFailed("the step was aborted" if code == _ABORTED else f"a step failed: {self.model.library.take_error()}")
        return bool(code == 0)

    def _check_rows(self, tokens: "array[int]", positions: "array[int]", sequences: "array[int]", outputs: bytes) -> None:
        if not 1 <= len(outputs) <= self.max_batch or not len(tokens) == len(positions) == len(sequences) == len(outputs):
            raise ValueError(f"a step has 1 to {self.max_batch} rows, as many of each kind")
        limits = (
            ("tokens", tokens, self.model.vocabulary_size),
            ("positions", positions, self.num_cells),
            ("sequences", sequences, self.scratch),
        )
        for name, values, limit in limits:
            if min(values) < 0 or max(values) >= limit:
                raise ValueError(f"{name} are from 0 to {limit - 1}")
        if outputs.count(1) > self.max_outputs:
            raise ValueError(f"a step gives at most {self.max_outputs} logits")

    def logits(self, row: int) -> "memoryview[float]":
        """Logits after row `row` of the last step, which wanted them: a view of 32-bit floats, one per piece, good until the next step."""
        if not 0 <= row < len(self._outputs) or not self._outputs[row]:
            raise ValueError(f"row {row} of the last step has no logits")
        found = self._calls.llama_get_logits_ith(self._handle, row)
        values = (c_float * self.model.vocabulary_size).from_address(ctypes.addressof(found.contents))
        return memoryview(values).cast("B").cast("f")

    def share(self, source: int, target: int, first_position: int, end_position: int) -> None:
        """Make the source's cells of these positions the target's as well; nothing is copied. Recurrent layers share all or nothing."""
        self._check_range(first_position, end_position, source, target)
        self._calls.llama_memory_seq_cp(self._memory, source, target, first_position, end_position)

    def remove(self, sequence: int, first_position: int = 0, end_position: int = 1 << 30) -> bool:
        """Take these positions from a sequence; a cell that no sequence has is free. False: nothing was done, as a state has no parts."""
        self._check_range(first_position, end_position, sequence)
        if self.keeps_removed:
            self._calls.llama_memory_seq_cp(self._memory, sequence, self._removed, first_position, end_position)
            self._has_removed = True
        return bool(self._calls.llama_memory_seq_rm(self._memory, sequence, first_position, end_position))

    def release_removed(self) -> bool:
        """Free the removed cells: the next ones taken are the lowest of them. False: there were none."""
        had_removed, self._has_removed = self._has_removed, False
        if had_removed:
            self._calls.llama_memory_seq_rm(self._memory, self._removed, -1, -1)
        return had_removed

    def move(self, sequences: Sequence[int], first_position: int, num_tokens: int) -> None:
        """Put the cells of these tokens, which all of these sequences share, after all cells that are in use."""
        payload, end_position = self.export_block(sequences[0], first_position, num_tokens), first_position + num_tokens
        for sequence in sequences:
            self.remove(sequence, first_position, end_position)
        self.import_block(sequences[0], first_position, num_tokens, payload)
        for sequence in sequences[1:]:
            self.share(sequences[0], sequence, first_position, end_position)

    def operate(self, operations: Iterable[tuple[Any, ...]]) -> None:
        """Call the methods named, with their arguments, in order."""
        for name, *arguments in operations:
            getattr(self, name)(*arguments)

    def clear(self) -> None:
        """Empty the pool."""
        self._has_removed = False
        self._calls.llama_memory_clear(self._memory, False)

    def learn_blocks(self, sequence: int, first_position: int, num_tokens: int) -> None:
        """Learn the form of blocks from one that this sequence has. Raises BlockRefused if it cannot be read."""
        with self._shown(sequence, first_position, num_tokens) as size_bytes:
            self.block_format = BlockFormat.learn(bytes(self._read_scratch(size_bytes)), num_tokens)

    def export_block(self, sequence: int, first_position: int, num_tokens: int) -> bytes:
        """The block's bytes, right after the step that completed it. Raises BlockRefused if the sequence does not have all of its cells."""
        form = self.block_format
        assert form is not None, "blocks are given out once their form was learned"
        with self._shown(sequence, first_position, num_tokens) as size_bytes:
            if size_bytes != form.size_bytes(num_tokens):
                raise BlockRefused(f"sequence {sequence} lacks some of {num_tokens} tokens from position {first_position}")
            payload = self._read_scratch(size_bytes)
        form.normalize(payload, first_position, num_tokens)
        return bytes(payload)

    def import_block(self, sequence: int, first_position: int, num_tokens: int, payload: bytes) -> None:
        """Add a block to a sequence that does not have these positions; it takes `num_tokens` free cells.

        Raises BlockRefused, before llama.cpp sees it, if the payload is not a block of these tokens; PoolFull if cells are missing.
        """
        self._check_range(first_position, first_position + num_tokens, sequence)
        assert self.block_format is not None, "blocks are taken in once their form was learned"
        self.block_format.check(payload, first_position, num_tokens)
        try:
            if not self._write_scratch(payload) and not (self.release_removed() and self._write_scratch(payload)):
                raise PoolFull(f"no room for a block of {num_tokens} tokens: {self.model.library.take_error()}")
            self._calls.llama_memory_seq_cp(self._memory, self.scratch, sequence, first_position, first_position + num_tokens)
        finally:
            self._calls.llama_memory_seq_rm(self._memory, self.scratch, -1, -1)

    @contextlib.contextmanager
    def _shown(self, sequence: int, first_position: int, num_tokens: int) -> Iterator[int]:
        """Gives these cells to the scratch sequence as well, meanwhile; yields the size of what llama.cpp writes of them."""
        self._check_range(first_position, first_position + num_tokens, sequence)
        self._calls.llama_memory_seq_cp(self._memory, sequence, self.scratch, first_position, first_position + num_tokens)
        try:
            yield self._calls.llama_state_seq_get_size(self._handle, self.scratch)
        finally:
            self._calls.llama_memory_seq_rm(self._memory, self.scratch, -1, -1)

    def _read_scratch(self, size_bytes: int) -> bytearray:
        found = bytearray(size_bytes)
        place = ctypes.cast((c_uint8 * size_bytes).from_buffer(found), POINTER(c_uint8))
        if self._calls.llama_state_seq_get_data(self._handle, place, size_bytes, self.scratch) != size_bytes:
            raise EngineFailed(f"a block could not be read: {self.model.library.take_error()}")
        return found

    def _write_scratch(self, payload: bytes) -> bool:
        """Whether there was room; what is there is replaced."""
        data = ctypes.cast(c_char_p(payload), POINTER(c_uint8))
        return bool(self._calls.llama_state_seq_set_data(self._handle, data, len(payload), self.scratch) == len(payload))

    def _check_range(self, first_position: int, end_position: int, *sequences: int) -> None:
        if not 0 <= first_position < end_position <= 1 << 30 or not all(0 <= sequence < self.scratch for sequence in sequences):
            raise ValueError(f"no positions from {first_position} to {end_position} of sequences {sequences} below {self.scratch}")

    def close(self) -> None:
        """Free the context. Harmless when called twice; nothing else may be called after it."""
        handle, self._handle = self._handle, None
        if handle:
            self._calls.llama_free(handle)
            self._calls = None  # a call after the close fails here, and not in llama.cpp


def probe(context: LlamaContext, block_size: int = 64) -> str:
    """A trial of the handoff at load: blocks, or a state, out of one sequence and into another must give the same logits, bit for bit.

    Returns "" if blocks of this model can be handed over, else the reason why not. Learns the form of blocks; leaves the pool empty.

    If blocks can be handed over, removed cells are kept from others from then on, as sequences can be moved out of the way of those that
    are released; but not with a sliding window, behind which cells are taken again whoever has them.

    The pool must be empty, and have room for 26 tokens and two sequences besides the scratch sequence. The trial's blocks are shorter
    than `block_size`, to cost little.
    """
    window = context.model.sliding_window
    if 0 < window < block_size:  # llama.cpp writes only the cells that the token after the block sees
        return f"its sliding window of {window} tokens is shorter than a block of {block_size}"
    if window and context.model.has_state:  # when a prompt ends, the cells of its beginning may be others'
        return "it has both a sliding window and recurrent layers"
    try:
        refusal = _probe(context)
        context.keeps_removed = not refusal and not window
        return refusal
    except (BlockRefused, EngineFailed, PoolFull, ValueError) as error:
        return str(error)
    finally:
        context.clear()


def _probe(context: LlamaContext) -> str:
    length = _BLOCK_TOKENS * _NUM_BLOCKS
    text = context.model.tokenize(_TEXT)
    tokens = [text[index % len(text)] for index in range(length + 1)]
    for first in range(0, length, _BLOCK_TOKENS):
        end = first + _BLOCK_TOKENS
        if not context.decode(tokens[first:end], range(first, end), [0] * _BLOCK_TOKENS, [False] * _BLOCK_TOKENS):
            return "the pool is too small to try it"
        if context.model.has_state:
            if end < length:
                continue
            first = 0  # a state is handed over whole, after the last token
        if context.block_format is None:
            context.learn_blocks(0, first, end - first)
        context.import_block(1, first, end - first, context.export_block(0, first, end - first))
    found = []
    for sequence in (0, 1):
        if not context.decode([tokens[length]], [length], [sequence], [True]):
            return "the pool is too small to try it"
        found.append(bytes(context.logits(0)))
    return "" if found[0] == found[1] else "logits after a handoff are not those before it"
