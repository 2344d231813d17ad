"""What a process's resident memory is made of, by Linux's own count: `/proc/PID/smaps`."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_KIB = 1024


class Mapping(NamedTuple):
    """One range of a process's addresses."""

    name: str
    """A path, `[heap]`, `[stack]` and the like, or nothing."""
    resident_bytes: int
    anonymous_bytes: int
    """Of them, those that no file has: memory that was allocated, and pages of a file that the process has changed."""


@dataclass(frozen=True, slots=True)
class Resident:
    """Resident bytes of a process."""

    total: int
    anonymous: int
    by_file: Counter[str]
    """Unchanged pages of files, by path."""

    def of_files(self, suffix: str) -> int:
        """Unchanged pages of the files whose names end like this."""
        return sum(count for name, count in self.by_file.items() if name.endswith(suffix))


def mappings(smaps: str) -> Iterator[Mapping]:
    """Read the text of `/proc/PID/smaps` (proc_pid_smaps(5)). Raises ValueError for anything else."""
    name, sizes = "", dict[str, int]()
    for line in smaps.splitlines():
        key, _, value = line.partition(":")
        if " " not in key:
            if value.endswith(" kB"):
                sizes[key] = int(value[:-3]) * _KIB
            if key == "VmFlags":  # the last line of each mapping
                yield Mapping(name, sizes["Rss"], sizes["Anonymous"])
        else:
            fields = line.split(maxsplit=5)
            if len(fields) < 5:
                raise ValueError(f"not a line of smaps: {line}")
            name, sizes = fields[5] if len(fields) > 5 else "", {}


def sum_up(found: Iterator[Mapping]) -> Resident:
    """All mappings together."""
    total, anonymous, by_file = 0, 0, Counter[str]()
    for mapping in found:
        total += mapping.resident_bytes
        anonymous += mapping.anonymous_bytes
        if mapping.resident_bytes > mapping.anonymous_bytes:
            by_file[mapping.name] += mapping.resident_bytes - mapping.anonymous_bytes
    return Resident(total, anonymous, by_file)


def resident_of(pid: int | str = "self") -> Resident:
    """Of a process that runs. Raises OSError if there is none, or it is another user's."""
    return sum_up(mappings(Path(f"/proc/{pid}/smaps").read_text()))
