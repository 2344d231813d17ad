"""A prefill task at its decode worker, its result, and the checks of the KV blocks that come for it: pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshserve.engines.protocol import Frame, KVPayload, Reservation
from meshserve.errors import BlockRefused
from meshserve.handoff.blocks import check_blocks, held_part
from meshserve.handoff.task import PrefillTask, TaskState
from meshserve.kv.pool import prefix_hashes
from meshserve.mesh.calls import IncomingCall
from meshserve.wire.card import KVLayout
from meshserve.wire.generation import GenerateRequest
from meshserve.wire.handoff import BlockMark, BulkHeader, HeldPart

_MAX_EXTRA_BYTES = 65_536
"""Of a block beyond the KV of its tokens: an engine may give it a header."""
_MIN_PIECE_BYTES = 16_384
"""Of a piece that more follow: each piece has its cost here."""


@dataclass(slots=True)
class HalfBlock:
    """The first pieces of a block, all from one incarnation, in the memory in which they arrived."""

    index: int
    size_bytes: int
    peer: str
    """The incarnation that sent the pieces. The bytes of another worker may differ, if its processor is of another kind."""
    attempt: int
    """The attempt of the last piece."""
    pieces: list[Frame] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, mark: BlockMark, piece: Frame) -> list[Frame] | None:
        """The block, if this was its last piece. Raises BlockRefused for a piece that does not follow the others."""
        if mark.offset != self.num_bytes or mark.offset + len(piece) + mark.left_bytes != self.size_bytes:
            raise BlockRefused(f"a piece of block {mark.index} does not follow the one before")
        if mark.left_bytes and len(piece) < _MIN_PIECE_BYTES:
            raise BlockRefused(f"block {mark.index} comes in pieces that are too short")
        self.pieces.append(piece)
        self.num_bytes += len(piece)
        return None if mark.left_bytes else self.pieces


@dataclass(slots=True)
class HandoffResult:
    """How a prefill task ended, for the sequence that waits for it and for the receipt."""

    state: TaskState
    reservation: Reservation | None
    """The prompt's KV, if the state is `done`."""
    prefill_peer: str | None
    """Incarnation of the worker whose blocks these are."""
    attempts: list[dict[str, Any]]
    lost_peers: list[str]
    num_blocks: int
    num_bytes: int
    num_tokens: int
    """Of the prompt, whose KV came from elsewhere."""
    prefill_ms: float
    """Of the engine that computed the blocks, by its own clock."""
    transfer_ms: float
    """From the claim to the last block, less the time of computing."""


@dataclass(slots=True)
class RunningTask:
    """A prefill task with its request, its callbacks, its blocks and its claim."""

    task: PrefillTask
    request: GenerateRequest
    on_done: Callable[[HandoffResult], None]
    on_lost: Callable[[str], None]
    reservation: Reservation | None = None
    """Made with the first claim; blocks that an attempt brought are kept for the next one."""
    prefix_hashes: list[int] = field(default_factory=list)
    """Of the prompt's blocks but for its last token, once a block has come."""
    half: HalfBlock | None = None
    """The one block of which only a part arrived. Kept beyond its attempt, until another worker gets the task."""
    claim: IncomingCall | None = None
    """The stream of the attempt that runs."""
    offered_block: int | None = None
    """The first that is missing here, of a prompt that may be offered."""
    has_delivered: bool = False
    """The claim brought blocks."""
    computed_ms: float = 0.0
    names: dict[str, str] = field(default_factory=dict)
    """Of the peers that claimed: the mesh soon forgets the name of a dead peer."""


def held_of(running: RunningTask, peer: str, first_block: int) -> HeldPart | None:
    """The part of the first missing block that this peer sent in an earlier attempt. The part of another peer or block is dropped."""
    half = running.half
    if half is None or (half.peer, half.index) != (peer, first_block):
        running.half = None
        return None
    return held_part(half.pieces)


def missing_blocks(
    running: RunningTask, header: BulkHeader, payloads: Sequence[Frame], layout: KVLayout, model_hash: str
) -> list[tuple[int, KVPayload]]:
    """The blocks that end with a message and that no earlier message brought, as index and payload. The last block may
    have come in part: it is kept for the next message.

    Raises BlockRefused for the whole message if one of its blocks has another layout, belongs to other
    tokens, lies beyond the prompt's end, or has a wrong checksum.
    """
    reservation = running.reservation
    assert reservation is not None, "a claim was granted"
    if header.layout != layout.fingerprint:
        raise BlockRefused("the blocks have another KV layout")
    if not running.prefix_hashes:
        running.prefix_hashes = prefix_hashes(running.request.tokens[:-1], layout.block_size, model_hash)
    # a block's hash stands for all tokens up to its end: that of the last block is enough
    last = header.marks[-1].index if header.marks else -1
    if 0 <= last < len(running.prefix_hashes) and running.prefix_hashes[last] != header.prefix_hash:
        raise BlockRefused(f"block {last} is of other tokens than the prompt's")
    check_blocks(header, payloads)
    missing, blocks = set(reservation.missing()), []
    for mark, payload in zip(header.marks, payloads, strict=True):
        if not 0 <= mark.index * layout.block_size < reservation.num_tokens:
            raise BlockRefused(f"there is no block {mark.index} in this prompt")
        if mark.index not in missing:
            continue  # an earlier message brought it, with a right checksum
        block = _whole(running, header, mark, payload, layout)
        if block is not None:
            missing.discard(mark.index)
            blocks.append((mark.index, block))
    return blocks


def _whole(
    running: RunningTask, header: BulkHeader, mark: BlockMark, payload: Frame, layout: KVLayout
) -> KVPayload | None:
    """The block that ends with this payload; None if it goes on.

    Blocks come in order, so that at most one is half here: all tasks together never hold more in halves than the pool
    has set aside for them.
    """
    half = running.half
    if half is not None and half.attempt != header.attempt:
        # an earlier attempt left this part: its sender sends the rest, or begins the block again
        half.attempt = header.attempt
        if not mark.offset:
            half = running.half = None
    if half is None:
        if not mark.offset and not mark.left_bytes:
            return payload
        size_bytes = len(payload) + mark.left_bytes
        if size_bytes > layout.block_bytes + _MAX_EXTRA_BYTES:
            raise BlockRefused(f"block {mark.index} is longer than a block of this KV layout")
        half = running.half = HalfBlock(mark.index, size_bytes, header.prefill_peer, header.attempt)
    elif half.index != mark.index:
        raise BlockRefused(f"block {mark.index} begins before block {half.index} has ended")
    block = half.add(mark, payload)
    if block is not None:
        running.half = None
    return block
