"""Runs the checks and says what came of them."""

import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from meshserve.engines.conformance.handoff import HANDOFF_CHECKS
from meshserve.engines.conformance.lifecycle import LIFECYCLE_CHECKS
from meshserve.engines.conformance.outputs import OUTPUT_CHECKS
from meshserve.engines.conformance.subject import Subject
from meshserve.errors import Unsupported

Check = Callable[[Subject], Awaitable[None]]
"""A rule. Raises AssertionError if an engine breaks it, Unsupported if the engine says that it cannot do what the rule is about."""

CHECKS: dict[str, Check] = {check.__name__: check for check in (*OUTPUT_CHECKS, *HANDOFF_CHECKS, *LIFECYCLE_CHECKS)}
"""All rules by name, for parametrised tests."""


@dataclass(frozen=True)
class Result:
    """What came of one check."""

    name: str
    outcome: str
    """`passed`, `skipped` or `failed`."""
    reason: str
    """Why it was skipped or failed."""
    duration_s: float


@dataclass(frozen=True)
class Report:
    """What came of all."""

    results: tuple[Result, ...]

    @property
    def is_conformant(self) -> bool:
        """No check failed."""
        return not self.named("failed")

    def named(self, outcome: str) -> list[str]:
        """The checks of one outcome."""
        return [result.name for result in self.results if result.outcome == outcome]

    def __str__(self) -> str:
        lines = (f"{found.outcome:8} {found.duration_s:7.2f} s  {found.name}  {found.reason}".rstrip() for found in self.results)
        return "\n".join(lines)


async def check_engine(subject: Subject, names: Iterable[str] = CHECKS) -> Report:
    """Run these checks, all of them unless told otherwise, one after the other."""
    return Report(tuple([await _run(subject, name) for name in names]))


async def _run(subject: Subject, name: str) -> Result:
    began_s = time.monotonic()
    outcome, reason = "passed", ""
    try:
        await CHECKS[name](subject)
    except Unsupported as error:
        outcome, reason = "skipped", error.message
    except Exception as exc:
        outcome, reason = "failed", str(exc) or repr(exc)
    return Result(name, outcome, reason, time.monotonic() - began_s)
