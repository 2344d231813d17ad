"""A finding, and how findings become a verdict."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from meshserve.config import FIRST_PORT

PORTS = f"{FIRST_PORT}-{FIRST_PORT + 99}/tcp"
"""What a firewall has to let in."""
MULTICAST_PORT = "5353/udp"
"""The same for mDNS."""


class Severity(StrEnum):
    """How bad it is."""

    ERROR = "error"
    """Peers do not see each other, or cannot work together."""
    WARNING = "warning"
    """It works in part, or by luck."""
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Finding:
    """One cause, what showed it, and what to do."""

    code: str
    """Stable, for scripts."""
    severity: Severity
    cause: str
    seen: str = ""
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def error(code: str, cause: str, seen: str, advice: str) -> Finding:
    """One that explains why peers do not see each other."""
    return Finding(code, Severity.ERROR, cause, seen, advice)


def warning(code: str, cause: str, seen: str, advice: str) -> Finding:
    """One that should be mended."""
    return Finding(code, Severity.WARNING, cause, seen, advice)


def info(code: str, cause: str, seen: str = "", advice: str = "") -> Finding:
    """One to know."""
    return Finding(code, Severity.INFO, cause, seen, advice)


def is_wrong(findings: Iterable[Finding]) -> bool:
    """Whether `doctor` exits with 1."""
    return any(finding.severity is not Severity.INFO for finding in findings)


def count(number: int, noun: str) -> str:
    """`1 peer`, `2 peers`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def names(texts: Iterable[str], most: int = 6) -> str:
    """A list for people: `a, b and 3 more`."""
    found = sorted(set(texts))
    shown = ", ".join(found[:most])
    return shown if len(found) <= most else f"{shown} and {len(found) - most} more"
