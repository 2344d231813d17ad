"""Workers that live and make no progress on a request.

A sequence without a new token may be waiting for its turn, or for a long prompt. So the processor asks its worker how long the progress
is overdue, by the worker's own forecast. A sequence is stalled if it is overdue for longer than `--stall-timeout`, or if the worker does
not know the sequence for that time.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshserve.errors import MeshserveError, PeerLost
from meshserve.mesh.mesh import Mesh
from meshserve.roles.processor.sequences import Sequence
from meshserve.wire.messages import MAX_ASKED, PROGRESS

_LOOKS_PER_TIMEOUT = 8
_ASKED_AFTER = 0.25
"""Part of the timeout without a token after which the worker is asked."""
_LONGEST_PAUSE_S = 2.0

Standing = tuple[str, int, int]
"""How far a sequence is: its worker's incarnation, the number of the attempt, and its tokens so far."""


@dataclass(slots=True)
class _Quiet:
    standing: Standing
    quiet_s: float = 0.0


@dataclass(slots=True)
class Verdict:
    """The sequences to ask about and the stalled sequences, by their names."""

    asked: dict[str, list[str]] = field(default_factory=dict)
    """By worker: the sequences whose progress the worker is asked about."""
    stalled: list[str] = field(default_factory=list)


class Patience:
    """Decides which sequences are stalled. Pure: `look` is called with the time at pauses of `pause_s`, `heard` with what workers answer.

    Time between two late looks does not count: this process may have been suspended.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.pause_s = min(_LONGEST_PAUSE_S, timeout_s / _LOOKS_PER_TIMEOUT)
        self._quiet: dict[str, _Quiet] = {}
        self._looked_s: float | None = None

    def look(self, standings: Mapping[str, Standing], now_s: float) -> Verdict:
        """Take in how far each sequence that has a worker is, and decide."""
        passed_s = min(now_s - self._looked_s, 2 * self.pause_s) if self._looked_s is not None else 0.0
        self._looked_s, before, verdict = now_s, self._quiet, Verdict()
        self._quiet = {}
        for name, standing in standings.items():
            found = before.get(name)
            if found is None or found.standing != standing:
                self._quiet[name] = _Quiet(standing)
                continue
            self._quiet[name] = found
            found.quiet_s += passed_s
            if found.quiet_s > self._timeout_s:
                verdict.stalled.append(name)
            elif found.quiet_s >= _ASKED_AFTER * self._timeout_s:
                verdict.asked.setdefault(standing[0], []).append(name)
        return verdict

    def heard(self, name: str, worker: str, overdue_s: float | None) -> None:
        """This worker says how long the progress of a sequence is overdue; None: the worker does not know the sequence."""
        found = self._quiet.get(name)
        if found is not None and found.standing[0] == worker and overdue_s is not None:
            found.quiet_s = min(found.quiet_s, overdue_s)


class _Answer:
    """The sink of a question to one worker."""

    def __init__(self, patience: Patience, worker: str, names: list[str]) -> None:
        self._patience, self._worker, self._names = patience, worker, names

    def on_item(self, item: Any) -> None:
        """The method has no items."""

    def on_end(self, value: list[float | None]) -> None:
        """One figure for each name."""
        for name, overdue_s in zip(self._names, value, strict=False):
            self._patience.heard(name, self._worker, overdue_s)

    def on_error(self, error: MeshserveError) -> None:
        """No answer: the sequences stay as they are."""


async def watch_stalls(mesh: Mesh, timeout_s: float, sequences: Callable[[], Iterable[Sequence]]) -> None:
    """Moves stalled sequences to other workers. Never returns."""
    patience = Patience(timeout_s)
    while True:
        await asyncio.sleep(patience.pause_s)
        running = {found.receipt.request_id: found for found in sequences()}
        standings = {
            name: (found.worker, found.attempt, len(found.output)) for name, found in running.items() if found.worker is not None
        }
        verdict = patience.look(standings, mesh.now_s())
        for worker, names in verdict.asked.items():
            _ask(mesh, patience, worker, names[:MAX_ASKED])
        for name in verdict.stalled:
            running[name].worker_stalled()


def _ask(mesh: Mesh, patience: Patience, worker: str, names: list[str]) -> None:
    try:
        mesh.open(worker, PROGRESS, names, _Answer(patience, worker, names), 2 * patience.pause_s)
    except PeerLost:
        return  # its streams end by themselves
