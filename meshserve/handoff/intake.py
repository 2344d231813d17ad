"""Blocks on their way into the engine: checked, written, and acknowledged once the engine has them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from meshserve.engines.protocol import Engine, Reservation
from meshserve.errors import BlockRefused, MeshserveError
from meshserve.handoff.blocks import check_blocks
from meshserve.handoff.result import HandoffResult
from meshserve.handoff.task import PrefillTask
from meshserve.kv.pool import prefix_hashes
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.wire.generation import GenerateRequest
from meshserve.wire.handoff import Acknowledgement, BulkHeader


@dataclass(slots=True)
class RunningTask:
    """A prompt that is prefilled elsewhere, and what has come of it."""

    task: PrefillTask
    request: GenerateRequest
    on_done: Callable[[HandoffResult], None]
    on_lost: Callable[[str], None]
    reservation: Reservation | None = None
    prefix_hashes: list[int] = field(default_factory=list)
    """Of the prompt's blocks but for its last token, once a block has come."""
    claim: IncomingCall | None = None
    offered_block: int | None = None
    """The first that is missing here, of a prompt that may be offered."""
    has_delivered: bool = False
    """The claim brought blocks."""
    computed_ms: float = 0.0
    names: dict[str, str] = field(default_factory=dict)
    """Of the peers that claimed, as a dead one's is soon forgotten."""


class Attempts(Protocol):
    """What decides on a prompt's attempts: the requester."""

    def is_running(self, running: RunningTask) -> bool:
        """Whether somebody still waits for this prompt."""

    def complete_if_all_came(self, running: RunningTask) -> None:
        """The engine has one block more: perhaps that was the last one."""

    def attempt_failed(self, running: RunningTask, peer: str, attempt: int, reason: str) -> None:
        """An attempt is over, unless it was already."""


class BlockIntake:
    """Takes blocks of running attempts into the engine."""

    def __init__(self, mesh: Mesh, engine: Engine, attempts: Attempts) -> None:
        self._mesh, self._engine, self._attempts = mesh, engine, attempts

    def take(
        self, running: RunningTask, header: BulkHeader, payloads: Sequence[bytes | memoryview], answer: Callable[[Acknowledgement], None]
    ) -> None:
        """Blocks of the running attempt: all of them, or the attempt has failed. They are acknowledged once the engine has them."""
        size_bytes, reservation = sum(map(len, payloads)), running.reservation
        assert reservation is not None, "a claim was granted"
        running.task.received(len(payloads), size_bytes)  # now: the attempt may be over when the engine has them
        acknowledge = partial(answer, Acknowledgement(header.request_id, header.attempt, size_bytes))
        try:
            self._check_tokens(running, header)
            check_blocks(header, payloads)
            blocks = self._missing_of(reservation, header, payloads)
            running.task.renew(header.prefill_peer, header.attempt, time.monotonic())
            running.computed_ms = header.computed_ms
            if blocks:
                reservation.write(blocks, partial(self._written, running, header, blocks, acknowledge))
            else:
                acknowledge()
        except BlockRefused as error:
            self._refuse(running, header, error, len(payloads))

    def _check_tokens(self, running: RunningTask, header: BulkHeader) -> None:
        """Raises BlockRefused for blocks of another layout, or of other tokens than the prompt has up to the last of them."""
        layout = self._engine.kv_layout
        if header.layout != layout.fingerprint:
            raise BlockRefused("the blocks have another KV layout")
        if not running.prefix_hashes:
            running.prefix_hashes = prefix_hashes(running.request.tokens[:-1], layout.block_size, self._engine.card.model_hash)
        last = header.marks[-1].index if header.marks else -1
        if 0 <= last < len(running.prefix_hashes) and running.prefix_hashes[last] != header.prefix_hash:
            raise BlockRefused(f"block {last} is of other tokens than the prompt's")

    def _missing_of(
        self, reservation: Reservation, header: BulkHeader, payloads: Sequence[bytes | memoryview]
    ) -> list[tuple[int, bytes | memoryview]]:
        """Those that an earlier attempt did not bring, with a right checksum. Raises BlockRefused for what is beyond the prompt."""
        missing, num_tokens, size = set(reservation.missing()), reservation.num_tokens, self._engine.kv_layout.block_size
        blocks = []
        for mark, payload in zip(header.marks, payloads, strict=True):
            if not 0 <= mark.index * size < num_tokens:
                raise BlockRefused(f"there is no block {mark.index} in this prompt")
            if mark.index in missing:
                missing.discard(mark.index)
                blocks.append((mark.index, payload))
        if len(blocks) < len(payloads):
            self._mesh.counters.add("kv_blocks_double", len(payloads) - len(blocks))
        return blocks

    def _written(
        self,
        running: RunningTask,
        header: BulkHeader,
        blocks: list[tuple[int, bytes | memoryview]],
        acknowledge: Callable[[], None],
        error: MeshserveError | None,
    ) -> None:
        """The engine has the blocks, or cannot take them; perhaps some time after they came, when the attempt may be over."""
        if not self._attempts.is_running(running):
            return
        if error is not None:
            self._refuse(running, header, error, len(blocks))
            return
        self._mesh.counters.add("kv_blocks_received", len(blocks))
        self._mesh.counters.add("kv_bytes_received", sum([len(payload) for _, payload in blocks]))
        if self._mesh.event_log.follows(running.task.request_id):
            details = {"attempt": header.attempt, "peer_sending": header.prefill_peer}
            for index, _ in blocks:
                self._mesh.event_log.note("block", running.task.request_id, **details, index=index)
        acknowledge()
        self._attempts.complete_if_all_came(running)

    def _refuse(self, running: RunningTask, header: BulkHeader, error: MeshserveError, num_blocks: int) -> None:
        self._mesh.counters.add("kv_blocks_refused", num_blocks)
        if isinstance(error, BlockRefused) and error.is_checksum:
            self._mesh.counters.add("kv_checksum_failures")
        self._attempts.attempt_failed(running, header.prefill_peer, header.attempt, f"block refused: {error.message}")
