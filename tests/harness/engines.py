"""Engines with faults that no signal can bring about, for `--engine tests.harness.engines:NAME`."""

import os
import signal
import time
from array import array
from dataclasses import replace

from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineLoad, EngineOptions, GenerationSink, PrefillSink, Reservation
from meshserve.engines.tokenizers import ByteTokenizer
from meshserve.wire.generation import GenerateRequest

HANG_MARK, KILL_MARK, HOLD_MARK = "HANG-HERE", "KILL-HERE", "HOLD-HERE"
"""A prompt that contains it has the effect."""


def _contains(tokens: "array[int]", mark: str) -> bool:
    return array("I", ByteTokenizer().encode(mark)).tobytes() in tokens.tobytes()


class ReticentEngine(DummyEngine):
    """Does not say how many sequences it runs at once."""

    def load(self) -> EngineLoad:
        """All but that."""
        return replace(super().load(), max_running=0)


class HangingEngine(DummyEngine):
    """A marked prompt is never prefilled, though the process lives on and the engine still holds it."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._hung_since: dict[str, float] = {}

    def prefill(self, request_id: str, tokens: "array[int]", first_block: int, sink: PrefillSink) -> None:
        """Hang if it is marked."""
        if _contains(tokens, HANG_MARK):
            self._hung_since[request_id] = time.monotonic()
        else:
            super().prefill(request_id, tokens, first_block, sink)

    def overdue_s(self, request_id: str) -> float | None:
        """Ever longer for a hung one."""
        since_s = self._hung_since.get(request_id)
        return super().overdue_s(request_id) if since_s is None else time.monotonic() - since_s

    def cancel(self, request_id: str) -> None:
        """A hung one too."""
        self._hung_since.pop(request_id, None)
        super().cancel(request_id)


class HoldingEngine(DummyEngine):
    """A marked prompt gets no token until it is cancelled, and costs nothing meanwhile: a way to fill a mesh."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._held: dict[str, Reservation | None] = {}

    def generate(self, request: GenerateRequest, sink: GenerationSink, reservation: Reservation | None = None) -> None:
        """Keep it if it is marked."""
        if _contains(request.tokens, HOLD_MARK):
            self._held[request.request_id] = reservation
        else:
            super().generate(request, sink, reservation)

    def cancel(self, request_id: str) -> None:
        """A held one gives back the blocks that were set aside for it."""
        if (reservation := self._held.pop(request_id, None)) is not None:
            reservation.release()
        super().cancel(request_id)


class FatalContinuationEngine(DummyEngine):
    """A marked prompt kills the process that goes on with output of another worker, before it gives a token of its own."""

    def generate(self, request: GenerateRequest, sink: GenerationSink, reservation: Reservation | None = None) -> None:
        """Die if it is marked."""
        if request.num_generated:
            _die_if(request.tokens)
        super().generate(request, sink, reservation)


class KillingEngine(DummyEngine):
    """A marked prompt kills its process, as a CUDA fault would."""

    def prefill(self, request_id: str, tokens: "array[int]", first_block: int, sink: PrefillSink) -> None:
        """Die if it is marked."""
        _die_if(tokens)
        super().prefill(request_id, tokens, first_block, sink)

    def generate(self, request: GenerateRequest, sink: GenerationSink, reservation: Reservation | None = None) -> None:
        """Die if it is marked."""
        _die_if(request.tokens)
        super().generate(request, sink, reservation)


def _die_if(tokens: "array[int]") -> None:
    if _contains(tokens, KILL_MARK):
        os.kill(os.getpid(), signal.SIGKILL)
